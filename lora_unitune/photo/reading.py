"""Reading of image files and PIL images as upright sRGB."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from lora_unitune.errors import PhotoError, one_line
from lora_unitune.photo.depth import depth_of, rounded
from lora_unitune.photo.opening import DECODING_ERRORS, PhotoSource, open_image

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
_SIDES = (0xA002, 0xA003)  # width and height, before the photo was turned


@dataclass(frozen=True)
class Photo:
    """A photo, upright and in sRGB.

    Attributes:
        image: The pixels, RGB, at the original size or resized by `frame`.
        source: Path of its file, or what it is called in messages.
        notes: Notes for the user on what was changed, one sentence each.
        exif: EXIF block of its file, upright and without a thumbnail; empty if there is none.
        profile: Color profile of its file.
    """

    image: Image.Image
    source: str
    notes: tuple[str, ...] = ()
    exif: bytes = b""
    profile: bytes | None = None

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of a SHA-256 of its size and pixels, by which an adapter recognizes its photo."""
        digest = hashlib.sha256(f"{self.image.width}x{self.image.height}".encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()[:32]


def load_photo(source: PhotoSource) -> Photo:
    """Reads a photo, upright and in sRGB.

    Args:
        source: Path of an image file, its bytes, an open file, or a PIL image.

    Returns:
        The photo at its own size, with a note for each change. A JPEG that is too large to decode safely is read at
        a reduced size.

    Raises:
        PhotoError: The file doesn't exist, isn't an image, is damaged, or is too large to decode safely.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the photo"
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            name, image = open_image(source, notes)
            profile = image.info.get("icc_profile")
            upright, exif = _upright_rgb(image, notes), _kept_exif(image, notes)
        except PhotoError:
            raise
        except MemoryError:
            raise PhotoError(f"{name} doesn't fit into memory; make it smaller first") from None
        except DECODING_ERRORS as error:
            raise PhotoError(f"{name} is damaged or incomplete ({one_line(error)}); get it again") from None
    return Photo(upright, name, tuple(notes), exif, profile)


def exif_of(block: bytes) -> Image.Exif:
    """Returns the entries of an EXIF block; none for an empty one."""
    exif = Image.Exif()
    if block:
        exif.load(block)
    return exif


def _kept_exif(image: Image.Image, notes: list[str]) -> bytes:
    """Returns what an image's EXIF block says of the photo, as that of an upright image; empty for nothing."""
    kept = Image.Exif()
    try:
        exif = image.getexif()
        kept.update({tag: value for tag, value in exif.items() if tag in _KEPT})
        for block in (EXIF, GPS):
            entries = {tag: value for tag, value in exif.get_ifd(block).items() if tag not in _SIDES}
            kept.get_ifd(block).update(entries)
        return kept.tobytes() if kept or any(kept.get_ifd(block) for block in (EXIF, GPS)) else b""
    except DECODING_ERRORS:
        notes.append("its EXIF block is damaged, and dropped")
        return b""


def photo_to_tensor(photo: Photo) -> Tensor:
    """Returns the photo's pixels: (1, 3, height, width) float32 in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.array(photo.image.convert("RGB"), dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).unsqueeze(0).contiguous()


def _upright_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Decodes the first frame and returns it upright, in sRGB, on white."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(0)
        if image.format not in ("MPO", "HEIF"):  # a phone's photo with an embedded preview
            notes.append(f"the first of {frames} frames is used")
    image.load()
    profile, deep = image.info.get("icc_profile"), depth_of(image)
    if deep is not None:
        grays = rounded(*deep, notes)
        turned = Image.fromarray(_deep_in_srgb(grays, profile))
        turned.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
        return ImageOps.exif_transpose(turned)
    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return _in_srgb(upright, profile)
    layered = upright.convert("RGBA")
    alpha = layered.getchannel("A")
    colors = _in_srgb(upright.convert("L") if upright.mode == "LA" else layered.convert("RGB"), profile)
    if np.asarray(alpha).min() < 255:
        notes.append("transparent parts are shown on white")
    return Image.composite(colors, Image.new("RGB", colors.size, "white"), alpha)


def _deep_in_srgb(grays: NDArray[np.float64], profile: bytes | None) -> NDArray[np.uint8]:
    """Returns gray values from 0 to 255, not rounded yet, as (height, width, 3) in sRGB."""
    ramp = np.asarray(_in_srgb(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), profile))[0]
    channels = [np.interp(grays, np.arange(256), channel) for channel in ramp.T]
    return np.stack(channels, -1).round().astype(np.uint8)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts to RGB, through the embedded colour profile where there is a usable one."""
    if image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        if image.mode == "LAB":
            return _transformed(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
        if profile:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            is_gray = embedded.profile.xcolor_space.strip() == "GRAY"
            return _transformed(
                image.convert("RGB") if image.mode == "L" and not is_gray else image, embedded
            )
    return image.convert("RGB")  # without a usable profile: what other programs would show


def _transformed(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Converts from a colour profile to sRGB."""
    srgb = ImageCms.createProfile("sRGB")
    # the optimized table darkens dark grays
    exact = ImageCms.Flags.NOOPTIMIZE if image.mode == "L" else ImageCms.Flags.NONE
    converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB", flags=exact)
    return image.convert("RGB") if converted is None else converted
