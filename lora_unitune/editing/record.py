"""The record of an edit: the image with every setting that it was made with, and its file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_unitune import __version__
from lora_unitune.errors import OutputError, SettingError
from lora_unitune.output import PICTURES, write_atomically
from lora_unitune.settings import EditSettings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lora_unitune.adapter.adapter import Adapter
    from lora_unitune.families import Base

ENTRY = "lora_unitune"
"""Name of the PNG's text entry with the settings; the EXIF software of other files."""

_BEFORE = {"residual": False, "details": False, "least_change": 0.0}  # of edits older than these settings
_SOFTWARE, _EXIF_IFD, _COMMENT = 0x0131, 0x8769, 0x9286  # EXIF: Software, ExifIFD, UserComment
_ASCII = b"ASCII\0\0\0"
_LARGEST_EXIF = 65_000  # bytes that fit into a JPEG's segment


@dataclass(frozen=True)
class Edit:
    """An edited image with every setting that it was made with.

    Attributes:
        image: The image, RGB.
        prompt: The complete prompt, including rare tokens.
        settings: Everything needed to repeat the edit, as JSON-serializable values.
        seconds: Duration of the edit in seconds, without loading the base.
        notes: Notes for the user, one sentence each.
    """

    image: Image.Image
    prompt: str
    settings: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the image with the settings, which `read_settings` reads, as the end of its name says.

        A PNG is exact; JPEG and WebP are compressed at quality 95, and hold the settings as an EXIF comment.

        Args:
            path: Path of the file; its name ends in .png, .jpg, .jpeg or .webp.
            overwrite: Whether an existing file may be replaced.

        Raises:
            OutputError: The file already exists, its name ends otherwise, or it can't be written.
        """
        from PIL import Image, PngImagePlugin

        kind = PICTURES.get(Path(path).suffix.lower())
        if kind is None:
            raise OutputError(f"{path} isn't the name of a picture; let it end in {', '.join(PICTURES)}")
        text = json.dumps(self.settings)
        options: dict[str, Any] = {"format": kind, "quality": 95}
        if kind == "PNG":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_text(ENTRY, text)
        else:
            exif = Image.Exif()
            exif[_SOFTWARE] = ENTRY
            exif.get_ifd(_EXIF_IFD)[_COMMENT] = _ASCII + text.encode()
            if len(exif.tobytes()) > _LARGEST_EXIF:
                raise OutputError(
                    f"{path} can't hold settings of {len(text)} characters; write a PNG instead"
                )
            options |= {"exif": exif, **({"subsampling": 0} if kind == "JPEG" else {})}
        write_atomically(path, lambda temporary: self.image.save(temporary, **options), overwrite)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings stored in an edited image.

    Args:
        path: Path of a file that `Edit.save` wrote.

    Raises:
        SettingError: The file can't be read, or has no settings.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=sorted(set(PICTURES.values()))) as image:
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_COMMENT, b"")
            settings = json.loads(image.info[ENTRY] if ENTRY in image.info else comment[len(_ASCII) :])
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise SettingError(f"{path} has no settings of an edit in it; give a picture that lora-unitune wrote")
    return settings


def repeatable(
    settings: dict[str, Any], fingerprint: str, adapter: Adapter | None, has_photo: bool
) -> dict[str, Any]:
    """Returns the complete settings of an edit, after a check that it can be repeated.

    Args:
        settings: Settings of the edit.
        fingerprint: Fingerprint of the base at hand.
        adapter: The adapter at hand.
        has_photo: Whether a photo is given.

    Raises:
        SettingError: A setting is missing, or the edit was made with another base, adapter or photo.
    """
    names = [field.name for field in dataclasses.fields(EditSettings)]
    if settings.get("strength") == 1 and "details" not in settings:  # releases before 0.3
        settings = {**settings, "residual": False}
    settings = {**_BEFORE, **settings}
    needed = [*names, "prompt", "negative_prompt", "seed", "fingerprint", "adapter", "photo"]
    missing = [name for name in needed if name not in settings]
    if missing:
        raise SettingError(f"the settings lack {', '.join(missing)}; use the complete settings of an edit")
    ours = (fingerprint, adapter.digest if adapter else None)
    if (settings["fingerprint"], settings["adapter"]) != ours:
        raise SettingError("the edit was made with another base or adapter; repeat it with the same ones")
    if settings["photo"] == "given" and not has_photo:
        raise SettingError("the edit started from a photo that was given with it; give that photo again")
    return settings


def recorded(
    base: Base,
    adapter: Adapter | None,
    prompt: str,
    negative_prompt: str,
    origin: str | None,
    settings: EditSettings,
) -> dict[str, Any]:
    """Returns what is recorded of every edit of a run, as JSON-serializable values: all but its seed and size.

    Args:
        base: The base.
        adapter: The adapter; None for the plain base.
        prompt: The prompt without rare tokens.
        negative_prompt: The negative prompt.
        origin: Where the photo comes from that the edits start from, as in `Start`.
        settings: The sampling settings.
    """
    import diffusers
    import torch

    return {
        "lora_unitune": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "base": base.name,
        "fingerprint": base.fingerprint,
        "adapter": adapter.digest if adapter else None,
        "rare_tokens": (adapter.rare_tokens if adapter else None) or "",
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "photo": origin,
        **dataclasses.asdict(settings),
    }


def to_image(pixels: Tensor) -> Image.Image:
    """Converts (3, height, width) in [0, 1] to an image, with diffusers' rounding."""
    import torch
    from PIL import Image

    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to("cpu", torch.uint8).numpy())
