"""From sampled images to what an edit returns: the photo at its own size, edited."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_unitune.editing.record import to_image
from lora_unitune.editing.start import Start
from lora_unitune.families import Base
from lora_unitune.photo.composition import Changes, compose, find_changes
from lora_unitune.photo.details import add_detail
from lora_unitune.photo.framing import seen_part
from lora_unitune.settings import EditSettings

Finished = tuple[Image.Image, Image.Image, Changes | None]
"""An edit as it is returned, the base's own image of it, and what it changes in the photo."""


@torch.no_grad()
def finished(base: Base, images: Tensor, start: Start, settings: EditSettings) -> list[Finished]:
    """Returns edits at the photo's own size, where it is given and wanted; otherwise at the base's.

    Args:
        base: The base.
        images: Sampled images, (b, 3, h, w) float32 in [0, 1].
        start: What they started from.
        settings: Settings of the edits.
    """
    own = [to_image(pixels) for pixels in images]
    if start.whole is None or start.pixels is None or start.photo is None or settings.size == "base":
        return [(image, image, None) for image in own]
    if not settings.details:  # with them, the base's errors are gone already
        images = add_detail(start.pixels, base.decode(start.photo).cpu(), images.cpu()).clamp(0, 1)
    changes = [find_changes(start.pixels, pixels[None].cpu()) for pixels in images]
    photo = np.asarray(start.whole.image)
    box = seen_part(start.whole.image.size, start.size)
    whole = [Image.fromarray(compose(photo, each, box)) for each in changes]
    if start.mask is not None:
        whole = [Image.composite(image, start.whole.image, start.mask) for image in whole]
    return list(zip(whole, own, changes, strict=True))


def change_notes(changes: Changes | None, size: tuple[int, int]) -> list[str]:
    """Returns notes on an edit that changes nothing, or that keeps no detail of the photo.

    Args:
        changes: What the edit changes.
        size: (width, height) of the base's own image.
    """
    if changes is not None and changes.kind == "nothing":
        return ["the edit changes nothing; raise edit.guidance, or say more in the prompt"]
    if changes is not None and changes.kind == "restyled":
        return [
            f"the edit changes nearly all of the photo, so it is enlarged from {size[0]} x {size[1]} pixels"
        ]
    return []
