"""An edit at the base's size -> the photo at its own size, edited: pure functions on images.

UniTune interpolates "relevant details from the base image after sampling" (arXiv 2210.09477). Here an edit is
explained as far as possible by the photo in another light, and only what that doesn't explain is enlarged.

Images at the base's size are (1, 3, h, w) float32 in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lora_unitune.photo.colors import apply_map, largest, local_map, mean, to_bytes, to_levels, whole_map
from lora_unitune.photo.framing import Box

Kind = Literal["nothing", "local", "relit", "both", "restyled"]

_MOVED = 0.06  # a change of color above the base's own error
_RELIT = 0.15  # the part of a picture with such changes from which it is relit
_SEED, _REST = 0.16, 0.08  # unexplained change with which a replaced region begins, and with which it goes on
_KEPT = 0.03  # a change up to which a place of a relit picture is the photo's
_WEAK = 0.4  # the part of the largest change in a picture up to which another is the base's error
_WIDE, _NARROW = 10, 2  # radius of windows in pixels
_RESTYLED = 0.5  # kept part of the detail below which a picture is restyled
_STYLED = 0.7  # the same, if the prompt asks for a style
_MOST = 0.6  # replaced part of a picture from which it is
_SAME = 0.05  # unexplained part of an edit's detail up to which it is the photo's
_LOST = 0.4  # from which it isn't
_INSIDE = 0.4  # kept part of the detail of changed regions from which only their light changes
_NOISE = 0.01  # standard deviation of detail that doesn't count
_LARGEST = 128  # pixels of a side
_STRIP = 2**20  # pixels


@dataclass(frozen=True)
class Changes:
    """What an edit changes in a photo, at the base's size or smaller.

    Attributes:
        kind: "nothing"; "local", something was put in or taken out, or a part has other colors; "relit", other light
            or colors of much of the photo; "both"; or "restyled", such as a sketch, which keeps little of the photo's
            fine detail, or nothing of it.
        replaced: The part of each pixel that shows something else, (1, 1, h, w) in [0, 1].
        matrix: The map of colors elsewhere, (1, 3, 3, h, w).
        offset: What it adds, (1, 3, h, w).
        edit: The edit without the base's error in the colors of the background, which goes on into replaced regions,
            (1, 3, h, w).
    """

    kind: Kind
    replaced: Tensor
    matrix: Tensor
    offset: Tensor
    edit: Tensor


def find_changes(photo: Tensor, edit: Tensor, styled: bool = False) -> Changes:
    """Splits an edit into a map of the photo's colors and regions that show something else.

    Args:
        photo: The photo at the base's size.
        edit: The edit without the base's errors in the photo, as `details.restore` or `details.add_detail` return it.
        styled: Whether its prompt asks for another style: less lost detail then makes it "restyled".

    Returns:
        The changes; all but the edit at a size of at most `_LARGEST` pixels, at which the thresholds were chosen.
    """
    before, after = _reduced(photo), _reduced(edit)
    tone = whole_map(before, after, 0.04, 1e-2)
    toned = apply_map(*tone, before)
    error = largest(after - toned)
    relit, unexplained = _relit(before, after, tone[0], error)
    moved = (largest(relit - before) > _MOVED) & (unexplained < _REST)
    is_relit = float(moved.float().mean()) > _RELIT
    same = mean(largest(after - before), 1)
    correction = torch.zeros_like(before) if is_relit else before - toned
    replaced = _replaced(torch.minimum(unexplained, same)) if is_relit else _replaced(error, _WEAK)
    is_other = float(replaced.mean()) > _MOST
    inside, lost = _detail(before, after, 1 - replaced)
    keeps = inside > _INSIDE and not is_other  # as in a shadow, or on a thing of another color
    light = 1 - mean((same < _KEPT).float(), 1) if is_relit else replaced * keeps
    replaced = replaced * (lost > 0) if keeps else replaced
    changed = bool(light.any() or replaced.any())
    kept, lost = _detail(before, after, replaced, nothing=1.0)
    is_restyled = is_other or kept < (_STYLED if styled else _RESTYLED)
    if is_restyled:
        replaced = torch.ones_like(lost) if is_other else torch.maximum(replaced, lost)
        light = torch.ones_like(lost)
    target = torch.lerp(after, toned, replaced) + correction
    matrix, offset = _light(before, target, replaced, tone[0], light)
    if not is_restyled:
        correction = correction + _membrane(apply_map(matrix, offset, before) - after - correction, replaced)
        edit = (edit + F.interpolate(correction, edit.shape[-2:], mode="bilinear")).clamp(0, 1)
    kind = _kind(is_restyled, is_relit, bool(replaced.any()), changed)
    return Changes(kind, replaced, matrix, offset, edit)


def _kind(is_restyled: bool, is_relit: bool, has_regions: bool, changed: bool) -> Kind:
    if is_restyled:
        return "restyled"
    if is_relit:
        return "both" if has_regions else "relit"
    return "local" if changed else "nothing"


def _light(
    before: Tensor, target: Tensor, replaced: Tensor, prior: Tensor, light: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns a map of colors of narrow windows, outside of replaced regions, as far as there is other light."""
    lit = local_map(before, target, _NARROW, 1e-3, (1 - replaced).clamp(min=0.02), prior)
    identity = torch.eye(3, device=before.device)[None, :, :, None, None]
    return torch.lerp(identity.expand_as(lit[0]), lit[0], light[:, None]), lit[1] * light


