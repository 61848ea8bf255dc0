"""The record of an edit: the image with every setting that it was made with, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_unitune.errors import OutputError, SettingError
from lora_unitune.output import write_atomically

if TYPE_CHECKING:
    from PIL import Image

ENTRY = "lora_unitune"
"""Name of the PNG's text entry with the settings; the EXIF software of other files."""

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""End of a picture's name -> its format."""

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
