"""Similarity of two images."""

from __future__ import annotations

import numpy as np
from PIL import Image


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Returns the peak signal-to-noise ratio of two 8-bit images of equal size, in dB; 148 if they are identical.

    Raises:
        ValueError: The images differ in size or mode.
    """
    if first.size != second.size or first.mode != second.mode:
        raise ValueError(
            f"one image is {first.size} {first.mode}, the other {second.size} {second.mode}; "
            "compare images of one size and mode"
        )
    a, b = (np.asarray(image, dtype=np.float64) for image in (first, second))
    return float(10 * np.log10(255**2 / max(float(np.mean((a - b) ** 2)), 1e-10)))
