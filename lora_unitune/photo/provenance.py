"""Signed provenance of edited files: C2PA manifests, with c2pa-python (extra `c2pa`)."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_unitune import __version__
from lora_unitune.errors import OutputError, SettingError, one_line

CERT, KEY = "C2PA_SIGN_CERT", "C2PA_PRIVATE_KEY"
"""Environment variables that hold the certificates and the key, as for c2patool."""
SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
COMPOSITE, GENERATED = "compositeWithTrainedAlgorithmicMedia", "trainedAlgorithmicMedia"
"""The IPTC's digital source types of an edited photo, and of a picture without one."""

_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},  # it would show what was edited away
    "verify": {"remote_manifest_fetch": False},
}


@dataclass(frozen=True)
class Signer:
    """What signs an edited file.

    Attributes:
        cert: Certificates in PEM, the signer's first.
        key: Its private key in PEM.
        algorithm: Its algorithm, such as "es256".
    """

    cert: bytes
    key: bytes
    algorithm: str

    def signed(self, content: bytes, kind: str, title: str, photo: str | Path | None) -> bytes:
        """Returns a picture with a signed manifest: made from the photo, where that is a file, and edited.

        Args:
            content: The picture's file.
            kind: Its format, as Pillow names it.
            title: Its name in the manifest.
            photo: Path of the photo that was edited, or what it is called; None for a picture without one.

        Raises:
            OutputError: It can't be signed.
        """
        import c2pa

        agent = {"name": "lora-unitune", "version": __version__}
        source = SOURCES + (GENERATED if photo is None else COMPOSITE)
        edited = {"action": "c2pa.edited", "digitalSourceType": source, "softwareAgent": agent}
        actions = {"label": "c2pa.actions.v2", "data": {"actions": [edited]}}
        manifest = {"claim_generator_info": [agent], "title": title, "assertions": [actions]}
        kinds, result = c2pa.C2paDigitalSourceType, io.BytesIO()
        try:
            builder = c2pa.Builder(manifest, c2pa.Context(c2pa.Settings.from_dict(_SETTINGS)))
            if photo is not None and Path(photo).is_file():
                builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
                with Image.open(photo) as image, open(photo, "rb") as file:
                    parent = {"title": Path(photo).name, "relationship": "parentOf"}
                    builder.add_ingredient_from_stream(parent, image.get_format_mimetype(), file)
            else:
                made = (kinds.TRAINED_ALGORITHMIC_MEDIA, kinds.COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA)
                builder.set_intent(c2pa.C2paBuilderIntent.CREATE, made[photo is not None])
            info = c2pa.C2paSignerInfo(self.algorithm, self.cert, self.key, None)
            builder.sign(c2pa.Signer.from_info(info), f"image/{kind.lower()}", io.BytesIO(content), result)
        except c2pa.C2paError as error:
            raise OutputError(
                f"{title} can't be signed ({one_line(error)}); check the certificates"
            ) from None
        return result.getvalue()


def find_signer(cert: str | Path | None = None, key: str | Path | None = None) -> Signer | None:
    """Reads what signs edited files: from two files, or from the environment, as c2patool does.

    Args:
        cert: Path of the certificates in PEM, the signer's first; None takes `C2PA_SIGN_CERT`.
        key: Path of the private key in PEM; None takes `C2PA_PRIVATE_KEY`.

    Returns:
        The signer, or None if nothing is given.

    Raises:
        SettingError: Only one of them is given, one can't be read, they don't belong together, or c2pa-python isn't
            installed.
    """
    texts = [_text(cert, CERT), _text(key, KEY)]
    if not any(texts):
        return None
    if not all(texts):
        raise SettingError(
            "only a certificate or only a key is given; an edit is signed with both: sign_cert and sign_key, or "
            f"{CERT} and {KEY} in the environment"
        )
    try:
        import c2pa  # noqa: F401
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise SettingError(
            "an edit can't be signed without c2pa-python; pip install 'lora-unitune[c2pa]', or give no key"
        ) from None
    try:
        private = load_pem_private_key(texts[1], None)
    except (ValueError, TypeError) as error:
        raise SettingError(
            f"the key can't be read ({one_line(error)}); give one in PEM, without a password"
        ) from None
    name = type(private).__name__.lower()
    curve = getattr(getattr(private, "curve", None), "name", "")
    algorithm = _CURVES.get(curve, "ed25519" if "ed25519" in name else "ps256")
    signer, picture = Signer(texts[0], texts[1], algorithm), io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    try:
        signer.signed(picture.getvalue(), "JPEG", "a picture", None)
    except OutputError as error:
        raise SettingError(
            f"{error}; they have to be of the key, and made for signing, not for a server"
        ) from None
    return signer


def read_signature(path: str | Path) -> dict[str, Any] | None:
    """Returns who signed a picture and whether that is valid; None without a signature or without c2pa-python.

    Args:
        path: Path of the picture.
    """
    try:
        import c2pa
    except ImportError:
        return None
    try:
        context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
        with open(path, "rb") as file:
            store = json.loads(c2pa.Reader(None, file, context=context).json())
    except (c2pa.C2paError, OSError, ValueError):
        return None
    active = store["manifests"][store["active_manifest"]]
    actions = [each for part in active["assertions"] for each in part["data"].get("actions", ())]
    info = active.get("signature_info", {})
    return {
        "signed_by": info.get("common_name") or info.get("issuer"),
        "signature": str(store.get("validation_state", "unknown")).lower(),
        "actions": [each["action"] for each in actions],
        "source_types": sorted(
            {each["digitalSourceType"] for each in actions if "digitalSourceType" in each}
        ),
    }


def _text(path: str | Path | None, variable: str) -> bytes:
    """Returns the content of a file, or of an environment variable."""
    if path is None:
        return os.environ.get(variable, "").encode()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"{path} can't be read ({error.strerror}); give a file in PEM") from None
