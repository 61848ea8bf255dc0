"""Reading of image files and PIL images as upright sRGB."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from lora_unitune.errors import PhotoError, one_line
from lora_unitune.photo.depth import depth_of, eight_bits, sixteen_bits
from lora_unitune.photo.opening import DECODING_ERRORS, PhotoSource, open_image
from lora_unitune.photo.profiles import PROFILE_ERRORS, DeepProfile, in_profile, in_srgb, is_rgb

if TYPE_CHECKING:
    from torch import Tensor

_ORIENTATION = 0x0112  # EXIF tag
EXIF, GPS = 0x8769, 0x8825
"""EXIF tags of the blocks within the block: of the camera, and of the position."""
_KEPT = {
    *(0x010E, 0x010F, 0x0110),  # description, make, model
    *(0x011A, 0x011B, 0x0128),  # resolution and its unit
    *(0x0131, 0x0132, 0x013B, 0x013C),  # software, date, artist, computer
    *(0x4746, 0x4749, 0x8298),  # ratings, copyright
    *range(0x9C9B, 0x9CA0),  # title, comment, author, keywords and subject of Windows
}
"""EXIF tags that describe a photo; the others of its first block say how its own file holds the pixels."""
_DROPPED = (0xA002, 0xA003, 0xA005)  # width and height, before the photo was turned; a place in the file
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright."""
_WHITE = 65_535
_DAMAGED_EXIF = "its EXIF block is damaged; what can't be read of it is dropped"


@dataclass(frozen=True)
class Photo:
    """A photo, upright and in sRGB.

    Attributes:
        image: The pixels, RGB, at the original size or resized by `frame`.
        source: Path of its file, or what it is called in messages.
        notes: Notes for the user on what was changed, one sentence each.
        exif: EXIF block of its file, upright and without a thumbnail; empty if there is none.
        profile: Color profile of its file, if that is of RGB.
        own: Its pixels in that profile, upright: (height, width, 3) uint8 or uint16; None without a profile.
        deep: Its pixels in 16 bits, in sRGB: (height, width, 3) uint16; None if its file has 8.
        jpeg: The quality of its file, as Pillow's options, if that is a JPEG.
        reduction: What a side of its file is divided by: 1, or more for a JPEG that is read at a reduced size.
    """

    image: Image.Image
    source: str
    notes: tuple[str, ...] = ()
    exif: bytes = b""
    profile: bytes | None = None
    own: NDArray[Any] | None = field(default=None, repr=False, compare=False)
    deep: NDArray[np.uint16] | None = field(default=None, repr=False, compare=False)
    jpeg: Mapping[str, Any] | None = None
    reduction: int = 1

    @property
    def size_of_file(self) -> tuple[int, int]:
        """(width, height) in pixels of its file, upright."""
        return self.image.width * self.reduction, self.image.height * self.reduction

    @property
    def pixels(self) -> NDArray[Any]:
        """The pixels in sRGB at their depth: (height, width, 3) uint8 or uint16."""
        return np.asarray(self.image) if self.deep is None else self.deep

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of a SHA-256 of its size and pixels, by which an adapter recognizes its photo."""
        digest = hashlib.sha256(f"{self.image.width}x{self.image.height}".encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()[:32]


def load_photo(source: PhotoSource, background: int = 255) -> Photo:
    """Reads a photo, upright and in sRGB.

    Args:
        source: Path of an image file, its bytes, an open file, or a PIL image.
        background: What transparent parts become: 255 for white, or 0 for black.

    Returns:
        The photo at its own size, with a note for each change. A JPEG that is too large to decode safely is read at
        a reduced size.

    Raises:
        PhotoError: The file doesn't exist, isn't an image, is damaged, or is too large to decode safely.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the photo"
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            name, image, low = open_image(source, notes)
            jpeg = _jpeg_quality(image)
            is_reduced = image is not source and getattr(image, "decoderconfig", None)  # by `open_image`
            reduction = image.decoderconfig[0] if is_reduced else 1  # type: ignore[attr-defined]
            photo, exif = _upright(image, low, background, notes), _kept_exif(image, notes)
        except PhotoError:
            raise
        except MemoryError:
            raise PhotoError(f"{name} doesn't fit into memory; make it smaller first") from None
        except DECODING_ERRORS as error:
            raise PhotoError(f"{name} is damaged or incomplete ({one_line(error)}); get it again") from None
    if any(Path(each.filename).stem == "TiffImagePlugin" for each in warned):  # which reads EXIF too
        notes.append(_DAMAGED_EXIF)
    own_notes = tuple(dict.fromkeys(notes))
    return replace(photo, source=name, notes=own_notes, exif=exif, jpeg=jpeg, reduction=reduction)


def exif_of(block: bytes) -> Image.Exif:
    """Returns the entries of an EXIF block; none for an empty one."""
    exif = Image.Exif()
    if block:
        exif.load(block)
    return exif


