"""An edit at the base's size -> the photo at its own size, edited: pure functions on images.

UniTune interpolates "relevant details from the base image after sampling" (arXiv 2210.09477). Here an edit is
explained as far as possible by the photo in another light, and only what that doesn't explain is enlarged.

Images at the base's size are (1, 3, h, w) float32 in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lora_unitune.photo.colors import apply_map, largest, local_map, mean, whole_map
from lora_unitune.photo.framing import Box

Kind = Literal["nothing", "local", "relit", "both", "restyled"]

_MOVED, _RELIT = (
    0.06,
    0.15,
)  # a change of color above the base's own error; the part of a picture with such in relit ones
_SEED, _REST = 0.16, 0.08  # unexplained change with which a replaced region begins, and with which it goes on
_KEPT = 0.03  # a change up to which a place of a relit picture is the photo's
_WIDE, _NARROW = 10, 2  # radius of windows in pixels
_RESTYLED = 0.6
_LARGEST = 128  # pixels of a side
_STRIP = 2**20  # pixels


@dataclass(frozen=True)
class Changes:
    """What an edit changes in a photo, at the base's size or smaller.

    Attributes:
        kind: "nothing"; "local", something was put in or taken out; "relit", other light or colors; "both"; or
            "restyled", such as a sketch, which keeps no detail of the photo.
        replaced: The part of each pixel that shows something else, (1, 1, h, w) in [0, 1].
        matrix: The map of colors elsewhere, (1, 3, 3, h, w).
        offset: What it adds, (1, 3, h, w).
        edit: The edit without the base's error in the colors of the background, (1, 3, h, w).
    """

    kind: Kind
    replaced: Tensor
    matrix: Tensor
    offset: Tensor
    edit: Tensor


def find_changes(photo: Tensor, edit: Tensor) -> Changes:
    """Splits an edit into a map of the photo's colors and regions that show something else.

    Args:
        photo: The photo at the base's size.
        edit: The edit without the base's errors in the photo, as `details.restore` or `details.add_detail` return it.

    Returns:
        The changes; all but the edit at a size of at most `_LARGEST` pixels, at which the thresholds were chosen.
    """
    full, step = (photo, edit), -(-max(photo.shape[-2:]) // _LARGEST)
    size = [max(1, side // step) for side in photo.shape[-2:]]
    photo, edit = (F.interpolate(image, size, mode="area") for image in full)
    tone, shift = whole_map(photo, edit, 0.04, 1e-2)
    toned, toned_full = (
        torch.einsum("ij,bjhw->bihw", tone, image) + shift[None, :, None, None] for image in (photo, full[0])
    )
    error = unexplained = largest(edit - toned)
    for _ in range(3):
        weight = 1 / (1 + (unexplained / _REST) ** 2)
        relit = apply_map(*local_map(photo, edit, _WIDE, 1e-2, weight, tone), photo)
        unexplained = largest(edit - relit)
    moved = (largest(relit - photo) > _MOVED) & (unexplained < _REST)
    is_relit = float(moved.float().mean()) > _RELIT
    same = mean(largest(edit - photo), 1)
    error = torch.minimum(unexplained, same) if is_relit else error
    replaced = F.max_pool2d(_filled(_regions(mean(error, 1))), 3, 1, 1)
    identity, none = torch.eye(3, device=photo.device)[None, :, :, None, None], torch.zeros_like(photo)
    if is_relit:
        target, weight = torch.lerp(edit, toned, replaced), (1 - replaced).clamp(min=0.02)
        matrix, offset = local_map(photo, target, _NARROW, 1e-3, weight, tone)
        kept = mean((same < _KEPT).float(), 1)
        matrix, offset = torch.lerp(matrix, identity, kept[:, None]), torch.lerp(offset, none, kept)
    else:
        full = full[0], (full[1] - (toned_full - full[0])).clamp(0, 1)
        matrix, offset = identity.repeat(1, 1, 1, *photo.shape[-2:]), none
    kind: Kind = (
        ("both" if replaced.any() else "relit") if is_relit else "local" if replaced.any() else "nothing"
    )
    if float(replaced.mean()) > _RESTYLED:
        kind = "restyled"
    return Changes(kind, replaced, matrix, offset, full[1])


def compose(photo: NDArray[np.uint8], changes: Changes, box: Box) -> NDArray[np.uint8]:
    """Returns the photo with an edit's changes, at its own size.

    Args:
        photo: The photo, (height, width, 3) uint8.
        changes: What the edit changes.
        box: The part of the photo that the base saw; a change of light goes on beyond it.

    Returns:
        (height, width, 3) uint8, with the photo's own values where the edit changes nothing.
    """
    (left, top, right, bottom), (height, width) = box, photo.shape[:2]
    edit = Image.fromarray(_bytes(changes.edit))
    enlarged = np.asarray(edit.resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    columns = np.arange(width)
    seen = (columns - left).clip(0, right - left - 1)
    planes = torch.cat([changes.replaced, changes.matrix.flatten(1, 2), changes.offset], 1)
    planes = _lines(planes, -1, columns, left, right)
    out, step = np.empty_like(photo), max(1, _STRIP // width)
    for first in range(0, height, step):
        rows = np.arange(first, min(height, first + step))
        replaced, matrix, offset = _lines(planes, -2, rows, top, bottom).split([1, 9, 3], 1)
        other = enlarged[(rows - top).clip(0, bottom - top - 1)][:, seen]
        strip = Changes(changes.kind, replaced, matrix.unflatten(1, (3, 3)), offset, _pixels(other))
        out[rows] = _bytes(apply_changes(_pixels(photo[rows]), strip))
    return out


def apply_changes(photo: Tensor, changes: Changes) -> Tensor:
    """Returns a photo of the edit's size with its changes, (1, 3, h, w)."""
    if changes.kind == "restyled":
        return changes.edit
    planes = torch.cat([changes.replaced, changes.matrix.flatten(1, 2), changes.offset], 1)
    if planes.shape[-2:] != photo.shape[-2:]:
        planes = F.interpolate(planes, photo.shape[-2:], mode="bilinear", align_corners=False)
    replaced, matrix, offset = planes.split([1, 9, 3], 1)
    relit = apply_map(matrix.unflatten(1, (3, 3)), offset, photo).clamp(0, 1)
    return torch.lerp(relit, changes.edit, replaced)


