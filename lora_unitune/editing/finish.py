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
    if start.whole is None or start.pixels is None or start.photo is None or settings.size == "base":
        return [Edit(image, text, {"image_size": list(image.size)}, 0.0, (), image) for image in own]
    if not settings.details:  # with them, the base's errors are gone already
        images = add_detail(start.pixels, base.decode(start.photo).cpu(), images.cpu()).clamp(0, 1)
    photo, box = start.whole.image, seen_part(start.whole.image.size, start.size)
    edits = list[Edit]()
    for image, pixels in zip(own, images, strict=True):
        changes = find_changes(start.pixels, pixels[None].cpu())
        whole = Image.fromarray(compose(np.asarray(photo), changes, box))
        if start.mask is not None:
            whole = Image.composite(whole, photo, start.mask)
        notes, values = change_notes(changes, start.size), {"image_size": list(whole.size)}
        edits.append(Edit(whole, text, values, 0.0, notes, image, changes, start.whole))
    return edits


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
