"""The photo's own pixels and fine detail in an edit, at the base's size: pure functions on images.

Images are (b, 3, h, w) float32 in [0, 1]; the photo and its redraw have a batch of 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_unitune.photo.colors import apply_map, largest, local_map, mean

UNKNOWN = 0.54
"""Doubt, in units of x0, that marks a region as something that the base can't draw; measured on pocket."""
DOUBTED = 0.42
"""Doubt at the border of such a region."""
_EXCHANGED, _REST = 0.28, 0.35
"""Mean change of a color in such regions from which the edit puts something else there, and the largest share of it
that the rest of the picture changes by then; measured on pocket."""
_SOFTNESS = 0.04
_RADIUS = 4  # pixels
_SMOOTHING = 2e-3  # variance of a color below which a window counts as flat
_EDGES = 3e-3  # the same for the mask


def restore(photo: Tensor, redraw: Tensor, edit: Tensor, doubt: Tensor) -> Tensor:
    """Returns edits with the photo's own pixels, in the edit's light, where the base can't draw them.

    An edit that puts something else there keeps that. Elsewhere an edit gets the photo's fine detail wherever it
    keeps the photo's structure.

    Args:
        photo: The photo.
        redraw: What the base makes of the photo without an edit, such as its autoencoder's reconstruction.
        edit: Edits of it, (b, 3, h, w).
        doubt: How wrong the base is about each place of the photo, (1, 1, h', w'), of any size.

    Returns:
        The edits, (b, 3, h, w).
    """
    doubted = doubted_pixels(photo, doubt)
    relit = transfer_colors(photo, redraw, edit, doubted)
    other = doubted * are_exchanged(redraw, edit, doubted)
    detailed = torch.lerp(add_detail(photo, redraw, edit), edit, other)
    return torch.lerp(detailed, relit, doubted - other).clamp(0, 1)


def doubted_pixels(photo: Tensor, doubt: Tensor) -> Tensor:
    """Returns the part of each pixel, (1, 1, h, w) in [0, 1], that belongs to what the base can't draw.

    The doubt is smoothed and thresholded with hysteresis: a region above `DOUBTED` counts if it is above `UNKNOWN`
    somewhere. A guided filter fits the result to the photo's edges.
    """
    smooth = mean(doubt, 1)
    inside = (smooth > DOUBTED - 0.05).to(smooth)
    highest = smooth * inside
    while not torch.equal(spread := F.max_pool2d(highest, 3, 1, 1) * inside, highest):
        highest = spread
    smooth, highest = (_enlarged(plane, photo) for plane in (smooth, F.max_pool2d(highest, 3, 1, 1)))
    rough = torch.sigmoid((smooth - DOUBTED) / _SOFTNESS) * torch.sigmoid((highest - UNKNOWN) / _SOFTNESS)
    matrix, offset = local_map(photo, rough, _RADIUS, _EDGES)
    return (2 * (apply_map(matrix, offset, photo)).clamp(0, 1) - 0.5).clamp(0, 1)


def are_exchanged(redraw: Tensor, edit: Tensor, doubted: Tensor) -> Tensor:
    """Returns which edits put something else where the base can't draw the photo: they change it, and little else.

    If that is half of the picture or more, there is too little else to compare with, and none counts.

    Args:
        redraw: As for `restore`.
        edit: Edits, (b, 3, h, w).
        doubted: The regions, as `doubted_pixels` returns them.

    Returns:
        (b, 1, 1, 1) bool.
    """
    change = largest(edit - redraw)
    inside, rest = (
        (share * change).sum((2, 3), keepdim=True) / share.sum().clamp(min=1e-6)
        for share in (doubted, 1 - doubted)
    )
    exchanged: Tensor = (inside > _EXCHANGED) & (rest < _REST * inside) & (doubted.mean() < 0.5)
    return exchanged


def add_detail(photo: Tensor, redraw: Tensor, edit: Tensor) -> Tensor:
    """Returns edits with the fine detail that the redraw loses, where they keep its structure.

    In each window, the guided filter (He et al., "Guided Image Filtering", ECCV 2010) explains the edit as an affine
    map of the redraw's colors; its matrix applies to the detail too, and is 0 where the edit shows something else.
    """
    matrix, _ = local_map(redraw, edit, _RADIUS, _SMOOTHING)
    return edit + apply_map(matrix, 0, photo - redraw)


def transfer_colors(photo: Tensor, redraw: Tensor, edit: Tensor, weight: Tensor) -> Tensor:
    """Returns the photo in the edits' light.

    The affine map of colors that takes mean and covariance of the redraw's to the edit's, over the weighted pixels
    (Pitié and Kokaram, "The linear Monge-Kantorovitch linear colour mapping", CVMP 2007), applied to the photo: it
    needs no pixel of the edit to show the same as the photo's.

    Args:
        photo: The photo.
        redraw: As for `restore`.
        edit: Edits of it, (b, 3, h, w).
        weight: Weight of each pixel, (1, 1, h, w).

    Returns:
        (b, 3, h, w).
    """
    shares = (weight / weight.sum().clamp(min=1e-6)).flatten(2)

    def moments(image: Tensor) -> tuple[Tensor, Tensor]:
        colors = image.flatten(2)
        center = (shares * colors).sum(2, keepdim=True)
        return center, (shares * (colors - center)) @ (colors - center).mT

    (before, spread), (after, wanted) = moments(redraw), moments(edit)
    identity = torch.eye(3, device=edit.device)
    root = _root(spread + 1e-4 * identity)
    inverse = torch.linalg.inv(root)
    matrix = inverse @ _root(root @ (wanted + 1e-6 * identity) @ root) @ inverse
    relit: Tensor = matrix @ (photo.flatten(2) - before) + after
    return relit.reshape(edit.shape).clamp(0, 1)


def _root(matrix: Tensor) -> Tensor:
    """Returns the square root of symmetric positive matrices, (b, 3, 3)."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT
    return root


def _enlarged(plane: Tensor, photo: Tensor) -> Tensor:
    """Returns a plane, (1, 1, h', w'), at the photo's size."""
    return F.interpolate(plane, size=photo.shape[-2:], mode="bicubic", align_corners=False)