def compose(
    photo: NDArray[Any], changes: Changes, box: Box, mask: NDArray[np.uint8] | None = None
) -> NDArray[Any]:
    """Returns the photo with an edit's changes, at its own size.

    Args:
        photo: The photo, (height, width, 3) uint8 or uint16.
        changes: What the edit changes.
        box: The part of the photo that the base saw; a change of light goes on beyond it.
        mask: How far each pixel may change, (height, width); None lets all of them.

    Returns:
        (height, width, 3) of the photo's type, with its own values where the edit changes nothing.
    """
    if changes.kind == "nothing":
        return photo.copy()
    (left, top, right, bottom), (height, width) = box, photo.shape[:2]
    edit = Image.fromarray(to_bytes(changes.edit[0]))
    enlarged = np.asarray(edit.resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    columns = np.arange(width)
    seen = (columns - left).clip(0, right - left - 1)
    planes = _lines(_planes(changes), -1, columns, left, right)
    out, step = np.empty_like(photo), max(1, _STRIP // width)
    for first in range(0, height, step):
        rows = np.arange(first, min(height, first + step))
        other = enlarged[(rows - top).clip(0, bottom - top - 1)][:, seen]
        own = _pixels(photo[rows])
        mixed = _mixed(own, _pixels(other), _lines(planes, -2, rows, top, bottom))
        if mask is not None:
            mixed = torch.lerp(own, mixed, torch.from_numpy(mask[rows]) / 255)
        out[rows] = to_levels(mixed[0], photo.dtype)
    return out


def apply_changes(photo: Tensor, changes: Changes) -> Tensor:
    """Returns a photo of the edit's size with its changes, (1, 3, h, w)."""
    planes = _planes(changes)
    if planes.shape[-2:] != photo.shape[-2:]:
        planes = F.interpolate(planes, photo.shape[-2:], mode="bilinear", align_corners=False)
    return _mixed(photo, changes.edit, planes)


def _planes(changes: Changes) -> Tensor:
    """Returns where the edit is shown, and the map of colors elsewhere, as one image (1, 13, h, w)."""
    return torch.cat([changes.replaced, changes.matrix.flatten(1, 2), changes.offset], 1)


def _mixed(photo: Tensor, edit: Tensor, planes: Tensor) -> Tensor:
    """Returns a photo with an edit's changes, all of one size."""
    replaced, matrix, offset = planes.split([1, 9, 3], 1)
    replaced = (2 * replaced - 1).clamp(min=0)
    relit = apply_map(matrix.unflatten(1, (3, 3)), offset, photo).clamp(0, 1)
    return torch.lerp(relit, edit, replaced)


def _reduced(image: Tensor) -> Tensor:
    """Returns an image whose sides are divided by a whole number so that none is above `_LARGEST` pixels."""
    step = -(-max(image.shape[-2:]) // _LARGEST)
    return F.interpolate(image, [max(1, side // step) for side in image.shape[-2:]], mode="area")


def _lines(planes: Tensor, axis: int, pixels: NDArray[np.int64], start: int, end: int) -> Tensor:
    """Interpolates planes along an axis, at pixels of the photo of which they span those from start to end."""
    count = planes.shape[axis]
    places = ((torch.from_numpy(pixels) + 0.5 - start) * (count / (end - start)) - 0.5).clamp(0, count - 1)
    below = places.floor().long().clamp(max=max(0, count - 2))
    share = (places - below).float().reshape(-1, *[1] * (-1 - axis))
    above = (below + 1).clamp(max=count - 1)
    return torch.lerp(planes.index_select(axis, below), planes.index_select(axis, above), share)


def _relit(before: Tensor, after: Tensor, prior: Tensor, unexplained: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a photo in an edit's light, of wide windows, and what of the edit it doesn't explain."""
    for _ in range(3):
        weight = 1 / (1 + (unexplained / _REST) ** 2)
        relit = apply_map(*local_map(before, after, _WIDE, 1e-2, weight, prior), before)
        unexplained = largest(after - relit)
    return relit, unexplained


def _detail(before: Tensor, after: Tensor, replaced: Tensor, nothing: float = 0.0) -> tuple[float, Tensor]:
    """Returns how much of a photo's fine detail an edit keeps outside of regions, and where it has other detail.

    The first is `nothing` where the photo has no detail.
    """
    relit = apply_map(*local_map(before, after, _NARROW, 1e-3, (1 - replaced).clamp(min=0.02)), before)
    detail, edited, wrong = (
        mean((image - mean(image, 3)).square().mean(1, keepdim=True), 3)
        for image in (before, after, after - relit)
    )
    wrong = (wrong - _NOISE**2) / edited.clamp(min=_NOISE**2)
    weight = detail.sqrt() * (detail > _NOISE**2) * (1 - F.max_pool2d(replaced, 3, 1, 1))
    kept = float((weight * (wrong < _SAME)).sum() / weight.sum()) if weight.any() else nothing
    return kept, mean((wrong > _LOST).float(), 1)


def _membrane(error: Tensor, inside: Tensor) -> Tensor:
    """Returns an error with its values in regions replaced by those around them, continued smoothly."""
    outside = torch.where(inside > 0, 0.0, error)
    spread = outside
    for _ in range(32):
        spread = torch.where(inside > 0, mean(spread, 2), outside)
    return spread


def _replaced(error: Tensor, weak: float = 0.0) -> Tensor:
    """Returns where an error is above one threshold, in regions that rise above another, without holes, 0 or 1."""
    error = mean(error, 1)
    inside = (error > _REST).float()
    found = (error > max(_SEED, weak * float(error.max()))).float()
    while not torch.equal(more := F.max_pool2d(found, 3, 1, 1) * inside, found):
        found = more
    return F.max_pool2d(_filled(found), 3, 1, 1)


def _filled(regions: Tensor) -> Tensor:
    """Returns regions without holes: those that no path along the rest connects to the picture's border."""
    rest = 1 - regions
    outside = rest - F.pad(rest[..., 1:-1, 1:-1], (1, 1, 1, 1))
    while not torch.equal(more := torch.minimum(F.max_pool2d(outside, 3, 1, 1), rest), outside):
        outside = more
    return 1 - outside


def _pixels(values: NDArray[Any]) -> Tensor:
    """(h, w, 3) uint8 or uint16 -> (1, 3, h, w) in [0, 1]."""
    floats = torch.from_numpy(values.astype(np.float32))
    return floats.permute(2, 0, 1)[None] / float(np.iinfo(values.dtype).max)
