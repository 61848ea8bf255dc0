"""Resizing and cropping of a photo, or of a box of it, to a size that a base can process, and the way back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_unitune.errors import PhotoError, SettingError
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
_CONTEXT = 1 / 6
"""Share of a box's sides that the base sees beyond each of them, and over which an edit fades."""
_SAME_SHAPE = 0.02  # largest relative difference in aspect ratio


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


def box_in(photo: Photo, settings: PhotoSettings, fitted: tuple[int, ...] = ()) -> Box | None:
    """Returns the part of a photo that settings choose, in its pixels; None for the whole photo.

    Args:
        photo: The photo, at its own size.
        settings: The settings, with a box or without.
        fitted: (width, height) of the photo that the box is for, of which this one may be a copy of another size;
            empty for this photo.

    Raises:
        SettingError: The box is too small, or isn't inside of the photo.
        PhotoError: The photo has another shape than the fitted one.
    """
    if settings.part is None:
        return None
    size, (left, top, right, bottom) = photo.image.size, settings.part
    width, height = fitted or photo.size_of_file
    named = f"the adapter's box {settings.box}" if fitted else f"photo.box = '{settings.box}'"
    if not have_same_shape(size, (width, height)):
        raise PhotoError(
            f"{photo.source} is {size[0]} x {size[1]} pixels, and {named} is of a photo of {width} x {height}; give "
            "that photo, or a copy of its shape"
        )
    across, down = size[0] / width, size[1] / height
    box = round(left * across), round(top * down), round(right * across), round(bottom * down)
    sides = min(right - left, box[2] - box[0]), min(bottom - top, box[3] - box[1])
    if min(sides) < SMALLEST_SIDE:
        raise SettingError(
            f"{named} is {sides[0]} x {sides[1]} pixels of {photo.source}; it needs at least "
            f"{SMALLEST_SIDE} x {SMALLEST_SIDE}"
        )
    if right > width or bottom > height:
        raise SettingError(
            f"{named} isn't inside of the photo, which is {width} x {height} pixels; give x,y,width,height with "
            f"x + width up to {width} and y + height up to {height}"
        )
    return box


def have_same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Returns whether two (width, height) have nearly the same aspect ratio."""
    across, down = first[0] * second[1], first[1] * second[0]
    return abs(across - down) <= _SAME_SHAPE * down


def with_context(photo: tuple[int, int], box: Box | None) -> tuple[int, int]:
    """Returns the (width, height) of a box with what the base sees around it; those of the photo without a box."""
    if box is None:
        return photo
    width, height = ((1 + 2 * _CONTEXT) * side for side in (box[2] - box[0], box[3] - box[1]))
    return min(photo[0], round(width)), min(photo[1], round(height))


def seen_part(photo: tuple[int, int], size: tuple[int, int], box: Box | None = None) -> Box:
    """Returns the part of a photo that a base sees: all of it, or its center if it has another aspect ratio.

    Of a box it sees some context too, more where that gives the size's aspect ratio.

    Args:
        photo: (width, height) of the photo.
        size: (width, height) at which the base processes it.
        box: A part of the photo; None for all of it.
    """
    center = (0, 0, *photo) if box is None else box
    wanted = with_context(photo, box)
    scale = max(1 / LARGEST_ENLARGEMENT, wanted[0] / size[0], wanted[1] / size[1])
    across, down = min(photo[0], round(scale * size[0])), min(photo[1], round(scale * size[1]))
    if abs(math.log(across / down * size[1] / size[0])) > _STRETCH:
        across, down = (
            min(across, round(down * size[0] / size[1])),
            min(down, round(across * size[1] / size[0])),
        )
    left = min(max(0, (center[0] + center[2] - across) // 2), photo[0] - across)
    top = min(max(0, (center[1] + center[3] - down) // 2), photo[1] - down)
    return left, top, left + across, top + down


def faded(photo: tuple[int, int], seen: Box, box: Box) -> NDArray[np.uint8]:
    """Returns how much of an edit of a box is shown: all inside of it, less and less in its context.

    Args:
        photo: (width, height) of the photo.
        seen: The part of the photo that the base saw.
        box: The box.

    Returns:
        (height, width) of the seen part: 255 inside of the box, and 0 from the end of its context on.
    """
    columns, rows = (
        _shown(photo[axis], seen[axis], seen[axis + 2], box[axis], box[axis + 2]) for axis in (0, 1)
    )
    return np.asarray((np.multiply.outer(rows, columns) + 127) // 255, np.uint8)


def _shown(whole: int, start: int, end: int, low: int, high: int) -> NDArray[np.uint16]:
    """Returns from 0 to 255 how much is shown of each seen pixel, along one side of the photo."""
    context, places = _CONTEXT * (high - low), np.arange(start, end) + 0.5
    begin, stop = low - context, high + context
    begin = max(begin, start) if start > 0 else begin  # of a box too long for the base, a part isn't seen
    stop = min(stop, end) if end < whole else stop
    share = (np.minimum(places - begin, stop - places) / context).clip(0, 1)
    return np.asarray((255 * share**2 * (3 - 2 * share)).round(), np.uint16)


def frame(photo: Photo, size: tuple[int, int], box: Box | None = None) -> Photo:
    """Resizes a photo, or a box of it, to the size at which a base processes it, with notes on the changes.

    A photo of nearly that aspect ratio is resized without cropping; another is center-cropped first.

    Args:
        photo: The photo, at its own size.
        size: (width, height) in pixels.
        box: A part of the photo, which is resized with some context; None for all of it.

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
    seen = seen_part((width, height), size, box)
    image = photo.image.resize(size, Image.Resampling.LANCZOS, box=seen)
    whole, part = with_context((width, height), box), (seen[2] - seen[0], seen[3] - seen[1])
    return dataclasses.replace(photo, image=image, notes=(*photo.notes, *_notes(whole, part, size, box)))


def _notes(
    whole: tuple[int, int], seen: tuple[int, int], size: tuple[int, int], box: Box | None
) -> Iterator[str]:
    """Yields notes on what resizing does to a photo or a box, of which the base sees a part."""
    its, it = ("its", "it") if box is None else ("the box's", "the box with its context")
    if seen[0] < whole[0] or seen[1] < whole[1]:
        used, of, side = (seen[0], whole[0], "width") if seen[0] < whole[0] else (seen[1], whole[1], "height")
        yield f"the base sees only {its} centre, {used} of {of} pixels of {its} {side}"
    stretch = abs(math.log(seen[0] / seen[1] * size[1] / size[0]))
    if stretch > 0.04:
        percent = 100 * (math.exp(stretch) - 1)
        yield (
            f"the base works on {it} at {size[0]} x {size[1]} pixels, which changes its shape by {percent:.0f} %"
        )
    if min(seen[0] / size[0], seen[1] / size[1]) < 1:
        yield (
            f"{it} is enlarged from {seen[0]} x {seen[1]} to {size[0]} x {size[1]} pixels, so it will look soft"
        )
