"""From sampled images to what an edit returns: the photo at its own size, edited."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_unitune.editing.record import Edit, to_image
from lora_unitune.editing.start import Start
from lora_unitune.families import Base
from lora_unitune.photo.composition import Changes, compose, find_changes
from lora_unitune.photo.depth import eight_bits
from lora_unitune.photo.details import add_detail
from lora_unitune.photo.framing import seen_part
from lora_unitune.settings import EditSettings


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
    own = [to_image(pixels) for pixels in images]
    if start.whole is None or start.pixels is None or start.photo is None or not _composed(start, settings):
        kinds = _kinds(base, images, start, settings)
        sizes = [{"image_size": list(image.size), **kind} for image, kind in zip(own, kinds, strict=True)]
        return [Edit(image, text, more, 0.0, (), image) for image, more in zip(own, sizes, strict=True)]
    if not settings.details:  # with them, the base's errors are gone already
        images = add_detail(start.pixels, base.decode(start.photo).cpu(), images.cpu()).clamp(0, 1)
    original = start.earlier.photo if start.earlier else start.whole
    box = seen_part(start.whole.image.size, start.size)
    mask = None if start.mask is None else np.asarray(start.mask)
    edits = list[Edit]()
    for image, pixels in zip(own, images, strict=True):
        changes = find_changes(start.pixels, pixels[None].cpu())
        composed = compose(start.whole.pixels, changes, box, mask)
        deep = composed if composed.dtype == np.uint16 else None
        whole = Image.fromarray(composed if deep is None else eight_bits(composed))
        notes = change_notes(changes, start.size)
        values = {"image_size": list(whole.size), "kind": changes.kind}
        edits.append(Edit(whole, text, values, 0.0, notes, image, changes, original, deep))
    return edits


def _kinds(base: Base, images: Tensor, start: Start, settings: EditSettings) -> list[dict[str, str]]:
    """Returns the kind of each edit of the base's size; without a photo there is none."""
    if start.photo is None:
        return [{} for _ in images]
    photo = start.pixels if settings.details else None  # without them, the base's errors are in the edit
    photo = base.decode(start.photo).cpu() if photo is None else photo
    return [{"kind": find_changes(photo, image[None].cpu()).kind} for image in images]


def _composed(start: Start, settings: EditSettings) -> bool:
    """Returns whether edits are composed into what they start from.

    An edit of an edit is so at the base's size too: else each turn would lose what the autoencoder loses.
    """
    is_own = start.earlier is not None and start.earlier.image.size == start.size
    return settings.size == "photo" or is_own


def change_notes(changes: Changes, size: tuple[int, int]) -> tuple[str, ...]:
    """Returns notes on an edit that changes nothing, or that keeps no detail of the photo.

    Args:
        changes: What the edit changes.
        size: (width, height) of the base's own image.
    """
    if changes.kind == "nothing":
        return ("the edit changes nothing; raise edit.guidance, or say more in the prompt",)
    enlarged = (
        f"the edit changes nearly all of the photo, so it is enlarged from {size[0]} x {size[1]} pixels"
    )
    return (enlarged,) if changes.kind == "restyled" else ()
