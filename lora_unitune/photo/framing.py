"""Resizing and cropping of a photo to a size that a base can process."""

from __future__ import annotations

import dataclasses
import math

from PIL import Image

from lora_unitune.errors import PhotoError
from lora_unitune.photo.reading import Photo
from lora_unitune.settings import PhotoSettings

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of a photo, in its pixels."""
SMALLEST_SIDE = 16  # pixels
LARGEST_ENLARGEMENT = 4
LONGEST_SHAPE = 2.0
"""Largest aspect ratio; longer photos are cropped to their center."""
_STRETCH = math.log(1.15)
"""Largest difference in aspect ratio (log) for which a photo is resized without cropping."""
_SHAPE_WEIGHT = 2.0  # weight of a difference in aspect ratio against one in the number of pixels


def choose_size(
    photo: tuple[int, int], settings: PhotoSettings, own: tuple[int, int], step: int
) -> tuple[int, int]:
    """Chooses the size at which a base processes a photo: near its aspect ratio and the base's number of pixels.

    Both sides are multiples of the base's step; the chosen size is the nearest in
    aspect ratio and number of pixels (aspect-ratio buckets, as NovelAI described them in 2022).

    Args:
        photo: (width, height) of the photo.
        settings: An exact size, or a number of pixels, or neither.
        own: (width, height) that the base was trained at.
        step: Number of pixels that each side has to be a multiple of.

    Returns:
        (width, height) in pixels. An exact size is returned unchecked; the base refuses unsupported ones.
    """
    if settings.exact:
        return settings.exact
    pixels = settings.pixels or own[0] * own[1]
    shape = min(max(photo[0] / photo[1], 1 / LONGEST_SHAPE), LONGEST_SHAPE)

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        width, height = size
        of_shape, of_pixels = abs(math.log(width / height / shape)), abs(math.log(width * height / pixels))
        return _SHAPE_WEIGHT * of_shape + of_pixels, width * height

    sides = range(step, int(math.sqrt(2 * LONGEST_SHAPE * pixels)) + step + 1, step)
    near = [(width, height) for width in sides for height in sides if width * height <= 1.3 * pixels]
    return min(near or [(step, step)], key=distance)


def seen_part(photo: tuple[int, int], size: tuple[int, int]) -> Box:
    """Returns the part of a photo that a base sees: all of it, or its center if it has another aspect ratio.

    Args:
        photo: (width, height) of the photo.
        size: (width, height) at which the base processes it.
    """
    width, height = photo
    stretch = math.log(width / height * size[1] / size[0])
    if abs(stretch) <= _STRETCH:
        return 0, 0, width, height
    across = min(width, round(height * size[0] / size[1]))
    down = min(height, round(width * size[1] / size[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def frame(photo: Photo, size: tuple[int, int]) -> Photo:
    """Resizes a photo to the size at which a base processes it, with notes on the changes.

    A photo of nearly that aspect ratio is resized without cropping; another is center-cropped first.

    Args:
        photo: The photo, at its own size.
        size: (width, height) in pixels.

    Raises:
        PhotoError: The photo is smaller than a quarter of the size, or than 16 pixels.
    """
    width, height = photo.image.size
    needed = [max(SMALLEST_SIDE, -(-side // LARGEST_ENLARGEMENT)) for side in size]
    if width < needed[0] or height < needed[1]:
        raise PhotoError(
            f"{photo.source} is {width} x {height} pixels; the base works on it at {size[0]} x {size[1]} and "
            f"needs at least {needed[0]} x {needed[1]}; give a larger photo"
        )
    notes = list(photo.notes)
    box = seen_part((width, height), size)
    seen = box[2] - box[0], box[3] - box[1]
    image = photo.image.resize(size, Image.Resampling.LANCZOS, box=box)
    if seen != (width, height):
        used, whole, side = (seen[0], width, "width") if seen[0] < width else (seen[1], height, "height")
        notes.append(f"the base sees only its centre, {used} of {whole} pixels of its {side}")
    else:
        stretch = math.log(width / height * size[1] / size[0])
        if abs(stretch) > 0.04:
            notes.append(
                f"the base works on it at {size[0]} x {size[1]} pixels, which changes its shape by "
                f"{100 * (math.exp(abs(stretch)) - 1):.0f} %"
            )
    if min(width / size[0], height / size[1]) < 1:
        notes.append(
            f"it is enlarged from {width} x {height} to {size[0]} x {size[1]} pixels, so it will look soft"
        )
    return dataclasses.replace(photo, image=image, notes=tuple(notes))
