"""Pixel values of more than 8 bits -> 16 bits: which value is black and which is white."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_WHITES = (255, 65_535, 2**31 - 1, 2**32 - 1)
_STRIP = 2**20  # pixels
_SHARE = 0.1  # percent of the pixels at either end that don't count when a range is guessed


@dataclass(frozen=True)
class Depth:
    """What a file says about its pixel values.

    Attributes:
        kind: Their type in messages, such as "32-bit floats".
        black: Value of black, if it is known.
        white: Value of white, if it is known; below `black` in a negative.
        bits: Bits of each value.
        is_whole: Whether the values are whole numbers.
        is_negative: Whether the lowest value is white.
    """

    kind: str
    black: float = 0.0
    white: float | None = None
    bits: int = 16
    is_whole: bool = True
    is_negative: bool = False

    @classmethod
    def of(cls, dtype: Any, tags: Mapping[int, Any], bits: int | None = None) -> Depth:
        """Returns the depth of pixels: by the tags of a TIFF, or by a type of up to 16 bits.

        Args:
            dtype: The numpy type of the pixels.
            tags: The values of the file's TIFF tags, by number; empty for other files.
            bits: Bits of each value, if there are fewer than in `dtype`.
        """
        dtype = np.dtype(dtype)
        is_whole = dtype.kind in "iu"
        bits = bits or 8 * dtype.itemsize
        kind = f"{bits}-bit {'whole numbers' if is_whole else 'floats'}"
        low, high = (_number(tags.get(code)) for code in (340, 341))  # SMinSampleValue, SMaxSampleValue
        if high is None and is_whole and bits <= 16:
            low, high = 0.0, 2.0 ** (bits - (dtype.kind == "i")) - 1
        return cls(kind, low or 0.0, high, bits, is_whole, is_negative=tags.get(262) == 0)


def depth_of(image: Image.Image, low: Image.Image | None) -> tuple[NDArray[Any], Depth] | None:
    """Returns values and depth of an image of more than 8 bits, or None for others.

    Args:
        image: The image.
        low: The low byte of each value, if the image has the high one.
    """
    if low is not None:
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(low), Depth.of(np.uint16, {})
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    values, tags = np.asarray(image), dict(getattr(image, "tag_v2", {}))
    if not tags:
        return values, Depth.of(
            np.uint16 if image.format in ("PNG", "PPM") and image.mode == "I" else values.dtype, {}
        )
    bits, is_signed = tags.get(258, (32,))[0], tags.get(339, (1,))[0] == 2
    if image.mode == "F":
        return values, Depth.of(values.dtype, tags)
    whole = np.dtype(f"{'i' if is_signed else 'u'}{2 if bits <= 16 else 4}")
    return values.astype(whole), Depth.of(whole, tags, bits)


def sixteen_bits(values: NDArray[Any], depth: Depth, notes: list[str]) -> NDArray[np.uint16]:
    """Returns pixel values in 16 bits, with a note if they have more.

    A range that the file doesn't say is guessed from the values, and the guess is noted.

    Args:
        values: The pixels, of any shape.
        depth: What the file says about them.
        notes: Notes for the user, to which those on the range are appended.

    Raises:
        ValueError: Some values aren't finite.
    """
    black, white, guess = depth.black, depth.white, ""
    if values.dtype == np.uint16 and (black, white, depth.is_negative) == (0, _WHITES[1], False):
        return values
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some pixels aren't numbers")
    if white is None:
        black, white = _guessed(values, depth.is_whole)
        if depth.is_whole or (black, white) != (0, 1) or values.min() < 0 or values.max() > 1:
            guess = (
                f"; the file doesn't say which value is white, and they run from {values.min():g} to "
                f"{values.max():g}, so {black:g} is taken as black and {white:g} as white"
            )
    if depth.is_negative:
        black, white = white, black
    if guess or depth.bits > 16 or not depth.is_whole:
        notes.append(f"its values ({depth.kind}) are rounded to 16 bits{guess}")
    return ((values - black) * (65_535 / (white - black))).clip(0, 65_535).round().astype(np.uint16)


def eight_bits(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Returns 16-bit values, (height, width, ...), rounded to 8 bits."""
    out = np.empty(values.shape, np.uint8)
    for rows in strips(*values.shape[:2]):
        out[rows] = (values[rows].astype(np.uint32) + 128) // 257
    return out


def strips(height: int, width: int) -> list[slice]:
    """Returns the rows of each strip of an image, so that what is computed of one needs little memory."""
    step = max(1, _STRIP // max(1, width))
    return [slice(first, min(height, first + step)) for first in range(0, height, step)]


def _guessed(values: NDArray[np.float64], is_whole: bool) -> tuple[float, float]:
    """Returns a guess of black and white: a usual range that the values fill, or the one that they have."""
    low, high = (float(end) for end in np.percentile(values, (_SHARE, 100 - _SHARE)))
    if is_whole and high <= _WHITES[0]:
        white = 255.0
    elif not is_whole and high <= 1:
        white = 1.0
    else:
        white = next((float(each) for each in _WHITES if each / 2 < high <= each), high)
    return (low if low < -0.05 * white else 0.0), white


def _number(tag: Any) -> float | None:
    """Returns the value of a TIFF tag that holds a number, or one for each channel."""
    tag = tag[0] if isinstance(tag, tuple) and tag else tag
    return float(tag) if isinstance(tag, (int, float)) else None
