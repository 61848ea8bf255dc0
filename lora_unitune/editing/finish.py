"""From sampled images to what an edit returns: the photo at its own size, edited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import truediv
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lora_unitune.editing.prompts import asks_for_a_style
from lora_unitune.editing.record import Edit, to_image
from lora_unitune.editing.start import Start
from lora_unitune.families import Base
from lora_unitune.photo.composition import Changes, apply_changes, compose, find_changes
from lora_unitune.photo.depth import eight_bits
from lora_unitune.photo.details import add_detail
from lora_unitune.photo.framing import SMALLEST_SIDE, Box, faded, seen_part, with_context
from lora_unitune.settings import EditSettings

_LARGE = 4  # pixels of the photo for one of the base's
_ROOM = 0.25  # share of a changed region's sides that a suggested box has beyond each of them
_SMALL = 0.5  # a box's share of the sides, with its context, up to which an edit of it is clearly sharper


@torch.no_grad()
def finished(base: Base, images: Tensor, text: str, start: Start, settings: EditSettings) -> list[Edit]:
    """Returns edits at the photo's own size, where it is given and wanted; otherwise at the base's.

    What they were made with isn't recorded yet, but for their size.

    Args:
        base: The base.
        images: Sampled images, (b, 3, h, w) float32 in [0, 1].
        text: Their complete prompt.
        start: What they started from.
        settings: Settings of the edits.
    """
    images, found = composed(base, images, [text] * len(images), start, settings)
    own = [to_image(pixels) for pixels in images]
    if start.whole is None or not found or not _is_composed(start, settings):
        kinds = [{"kind": changes.kind} for changes in found] or [{} for _ in own]
        sizes = [{"image_size": list(image.size), **kind} for image, kind in zip(own, kinds, strict=True)]
        return [Edit(image, text, more, 0.0, (), image) for image, more in zip(own, sizes, strict=True)]
    original = start.earlier.photo if start.earlier else start.whole
    seen = seen_part(start.whole.image.size, start.size, start.box)
    mask = None if start.mask is None else np.asarray(start.mask)
    edits = list[Edit]()
    for image, changes in zip(own, found, strict=True):
        large = _at_its_size(start.whole.pixels, changes, seen, start.box, mask)
        deep = large if large.dtype == np.uint16 else None
        whole = Image.fromarray(large if deep is None else eight_bits(large))
        notes = change_notes(changes, start.size)
        values = {"image_size": list(whole.size), "kind": changes.kind}
        if start.box is not None:
            left, top, right, bottom = start.box
            values["box"] = [left, top, right - left, bottom - top]
        elif mask is None:
            notes += box_notes(changes, start.size, seen)
        edits.append(Edit(whole, text, values, 0.0, notes, image, changes, original, deep))
    return edits


@torch.no_grad()
def composed(
    base: Base, images: Tensor, texts: Sequence[str], start: Start, settings: EditSettings
) -> tuple[Tensor, list[Changes]]:
    """Returns images with the photo's own pixels wherever they change nothing or only the light, and their changes.

    Args:
        base: The base.
        images: Sampled images, (b, 3, h, w) float32 in [0, 1].
        texts: The prompt of each.
        start: What they started from; without a photo, there are no changes.
        settings: Settings of the edits; without details, the images stay as they are.
    """
    if start.photo is None or not len(images):
        return images, []
    photo, edits = start.pixels, images.cpu()
    if photo is None or not settings.details:
        redraw = base.decode(start.photo).cpu()
        photo = redraw if photo is None else photo
        if not settings.details:  # with them, the base's errors are gone already
            edits = add_detail(photo, redraw, edits).clamp(0, 1)
    styled = [asks_for_a_style(text) for text in texts]
    found = [find_changes(photo, edit[None], style) for edit, style in zip(edits, styled, strict=True)]
    if settings.details:
        images = torch.cat([apply_changes(photo, changes) for changes in found])
    return images, found


def _is_composed(start: Start, settings: EditSettings) -> bool:
    """Returns whether edits are composed into what they start from.

    An edit of an edit is so at the base's size too: else each turn would lose what the autoencoder loses.
    """
    is_own = start.earlier is not None and start.earlier.image.size == start.size
    return settings.size == "photo" or is_own


def _at_its_size(
    photo: NDArray[Any], changes: Changes, seen: Box, box: Box | None, mask: NDArray[np.uint8] | None
) -> NDArray[Any]:
    """Returns the photo with an edit's changes; outside of a box and its context, with all of its own values."""
    if box is None:
        return compose(photo, changes, seen, mask)
    left, top, right, bottom = seen
    shown = faded((photo.shape[1], photo.shape[0]), seen, box)
    if mask is not None:
        shown = np.asarray((shown.astype(np.uint16) * mask[top:bottom, left:right] + 127) // 255, np.uint8)
    whole, part = photo.copy(), photo[top:bottom, left:right]
    whole[top:bottom, left:right] = compose(part, changes, (0, 0, right - left, bottom - top), shown)
    return whole


def change_notes(changes: Changes, size: tuple[int, int]) -> tuple[str, ...]:
    """Returns notes on an edit that changes nothing, or that keeps little detail of the photo.

    Args:
        changes: What the edit changes.
        size: (width, height) of the base's own image.
    """
    if changes.kind == "nothing":
        return ("the edit changes nothing; raise edit.guidance, or say more in the prompt",)
    enlarged = (
        f"the edit has another style than the photo, so most is enlarged from {size[0]} x {size[1]} pixels"
    )
    return (enlarged,) if changes.kind == "restyled" else ()


def box_notes(changes: Changes, size: tuple[int, int], seen: Box) -> tuple[str, ...]:
    """Returns a note that suggests a box, where an edit changes a small part of a large photo and nothing else.

    Args:
        changes: What the edit changes.
        size: (width, height) of the base's own image.
        seen: The part of the photo that the base saw.
    """
    sides, inside = (seen[2] - seen[0], seen[3] - seen[1]), (changes.replaced[0, 0] > 0).numpy()
    found = Image.fromarray(inside).getbbox()
    if changes.kind != "local" or found is None or min(map(truediv, sides, size)) < _LARGE:
        return ()
    starts, ends = list[int](), list[int]()
    for axis in (0, 1):
        step, room = sides[axis] / inside.shape[1 - axis], _ROOM * (found[axis + 2] - found[axis])
        starts.append(max(0, int((found[axis] - room) * step)))
        ends.append(min(sides[axis], math.ceil((found[axis + 2] + room) * step)))
    width, height = ends[0] - starts[0], ends[1] - starts[1]
    part = with_context(sides, (starts[0], starts[1], ends[0], ends[1]))
    if min(width, height) < SMALLEST_SIDE or max(map(truediv, part, sides)) > _SMALL:
        return ()
    return (
        "the edit changes a small part of a large photo, where it is enlarged; a fit of that part may give a "
        f"sharper one: fit --box {seen[0] + starts[0]},{seen[1] + starts[1]},{width},{height}",
    )
