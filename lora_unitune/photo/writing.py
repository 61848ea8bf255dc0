"""Image files of edits: what the photo's file said about it, and what was done to it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageCms, PngImagePlugin

from lora_unitune.errors import OutputError, SettingError
from lora_unitune.output import PICTURES, write_atomically
from lora_unitune.photo.reading import EXIF, GPS, Photo, exif_of

ENTRY = "lora_unitune"
"""Name of the PNG's text entry with the settings; the EXIF software of other files."""

_SOFTWARE, _COMMENT, _XMP = 0x0131, 0x9286, 700  # EXIF: Software, UserComment; TIFF: XMP
_ASCII = b"ASCII\0\0\0"
_LARGEST_EXIF = 65_000  # bytes that fit into a JPEG's segment
_SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{source}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def save_edit(
    image: Image.Image,
    path: str | Path,
    settings: Mapping[str, Any],
    photo: Photo | None = None,
    keep_gps: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes an edited image as the end of its name says, with the settings of the edit.

    The photo's EXIF block is kept, without its thumbnail and its position, and so is its color profile. XMP
    says by the IPTC's digital source type that the image is edited.

    Args:
        image: The image, RGB, in sRGB.
        path: Path of the file; its name ends as one of `output.PICTURES`.
        settings: Everything needed to repeat the edit.
        photo: The photo that was edited, whose own size the image has; None for an image of the base's size.
        keep_gps: Whether the position that the photo was taken at is kept.
        overwrite: Whether an existing file may be replaced.

    Raises:
        OutputError: The file already exists, its name ends otherwise, or it can't be written.
    """
    kind = PICTURES.get(Path(path).suffix.lower())
    if kind is None:
        raise OutputError(f"{path} isn't the name of a picture; let it end in {', '.join(PICTURES)}")
    text, exif = json.dumps(settings), exif_of(photo.exif if photo else b"")
    exif[_SOFTWARE] = ENTRY
    if not keep_gps:
        exif.get_ifd(GPS).clear()
        exif.pop(GPS, None)
    source = "trainedAlgorithmicMedia" if photo is None else "compositeWithTrainedAlgorithmicMedia"
    packet = _PACKET.format(source=_SOURCES + source).encode()
    options: dict[str, Any] = {"format": kind}
    image = image.copy()
    image.info.clear()  # Pillow would write what the photo's file had there
    if photo is not None and photo.profile:
        image, options["icc_profile"] = _in_profile(image, photo.profile)
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(ENTRY, text)
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", packet.decode())
    else:
        exif.get_ifd(EXIF)[_COMMENT] = _ASCII + text.encode()
        if len(exif.tobytes()) > _LARGEST_EXIF:
            raise OutputError(f"{path} can't hold settings of {len(text)} characters; write a PNG instead")
    if kind == "TIFF":
        exif[_XMP] = packet
    elif kind != "PNG":
        options |= {"quality": 95, "xmp": packet, **({"subsampling": 0} if kind == "JPEG" else {})}
    write_atomically(path, lambda temporary: image.save(temporary, exif=exif, **options), overwrite)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings stored in an edited image.

    Args:
        path: Path of a file that `Edit.save` wrote.

    Raises:
        SettingError: The file can't be read, or has no settings.
    """
    try:
        with Image.open(path, formats=sorted(set(PICTURES.values()))) as image:
            comment = image.getexif().get_ifd(EXIF).get(_COMMENT, b"")
            settings = json.loads(image.info[ENTRY] if ENTRY in image.info else comment[len(_ASCII) :])
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise SettingError(f"{path} has no settings of an edit in it; give a picture that lora-unitune wrote")
    return settings


def _in_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, bytes | None]:
    """Converts an sRGB image to a photo's RGB color profile; an image of another profile stays in sRGB."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if own.profile.xcolor_space.strip() == "RGB":
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, srgb, own, outputMode="RGB")
            return converted or image, profile
    return image, None
