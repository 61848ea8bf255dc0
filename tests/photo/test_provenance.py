"""Signed edits: what a C2PA manifest says, that changed files aren't valid, and what can't sign."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import pytest
from command_line import refused, run
from PIL import Image

from lora_unitune.errors import SettingError
from lora_unitune.output import PICTURES
from lora_unitune.photo.provenance import CERT, KEY, find_signer, read_signature
from lora_unitune.photo.reading import load_photo
from lora_unitune.photo.writing import read_settings, save_edit

c2pa = pytest.importorskip("c2pa", reason="c2pa-python isn't installed (the extra `c2pa`)")

from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: E402

SETTINGS = {"prompt": "a fox", "seed": 3}
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda: rsa.generate_private_key(65_537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def certificates(folder: Path, algorithm: str = "es256") -> tuple[Path, Path]:
    """Writes a signer's certificates, issued by an authority of its own, and its key."""
    authority, key = KEYS["es256"](), KEYS[algorithm]()
    now = datetime.datetime.now(datetime.timezone.utc)

    def name(text: str) -> x509.Name:
        organization = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Test")
        return x509.Name([organization, x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def issued(subject: str, public: object, is_authority: bool) -> bytes:
        builder = x509.CertificateBuilder(
            name("Authority"), name(subject), public, x509.random_serial_number()
        )
        builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=2))
        usage = dict.fromkeys(
            "content_commitment key_encipherment data_encipherment key_agreement encipher_only "
            "decipher_only".split(),
            False,
        )
        signs = x509.KeyUsage(
            digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=False, **usage
        )
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), True).add_extension(
            signs, True
        )
        if not is_authority:
            purposes = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purposes, False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        builder = builder.add_extension(identifier, False)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain = issued("Someone", key.public_key(), False) + issued("Authority", authority.public_key(), True)
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(key.private_bytes(*encoding))
    return folder / "cert.pem", folder / "key.pem"


def photo_file(folder: Path) -> Path:
    Image.effect_noise((64, 48), 60).convert("RGB").save(folder / "photo.jpg")
    return folder / "photo.jpg"


@pytest.mark.parametrize("ending", PICTURES)
def test_each_type_is_signed_as_an_edit_of_the_photo(tmp_path: Path, ending: str) -> None:
    photo, path = load_photo(photo_file(tmp_path)), tmp_path / f"out{ending}"
    save_edit(photo.image, path, SETTINGS, photo, signer=find_signer(*certificates(tmp_path)))
    signature = read_signature(path)
    assert signature is not None and signature["signed_by"] == "Someone" and signature["signature"] == "valid"
    assert signature["actions"] == ["c2pa.opened", "c2pa.edited"] and signature["source_types"] == [COMPOSITE]
    assert read_settings(path) == SETTINGS and Image.open(path).size == (64, 48)
    store = json.loads(c2pa.Reader(path).json())
    (parent,) = store["manifests"][store["active_manifest"]]["ingredients"]
    assert parent["title"] == "photo.jpg" and parent["relationship"] == "parentOf"
    assert "thumbnail" not in json.dumps(store), "it would show the photo before the edit"


@pytest.mark.parametrize("algorithm", KEYS)
def test_the_key_says_the_algorithm(tmp_path: Path, algorithm: str) -> None:
    signer = find_signer(*certificates(tmp_path, algorithm))
    assert signer is not None and signer.algorithm == algorithm


@pytest.mark.parametrize("photo", ["as bytes", "none"])
def test_without_the_photos_file_the_edit_has_no_parent(tmp_path: Path, photo: str) -> None:
    read = load_photo(photo_file(tmp_path).read_bytes()) if photo == "as bytes" else None
    image = Image.new("RGB", (64, 48)) if read is None else read.image
    save_edit(image, tmp_path / "a.png", SETTINGS, read, signer=find_signer(*certificates(tmp_path)))
    signature = read_signature(tmp_path / "a.png")
    assert signature is not None and signature["signature"] == "valid"
    assert signature["actions"] == ["c2pa.created", "c2pa.edited"]
    assert len(signature["source_types"]) == 1
    assert (signature["source_types"] == [COMPOSITE]) == (photo == "as bytes")


def test_a_file_that_was_changed_after_is_not_valid(tmp_path: Path) -> None:
    photo, path = load_photo(photo_file(tmp_path)), tmp_path / "out.jpg"
    save_edit(photo.image, path, SETTINGS, photo, signer=find_signer(*certificates(tmp_path)))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    signature = read_signature(path)
    assert signature is not None and signature["signature"] == "invalid"


def test_the_environment_holds_what_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificates(tmp_path)
    monkeypatch.delenv(CERT, raising=False)
    monkeypatch.delenv(KEY, raising=False)
    assert find_signer() is None
    monkeypatch.setenv(CERT, cert.read_text())
    with pytest.raises(SettingError, match="only a certificate or only a key"):
        find_signer()
    monkeypatch.setenv(KEY, key.read_text())
    assert find_signer() == find_signer(cert, key)


def test_what_cannot_sign_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificates(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = certificates(tmp_path / "other")
    locked = tmp_path / "locked.pem"
    encryption = serialization.BestAvailableEncryption(b"secret")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(private.private_bytes(*encoding, encryption))
    for given, message in (
        ((cert, None), "only a certificate or only a key"),
        ((tmp_path / "none.pem", key), "can't be read"),
        ((cert, locked), "without a password"),
        ((cert, photo_file(tmp_path)), "the key can't be read"),
        ((key, key), "can't be signed"),
        ((other, key), "can't be signed"),
    ):
        with pytest.raises(SettingError, match=message) as caught:
            find_signer(*given)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "c2pa", None)  # as if it weren't installed
    with pytest.raises(SettingError, match=r"pip install 'lora-unitune\[c2pa\]'"):
        find_signer(cert, key)
    assert read_signature(tmp_path / "photo.jpg") is None


def test_the_command_signs_and_inspect_reads_it_back(edit: list[str | Path], tmp_path: Path) -> None:
    cert, key = certificates(tmp_path)
    options = ("--photo", photo_file(tmp_path), "--strength", "0.5", "-o", tmp_path / "out.jpg")
    line = refused(*edit, "a fox", *options, "--sign-cert", cert, folder=tmp_path)
    assert "--sign-cert and --sign-key" in line
    result = run(*edit, "a fox", *options, "--sign-cert", cert, "--sign-key", key)
    assert result.exit_code == 0, result.output
    shown = run("inspect", tmp_path / "out.jpg").stdout
    assert "signed by         Someone" in shown and "signature         valid" in shown
    assert json.loads(run("inspect", tmp_path / "out.jpg", "--json").stdout)["source_types"] == [COMPOSITE]
