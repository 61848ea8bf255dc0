"""Opening of image files: by Pillow, or by an optional library where Pillow can't."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from lora_unitune.errors import PhotoError, one_line
from lora_unitune.photo.depth import Depth, sixteen_bits

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")

PhotoSource = str | Path | bytes | BinaryIO | Image.Image
"""A photo: the path of an image file, its content, an open file, or a PIL image."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""Exceptions of the decoders on damaged files."""

_LARGEST = 1.4
"""A file may have this many times the pixels at which Pillow warns: 125 million, for cameras of 100."""
_LARGEST_JPEG = 4
"""A JPEG may have this many times the pixels of other files, since it is read at a reduced size."""
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_image(source: PhotoSource, notes: list[str]) -> tuple[str, Image.Image, Image.Image | None]:
    """Opens a photo, if possible without decoding it.

    Args:
        source: The photo; an open file is read from its current position.
        notes: Notes for the user, to which those on a reduced size or depth are appended.

    Returns:
        The photo's name in messages, the image, and, for colors of 16 bits, of which the image has the high byte,
        an image of their low byte.

    Raises:
        PhotoError: There is no such file, or it isn't an image.
    """
    if isinstance(source, Image.Image):
        return "PIL image", source, None
    name, content = _content(source)
    content = _without_damaged_chunks(content, notes)
    Image.init()
    formats = [each for each in FORMATS if each in Image.OPEN]
    try:
        try:
            image = Image.open(content, formats=formats)
            if image.width * image.height > _most():
                raise Image.DecompressionBombError
            tags = dict(getattr(image, "tag_v2", {}))
            if tags.get(284) == 2 and tags.get(258, (8,))[0] > 8:  # planes, which Pillow takes for 8 bits
                return name, *_tiff(name, _rewound(content), notes)
            return name, image, _low_bytes(image, content)
        except Image.DecompressionBombError:
            return name, _reduced(name, content, notes), None
        except UnidentifiedImageError:
            opened = _by_another_library(name, content, notes)
            if opened is not None:
                return name, *opened
    except PermissionError:
        raise PhotoError(f"{name} may not be read; check its permissions") from None
    kinds = ", ".join(each for each in formats if each != "MPO")
    raise PhotoError(f"{name} isn't an image that can be read; give one of {kinds}")


def _low_bytes(image: Image.Image, content: Path | BinaryIO) -> Image.Image | None:
    """Opens an image of 16-bit colors again: told that the bytes are in the other order, Pillow keeps the low one."""
    other = {"16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"}
    tiles = []
    for tile in getattr(image, "tile", ()) if image.mode in ("RGB", "RGBA") else ():
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        mode, _, order = str(arguments[0]).partition(";")
        if mode != image.mode or order not in other:
            return None
        changed = f"{mode};{other[order]}", *arguments[1:]
        tiles.append(tile._replace(args=changed if isinstance(tile.args, tuple) else changed[0]))
    if not tiles:
        return None
    if not isinstance(content, Path):
        content.seek(0)
        content = io.BytesIO(content.read())
    low: Any = Image.open(content)
    low.tile = tiles
    opened: Image.Image = low
    return opened


def _content(source: Any) -> tuple[str, Path | BinaryIO]:
    """Returns a photo's name in messages, and what Pillow opens: a path or a stream."""
    if hasattr(source, "read"):
        name, source = str(getattr(source, "name", "the open file")), source.read()
        if not isinstance(source, bytes):
            raise PhotoError(f"{name} is open as text; open it with open(path, 'rb')")
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = "the photo given as bytes"
    elif isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "doesn't exist"
            raise PhotoError(f"{path} {problem}; give the path of an image file")
        return str(source), path
    else:
        raise PhotoError(
            f"photo = {one_line(repr(source), 60)} isn't a photo; give the path of an image file, its "
            "bytes, an open file, or a PIL image"
        )
    return name, io.BytesIO(source)


def _without_damaged_chunks(content: Path | BinaryIO, notes: list[str]) -> Path | BinaryIO:
    """Drops what a PNG says beside its pixels where its checksum is wrong, since Pillow refuses the whole file."""
    damaged = []
    try:
        with content.open("rb") if isinstance(content, Path) else contextlib.nullcontext(content) as file:
            is_png = file.read(8) == b"\x89PNG\r\n\x1a\n"
            while is_png and len(header := file.read(8)) == 8:
                start, (length, kind) = file.tell() - 8, struct.unpack(">I4s", header)
                if kind[0] & 32:  # in lower case: not needed for the pixels
                    checked = kind + file.read(length)
                    if file.read(4) != struct.pack(">I", zlib.crc32(checked)):
                        damaged.append((start, file.tell()))
                else:
                    file.seek(length + 4, io.SEEK_CUR)
    except PermissionError:
        return content  # which opening it names
    content = _rewound(content)
    if not damaged:
        return content
    notes.append("some of what it says beside its pixels is damaged, and dropped")
    whole = content.read_bytes() if isinstance(content, Path) else content.read()
    for start, end in reversed(damaged):
        whole = whole[:start] + whole[end:]
    return io.BytesIO(whole)


