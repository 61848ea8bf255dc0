"""Any image file or PIL image -> an upright RGB square at a base's resolution."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lora_unitune.errors import PhotoError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM")
SMALLEST_SIDE = 16  # pixels
LARGEST_ENLARGEMENT = 4

# What Pillow's decoders raise on damaged files.
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
    """A photo ready for a base.

    Attributes:
        image: Upright RGB square, at the base's resolution.
        source: The path it came from, or "PIL image".
        original_size: Upright (width, height) in pixels, before the crop.
        notes: What was done to it that its owner may want to know, one sentence each.
    """

    image: Image.Image
    source: str
    original_size: tuple[int, int]
    notes: tuple[str, ...]


def load_photo(source: str | Path | Image.Image, resolution: int) -> Photo:
    """Reads a photo, turns it upright, crops its centre square and resizes that.

    Args:
        source: Path of an image file, or a PIL image.
        resolution: Side of the square, in pixels.

    Returns:
        The photo, with a note for each thing that was left out or made up.

    Raises:
        PhotoError: It isn't there, isn't an image, is damaged, too large to decode safely, or far too small.
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
    square = _square(upright, resolution, name, notes)
    return Photo(image=square, source=name, original_size=upright.size, notes=tuple(notes))


def photo_to_tensor(photo: Photo) -> torch.Tensor:
    """Returns the photo's pixels: (1, 3, height, width) float32 in [-1, 1]."""
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
        if image.format != "MPO":  # a phone's JPEG with a preview inside
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
    """Brings 16- and 32-bit greys down to 8 bits; other images pass."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some pixels aren't numbers")
    if image.mode == "F":
        values = values * (255.0 if values.max() <= 1.0 else 1.0)
    elif image.mode.startswith("I;16") or values.max() > 255:
        values = values / 257.0
    notes.append(f"its deeper greys ({image.mode}) are rounded to 8 bits")
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


def _square(image: Image.Image, resolution: int, name: str, notes: list[str]) -> Image.Image:
    """Cuts out the centre square and resizes it, with notes; far too small images are an error."""
    width, height = image.size
    short = min(width, height)
    needed = max(SMALLEST_SIDE, -(-resolution // LARGEST_ENLARGEMENT))
    if short < needed:
        raise PhotoError(
            f"{name} is {width} x {height} pixels; the base works at {resolution} x {resolution} and needs "
            f"at least {needed} on the shorter side; give a larger photo"
        )
    if width != height:
        notes.append(f"its centre square is used, {short} of {max(width, height)} pixels of the longer side")
    if short < resolution:
        notes.append(f"it is enlarged from {short} to {resolution} pixels, so it will look soft")
    return ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS)
