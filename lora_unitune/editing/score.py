"""How close two pictures are."""

from __future__ import annotations

import numpy as np
from PIL import Image


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures of one size, in dB; 148 for equal ones.

    Raises:
        ValueError: the pictures differ in size or mode.
    """
    if first.size != second.size or first.mode != second.mode:
        raise ValueError(
            f"one picture is {first.size} {first.mode}, the other {second.size} {second.mode}; "
            "compare pictures of one size and mode"
        )
    a, b = (np.asarray(image, dtype=np.float64) for image in (first, second))
    return float(10 * np.log10(255**2 / max(float(np.mean((a - b) ** 2)), 1e-10)))