def _jpeg_quality(image: Image.Image) -> dict[str, Any] | None:
    """Returns the quantization and subsampling of a JPEG of three channels, for the image turned upright."""
    if not isinstance(image, JpegImageFile) or image.mode != "RGB":
        return None
    tables, sampling = image.quantization, get_sampling(image)
    if _turn(image, []) in [_TURNS[turn] for turn in range(5, 9)]:  # its columns become rows
        tables = {each: [table[8 * (i % 8) + i // 8] for i in range(64)] for each, table in tables.items()}
        sampling = 0 if sampling == 1 else sampling  # Pillow halves no rows alone
    return {"qtables": tables, "subsampling": max(0, sampling)}


def _kept_exif(image: Image.Image, notes: list[str]) -> bytes:
    """Returns what an image's EXIF block says of the photo, as that of an upright image; empty for nothing."""
    kept = Image.Exif()
    try:
        exif = image.getexif()
        kept.update({tag: value for tag, value in exif.items() if tag in _KEPT})
        for block in (EXIF, GPS):
            entries = {tag: value for tag, value in exif.get_ifd(block).items() if tag not in _DROPPED}
            kept.get_ifd(block).update(entries)
        return kept.tobytes() if kept or any(kept.get_ifd(block) for block in (EXIF, GPS)) else b""
    except DECODING_ERRORS:
        notes.append(_DAMAGED_EXIF)
        return b""


def photo_to_tensor(photo: Photo) -> Tensor:
    """Returns the photo's pixels: (1, 3, height, width) float32 in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.array(photo.image.convert("RGB"), dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).unsqueeze(0).contiguous()


def _upright(image: Image.Image, low: Image.Image | None, background: int, notes: list[str]) -> Photo:
    """Decodes the first frame and returns it upright, in sRGB, on a background of white or black."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(0)
        if image.format not in ("MPO", "HEIF"):  # a phone's photo with an embedded preview
            notes.append(f"the first of {frames} frames is used")
    image.load()
    values, profile, turn = depth_of(image, low), _checked_profile(image, notes), _turn(image, notes)
    if values is not None:
        deep = _opaque(sixteen_bits(*values, notes), background, notes)
        return _deep(deep if turn is None else _turned(deep, turn), profile, notes)
    upright = image if turn is None else image.transpose(turn)
    alpha = None
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        alpha = layered.getchannel("A")
        upright = upright.convert("L") if upright.mode == "LA" else layered.convert("RGB")
        if np.asarray(alpha).min() == 255:
            alpha = None
        else:
            notes.append(_transparent(background))
    return _shallow(upright, alpha, background, profile)


def _shallow(image: Image.Image, alpha: Image.Image | None, background: int, profile: bytes | None) -> Photo:
    """Returns the photo of an image of 8 bits."""

    def laid(layer: Image.Image) -> Image.Image:
        below = Image.new("RGB", layer.size, (background,) * 3)
        return layer if alpha is None else Image.composite(layer, below, alpha)

    srgb = laid(in_srgb(image, profile))
    if not is_rgb(profile) or image.mode in ("CMYK", "LAB"):
        return Photo(srgb, "")
    return Photo(srgb, "", profile=profile, own=np.asarray(laid(image.convert("RGB"))))


def _deep(values: NDArray[np.uint16], profile: bytes | None, notes: list[str]) -> Photo:
    """Returns the photo of 16-bit pixels, (height, width, 1) or (height, width, 3)."""
    own = values.repeat(3, -1) if values.shape[2] == 1 else values
    if profile is None or (values.shape[2] == 3 and not is_rgb(profile)):
        return Photo(Image.fromarray(eight_bits(own)), "", deep=own)
    try:
        deep = DeepProfile(profile).to_srgb(own)
    except ValueError as error:
        notes.append(
            f"its values are rounded to 8 bits: its color profile can't be used at 16, since {error}"
        )
        small = Image.fromarray(eight_bits(own))
        return _shallow(small if is_rgb(profile) else small.convert("L"), None, 255, profile)
    photo = Photo(Image.fromarray(eight_bits(deep)), "", deep=deep)
    return replace(photo, profile=profile, own=own) if is_rgb(profile) else photo


def _opaque(values: NDArray[np.uint16], background: int, notes: list[str]) -> NDArray[np.uint16]:
    """Lays 16-bit pixels on a background, if they have an alpha channel: (height, width, 1) or (height, width, 3)."""
    values = np.atleast_3d(values)
    if values.shape[2] in (1, 3):
        return values
    values, alpha = values[..., :-1], values[..., -1:]
    if alpha.min() == _WHITE:
        return values
    notes.append(_transparent(background))
    share, below = alpha / np.float32(_WHITE), np.float32(257 * background)
    laid: NDArray[np.uint16] = (below + (values - below) * share).round().astype(np.uint16)
    return laid


def _transparent(background: int) -> str:
    return f"its transparent parts become {'white' if background else 'black'}"


def _turned(values: NDArray[np.uint16], turn: Image.Transpose) -> NDArray[np.uint16]:
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(values, -1, 0)]
    return np.stack([np.asarray(channel.transpose(turn)) for channel in channels], -1)


def _turn(image: Image.Image, notes: list[str]) -> Image.Transpose | None:
    """Returns what turns a decoded image upright; None for nothing."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except DECODING_ERRORS:
        notes.append(_DAMAGED_EXIF)
        return None


def _checked_profile(image: Image.Image, notes: list[str]) -> bytes | None:
    """Returns the color profile of an image, if it has one that can be used."""
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    mode = "RGB" if is_rgb(profile) else "L"
    try:
        in_srgb(Image.new(image.mode if image.mode in ("CMYK", "LAB") else mode, (1, 1)), profile)
        if is_rgb(profile):
            in_profile(Image.new("RGB", (1, 1)), profile)
    except PROFILE_ERRORS:
        notes.append("its color profile is damaged, and dropped")
        return None
    return bytes(profile)
