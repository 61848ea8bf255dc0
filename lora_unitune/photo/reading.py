"""Reading of image files and PIL images as upright sRGB."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lora_unitune.errors import PhotoError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")

# Exceptions of Pillow's decoders on damaged files.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Photo:
    """A photo, upright and in sRGB.

    Attributes:
        image: The pixels, RGB, at the original size or resized by `frame`.
        source: Path of its file, or "PIL image".
        notes: Notes for the user on what was changed, one sentence each.
    """

    image: Image.Image
    source: str
    notes: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of a SHA-256 of its size and pixels, by which an adapter recognizes its photo."""
        digest = hashlib.sha256(f"{self.image.width}x{self.image.height}".encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()[:32]


def load_photo(source: str | Path | Image.Image) -> Photo:
    """Reads a photo, upright and in sRGB.

    Args:
        source: Path of an image file, or a PIL image.

    Returns:
        The photo at its own size, with a note for each change.

    Raises:
        PhotoError: The file doesn't exist, isn't an image, is damaged, or is too large to decode safely.
    """
    name = "PIL image" if isinstance(source, Image.Image) else str(source)
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = source if isinstance(source, Image.Image) else _open(Path(source))
            upright = _upright_rgb(image, notes)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
            raise PhotoError(f"{name} has more than {limit} million pixels; make it smaller first") from None
        except MemoryError:
            raise PhotoError(f"{name} doesn't fit into memory; make it smaller first") from None
        except _DECODING_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PhotoError(f"{name} is damaged or incomplete ({reason}); get it again") from None
    return Photo(upright, name, tuple(notes))


def photo_to_tensor(photo: Photo) -> Tensor:
    """Returns the photo's pixels: (1, 3, height, width) float32 in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.array(photo.image.convert("RGB"), dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).unsqueeze(0).contiguous()


def _open(path: Path) -> Image.Image:
    """Opens an image file without decoding it."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "doesn't exist"
        raise PhotoError(f"{path} {problem}; give the path of an image file")
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError:
        kinds = ", ".join(name for name in formats if name != "MPO")
        raise PhotoError(f"{path} isn't an image that can be read; give one of {kinds}") from None
    except PermissionError:
        raise PhotoError(f"{path} may not be read; check its permissions") from None


def _upright_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Decodes the first frame and returns it upright, in sRGB, on white."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(0)
        if image.format != "MPO":  # a phone's JPEG with an embedded preview
            notes.append(f"the first of {frames} frames is used")
    image.load()
    profile = image.info.get("icc_profile")
    upright = _without_depth(ImageOps.exif_transpose(image), notes)
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
        if np.asarray(layered)[..., 3].min() < 255:
            notes.append("transparent parts are shown on white")
    return _in_srgb(upright, profile)


def _without_depth(image: Image.Image, notes: list[str]) -> Image.Image:
    """Converts 16- and 32-bit grayscale images to 8 bits; returns others unchanged."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some pixels aren't numbers")
    if image.mode == "F":
        values = values * (255.0 if values.max() <= 1.0 else 1.0)
    elif image.mode.startswith("I;16") or values.max() > 255:
        values = values / 257.0
    notes.append(f"its grayscale values ({image.mode}) are rounded to 8 bits")
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts to RGB, through the embedded colour profile where there is a usable one."""
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            embedded, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, embedded, srgb, outputMode="RGB")
            return image.convert("RGB") if converted is None else converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a broken profile: the plain conversion shows what other programs would show
    return image.convert("RGB")