def _reduced(name: str, content: Path | BinaryIO, notes: list[str]) -> Image.Image:
    """Opens a JPEG with too many pixels at a half, a quarter or an eighth of its size; refuses other files."""
    most = _most()
    with contextlib.suppress(SyntaxError):
        image = JpegImageFile(_rewound(content))
        pixels = image.width * image.height
        if pixels <= _LARGEST_JPEG * most:
            whole, factor = image.size, 2
            while pixels > most * factor**2:
                factor *= 2
            image.draft(image.mode, (whole[0] // factor, whole[1] // factor))
            if image.width * image.height <= most:
                notes.append(
                    f"it is read at {image.width} x {image.height} of its {whole[0]} x {whole[1]} pixels"
                )
                return image
    raise PhotoError(
        f"{name} has more than {most // 1_000_000} million pixels; make it smaller first, or save it as a JPEG, "
        f"of which up to {_LARGEST_JPEG * most // 1_000_000} million are read at a reduced size"
    )


def _by_another_library(
    name: str, content: Path | BinaryIO, notes: list[str]
) -> tuple[Image.Image, Image.Image | None] | None:
    """Opens a file that Pillow doesn't know, if it is a HEIC photo or a TIFF; None for other files."""
    stream = _rewound(content)
    with stream.open("rb") if isinstance(stream, Path) else contextlib.nullcontext(stream) as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:] in _HEIF_BRANDS:
        return _heic(name, _rewound(content)), None
    return _tiff(name, _rewound(content), notes) if start[:4] in _TIFF_STARTS else None


def _heic(name: str, content: Path | BinaryIO) -> Image.Image:
    """Opens a HEIC photo with pillow-heif."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise PhotoError(
            f"{name} is a HEIC photo; save it as a JPEG, or pip install 'lora-unitune[photos]' to read such photos"
        ) from None
    register_heif_opener()
    try:
        return Image.open(content, formats=["HEIF"])
    except Image.DecompressionBombError:
        return _reduced(name, content, [])


def _tiff(name: str, content: Path | BinaryIO, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Reads a TIFF whose depth Pillow doesn't know, such as RGB in floats, with tifffile: high and low bytes."""
    way_out = "save it as a TIFF or PNG of 8 or 16 bits"
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it would print becomes one error
    try:
        import tifffile
    except ImportError:
        raise PhotoError(
            f"{name} is a TIFF of an unusual depth or damaged; {way_out}, or pip install 'lora-unitune[photos]'"
        ) from None
    try:
        with tifffile.TiffFile(content) as file:
            page: Any = file.pages[0]
            tags = {tag.code: tag.value for tag in page.tags}
            if page.imagewidth * page.imagelength > _most():
                raise Image.DecompressionBombError
            if page.axes not in ("YX", "YXS", "SYX") or tags.get(262, 1) not in (0, 1, 2):
                raise ValueError(
                    f"its photometric interpretation is {tags.get(262)}, its axes are {page.axes}"
                )
            values = page.asarray()
            values = np.moveaxis(values, 0, -1) if page.axes == "SYX" else values
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[1 if values.ndim == 2 else values.shape[2]]
        deep = sixteen_bits(values, Depth.of(values.dtype, tags), notes)
    except Image.DecompressionBombError:
        return _reduced(name, content, notes), None
    except (*DECODING_ERRORS, tifffile.TiffFileError) as error:
        raise PhotoError(
            f"{name} is damaged or a TIFF that can't be read ({one_line(error)}); {way_out}"
        ) from None
    image, low = (Image.fromarray(half.astype(np.uint8), mode) for half in (deep >> 8, deep & 255))
    image.info["icc_profile"] = tags.get(34675)
    image.getexif()[274] = int(tags.get(274, 1))
    return image, low


def _most() -> int:
    """Returns the largest number of pixels of a file that is decoded."""
    return int(_LARGEST * (Image.MAX_IMAGE_PIXELS or 0))


def _rewound(content: Path | BinaryIO) -> Path | BinaryIO:
    if not isinstance(content, Path):
        content.seek(0)
    return content
