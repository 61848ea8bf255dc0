"""Images of the pocket world as arrays and tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import Scene, render


def renders(drawn: list[Scene]) -> np.ndarray:
    """Renders scenes, (n, 64, 64, 3) uint8."""
    return np.stack([np.asarray(render(scene)) for scene in drawn])


def to_pixels(pictures: np.ndarray, device: str) -> Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    )
