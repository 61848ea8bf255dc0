"""Affine maps of colors between images: of a whole picture, and of the window around each pixel.

Images are (b, c, h, w) float32; a map is a matrix, (b, c, 3, h, w), and an offset, (b, c, h, w). A map of a whole
picture has height and width 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """Converts (3, h, w) in [0, 1] to (h, w, 3) uint8, with diffusers' rounding."""
    return to_levels(pixels, np.dtype(np.uint8))


def to_levels(pixels: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Converts (3, h, w) in [0, 1] to (h, w, 3) of a type of whole numbers, whose largest is white."""
    levels = (pixels.permute(1, 2, 0) * float(np.iinfo(dtype).max)).round()
    values: NDArray[Any] = levels.cpu().numpy().astype(dtype)
    return values


def mean(image: Tensor, radius: int) -> Tensor:
    """Returns the mean over the window around each pixel, (b, c, h, w)."""
    padded, side = F.pad(image, (radius,) * 4, mode="replicate"), 2 * radius + 1
    return F.avg_pool2d(F.avg_pool2d(padded, (side, 1), stride=1), (1, side), stride=1)


def largest(image: Tensor) -> Tensor:
    """Returns the largest absolute value of a pixel's channels, (b, 1, h, w)."""
    return image.abs().amax(1, keepdim=True)


def local_map(
    guide: Tensor,
    image: Tensor,
    radius: int,
    ridge: float,
    weight: Tensor | None = None,
    prior: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fits image = matrix guide + offset in each window (He et al., "Guided Image Filtering", ECCV 2010).

    Args:
        guide: (1, 3, h, w).
        image: (b, c, h, w).
        radius: Radius of the windows in pixels.
        ridge: Added to the variances of the guide's colors: a window of less variance takes the prior.
        weight: Weight of each pixel, (1, 1, h, w).
        prior: The matrix of a window without variance, (1, c, 3, 1, 1); 0 if it is None.

    Returns:
        The matrices, (b, c, 3, h, w), and the offsets, (b, c, h, w), each the mean of the windows around a pixel.
    """
    (count, channels, height, width) = image.shape

    def average(values: Tensor) -> Tensor:
        if weight is None:
            return mean(values, radius)
        return mean(values * weight, radius) / mean(weight, radius)

    if prior is not None:
        image = image - apply_map(prior, 0, guide)
    guide_mean, image_mean = average(guide), average(image)
    products = torch.einsum("zihw,zjhw->zijhw", guide, guide).flatten(1, 2)
    variance = average(products).unflatten(1, (3, 3)) - guide_mean[:, :, None] * guide_mean[:, None]
    products = (guide[:, None] * image[:, :, None]).flatten(1, 2)
    covariance = average(products).unflatten(1, (channels, 3)) - guide_mean[:, None] * image_mean[:, :, None]
    variance = variance.permute(0, 3, 4, 1, 2) + ridge * torch.eye(3, device=guide.device)
    matrix = torch.linalg.solve(variance, covariance.permute(0, 3, 4, 2, 1)).permute(0, 4, 3, 1, 2)
    offset = image_mean - apply_map(matrix, 0, guide_mean)
    if prior is not None:
        matrix = matrix + prior
    smooth = mean(matrix.flatten(1, 2), radius).reshape(count, channels, 3, height, width)
    return smooth, mean(offset, radius)


def whole_map(guide: Tensor, image: Tensor, scale: float, ridge: float) -> tuple[Tensor, Tensor]:
    """Fits image = matrix guide + offset to a whole picture, whatever most of it isn't explained by.

    Iteratively reweighted least squares with the Cauchy weights 1 / (1 + (error / scale)^2); the ridge draws the
    matrix to the identity.

    Args:
        guide: (1, 3, h, w).
        image: (1, 3, h, w).
        scale: Error of a pixel that has half the weight.
        ridge: Added to the variances of the guide's colors.

    Returns:
        The matrix, (1, 3, 3, 1, 1), and the offset, (1, 3, 1, 1).
    """
    before, after = guide[0].flatten(1), image[0].flatten(1)
    identity, weight = torch.eye(3, device=guide.device), torch.ones_like(before[0])
    for _ in range(8):
        share = weight / weight.sum()
        before_mean, after_mean = ((share * each).sum(1, keepdim=True) for each in (before, after))
        centered = before - before_mean
        variance, covariance = (share * centered) @ centered.T, (share * (after - after_mean)) @ centered.T
        matrix = identity + torch.linalg.solve(variance + ridge * identity, (covariance - variance).T).T
        offset = after_mean - matrix @ before_mean
        error = (after - matrix @ before - offset).abs().amax(0)
        weight = 1 / (1 + (error / scale) ** 2)
    return matrix[None, :, :, None, None], offset[None, :, :, None]


def apply_map(matrix: Tensor, offset: Tensor | float, image: Tensor) -> Tensor:
    """Returns matrix (b, c, 3, h, w) times image (1, 3, h, w) plus offset at each pixel, (b, c, h, w)."""
    return (matrix * image[:, None]).sum(2) + offset
