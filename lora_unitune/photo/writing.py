"""Image files of edits: what the photo's file said about it, and what was done to it."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from lora_unitune.errors import OutputError, SettingError
from lora_unitune.output import PICTURES, write_atomically
from lora_unitune.photo.depth import eight_bits, strips
from lora_unitune.photo.profiles import DeepProfile, in_profile
from lora_unitune.photo.provenance import COMPOSITE, GENERATED, SOURCES, Signer
from lora_unitune.photo.reading import EXIF, GPS, Photo, exif_of

ENTRY = "lora_unitune"
"""Name of the PNG's text entry with the settings; the EXIF software of other files."""

Picture = Image.Image | NDArray[np.uint16]
"""An image in sRGB: RGB, or (height, width, 3) uint16."""

_SOFTWARE, _COMMENT, _MAKER_NOTE = 0x0131, 0x9286, 0x927C  # EXIF: Software, UserComment, MakerNote
_XMP, _PROFILE = 700, 34_675  # TIFF
_ASCII = b"ASCII\0\0\0"
_LARGEST_EXIF = 65_000  # bytes that fit into a JPEG's segment
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{source}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def save_edit(
    image: Picture,
    path: str | Path,
    settings: Mapping[str, Any],
    photo: Photo | None = None,
    keep_gps: bool = False,
    overwrite: bool = False,
    signer: Signer | None = None,
) -> tuple[str, ...]:
    """Writes an edited image as the end of its name says, with the settings of the edit.

    The photo's EXIF block is kept, without its thumbnail and its position, and so are its color profile and, where
    the image is the photo's, its own values in that. XMP says by the IPTC's digital source type that the image is
    edited.

    Args:
        image: The image.
        path: Path of the file; its name ends as one of `output.PICTURES`.
        settings: Everything needed to repeat the edit.
        photo: The photo that was edited, whose own size the image has; None for an image of the base's size.
        keep_gps: Whether the position that the photo was taken at is kept.
        overwrite: Whether an existing file may be replaced.
        signer: What signs the file, from `find_signer`; None leaves it unsigned.

    Returns:
        Notes for the user on what the file doesn't hold.

    Raises:
        OutputError: The file already exists, its name ends otherwise, or it can't be written.
    """
    kind = PICTURES.get(Path(path).suffix.lower())
    if kind is None:
        raise OutputError(f"{path} isn't the name of a picture; let it end in {', '.join(PICTURES)}")
    exif, notes = exif_of(photo.exif if photo else b""), list[str]()
    exif[_SOFTWARE] = ENTRY
    if not keep_gps:
        exif.get_ifd(GPS).clear()
        exif.pop(GPS, None)
    packet = _PACKET.format(source=SOURCES + (GENERATED if photo is None else COMPOSITE)).encode()
    if isinstance(image, np.ndarray) and kind not in ("PNG", "TIFF"):
        image = Image.fromarray(eight_bits(image))
        notes.append(f"{path} has 8 bits for each value; a .png or .tif has the photo's 16")
    options: dict[str, Any] = {"exif": exif}
    if photo is not None and photo.profile:
        image, options["icc_profile"] = _in_profile(image, photo), photo.profile
    elif not isinstance(image, np.ndarray) and image.info:
        image = image.copy()
        image.info.clear()  # Pillow would write what the photo's file had there
    text = json.dumps(settings)
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(ENTRY, text)
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", packet.decode())
    else:
        exif.get_ifd(EXIF)[_COMMENT] = _ASCII + text.encode()
        notes += _made_smaller(exif, path, len(text))
    if kind == "TIFF":
        exif[EXIF], exif[_XMP] = exif.get_ifd(EXIF), packet  # Pillow writes only blocks that are entries
    elif kind != "PNG":
        quality = photo.jpeg if kind == "JPEG" and photo and photo.jpeg else {"quality": 95}
        options |= {"xmp": packet, **({"subsampling": 0} if kind == "JPEG" else {}), **quality}

    def write(temporary: Path) -> None:
        if isinstance(image, np.ndarray):
            (_write_deep_png if kind == "PNG" else _write_deep_tiff)(temporary, image, **options)
        else:
            stream = io.BytesIO()  # Pillow itself may leave off the end on a full disk, without an error
            image.save(stream, format=kind, **options)
            temporary.write_bytes(stream.getbuffer())
        if signer is not None:
            of = None if photo is None else photo.source
            temporary.write_bytes(signer.signed(temporary.read_bytes(), kind, Path(path).name, of))

    write_atomically(path, write, overwrite)
    return tuple(notes)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings stored in an edited image.

    Args:
        path: Path of a file that `Edit.save` wrote.

    Raises:
        SettingError: The file can't be read, or has no settings.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=sorted(set(PICTURES.values()))) as image:
            warnings.simplefilter("ignore")
            comment = image.getexif().get_ifd(EXIF).get(_COMMENT, b"")
            settings = json.loads(image.info[ENTRY] if ENTRY in image.info else comment[len(_ASCII) :])
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise SettingError(f"{path} has no settings of an edit in it; give a picture that lora-unitune wrote")
    return settings