def _lines(planes: Tensor, axis: int, pixels: NDArray[np.int64], start: int, end: int) -> Tensor:
    """Interpolates planes along an axis, at pixels of the photo of which they span those from start to end."""
    count = planes.shape[axis]
    places = ((torch.from_numpy(pixels) + 0.5 - start) * (count / (end - start)) - 0.5).clamp(0, count - 1)
    below = places.floor().long().clamp(max=max(0, count - 2))
    share = (places - below).float().reshape(-1, *[1] * (-1 - axis))
    above = (below + 1).clamp(max=count - 1)
    return torch.lerp(planes.index_select(axis, below), planes.index_select(axis, above), share)


def _regions(error: Tensor) -> Tensor:
    """Returns the regions of an error above one threshold that rise above another somewhere, 0 or 1."""
    inside = (error > _REST).float()
    found = (error > _SEED).float()
    while not torch.equal(more := F.max_pool2d(found, 3, 1, 1) * inside, found):
        found = more
    return found


def _filled(regions: Tensor) -> Tensor:
    """Returns regions without holes: those that no path along the rest connects to the picture's border."""
    rest = 1 - regions
    outside = rest - F.pad(rest[..., 1:-1, 1:-1], (1, 1, 1, 1))
    while not torch.equal(more := torch.minimum(F.max_pool2d(outside, 3, 1, 1), rest), outside):
        outside = more
    return 1 - outside


def _bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """(1, 3, h, w) in [0, 1] -> (h, w, 3) uint8."""
    values: NDArray[np.uint8] = (pixels[0].permute(1, 2, 0) * 255).round().to("cpu", torch.uint8).numpy()
    return values


def _pixels(values: NDArray[np.uint8]) -> Tensor:
    """(h, w, 3) uint8 -> (1, 3, h, w) in [0, 1]."""
    return torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255