def _made_smaller(exif: Image.Exif, path: str | Path, count: int) -> list[str]:
    """Removes what doesn't fit into an EXIF block, with a note; the settings of `count` characters stay."""
    notes = []
    if len(exif.tobytes()) > _LARGEST_EXIF:
        exif.get_ifd(EXIF).pop(_MAKER_NOTE, None)
        notes.append(
            "the camera's own EXIF entries don't fit into the file beside the settings, and are dropped"
        )
    if len(exif.tobytes()) > _LARGEST_EXIF:
        raise OutputError(f"{path} can't hold settings of {count} characters; write a PNG instead")
    return notes


def _in_profile(image: Picture, photo: Photo) -> Picture:
    """Converts an edited photo from sRGB to the photo's color profile, with its own values where it is the same."""
    profile, own = photo.profile or b"", photo.own
    is_deep = isinstance(image, np.ndarray)
    out = np.empty((photo.image.height, photo.image.width, 3), np.uint16 if is_deep else np.uint8)
    before = photo.deep if is_deep and photo.deep is not None else photo.image
    deep = DeepProfile(profile) if is_deep else None
    for rows in strips(*out.shape[:2]):
        edited = _rows(image, rows)
        if deep is not None:
            out[rows] = deep.from_srgb(edited)
        else:
            out[rows] = np.asarray(in_profile(Image.fromarray(edited), profile))
        if own is not None and own.dtype == out.dtype:
            same = (edited == _rows(before, rows)).all(-1, keepdims=True)
            np.copyto(out[rows], own[rows], where=same)
    return out if is_deep else Image.fromarray(out)


def _rows(image: Picture, rows: slice) -> NDArray[Any]:
    """Returns some rows of an image, (height, width, 3)."""
    if isinstance(image, np.ndarray):
        return image[rows]
    return np.asarray(image.crop((0, rows.start, image.width, rows.stop)))


def _write_deep_png(path: Path, values: NDArray[np.uint16], **options: Any) -> None:
    """Writes a PNG of 16 bits, which Pillow can't hold, with the other chunks of one that it writes."""
    small, packer = io.BytesIO(), zlib.compressobj()
    Image.new("RGB", (1, 1)).save(small, "PNG", **options)
    content = small.getvalue()
    with path.open("wb") as file:
        file.write(content[:8])
        at = 8
        while at < len(content):
            (length,), kind = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
            data, at = content[at + 8 : at + 8 + length], at + 12 + length
            if kind == b"IHDR":
                data = struct.pack(">IIB", values.shape[1], values.shape[0], 16) + data[9:]
            if kind == b"IDAT":
                above = np.zeros((1, 6 * values.shape[1]), np.uint8)
                for rows in strips(*values.shape[:2]):
                    lines = np.vstack(
                        [above, values[rows].astype(">u2").view(np.uint8).reshape(-1, above.size)]
                    )
                    up = np.full((len(lines) - 1, 1), 2, np.uint8)  # the filter: less the line above
                    _write_chunk(
                        file, kind, packer.compress(np.hstack([up, lines[1:] - lines[:-1]]).tobytes())
                    )
                    above = lines[-1:]
                data = packer.flush()
            _write_chunk(file, kind, data)


def _write_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _write_deep_tiff(
    path: Path, values: NDArray[np.uint16], exif: Image.Exif, icc_profile: bytes | None = None
) -> None:
    """Writes a TIFF of 16 bits, which Pillow can't hold: its entries, and then its pixels."""
    height, width = values.shape[:2]
    exif.update({256: width, 257: height, 258: (16, 16, 16), 259: 1, 262: 2, 277: 3})
    exif.update({273: 0, 278: height, 279: values.nbytes})  # one strip, 0 bytes after the entries
    if icc_profile:
        exif[_PROFILE] = icc_profile
    entries = exif.tobytes()[len(b"Exif\0\0") :]
    with path.open("wb") as file:
        file.write(entries)
        for rows in strips(*values.shape[:2]):
            file.write(values[rows].astype("<u2" if entries.startswith(b"II") else ">u2").tobytes())
