"""Scenes whose place is a photograph: a crop of it, in another light and look, with or without an object added to it.

The photographs lie in a folder; `pocket/pretraining/collect.py` makes one, and lists them with their licences.
Nothing is known of what they show, so captions say only what was changed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import PhotoError
from ...photo.reading import load_photo
from . import CENTRES, COMPANIONS, LOOK_WEIGHTS, SIDE, SIZES, Change, Scene
from .drawing import LOOKS, night, sunset
from .sprites import COLOURED, COLOURS, OBJECTS

LIGHTS = {"sunset": sunset, "night": night}
SHORTER = 768  # pixels of a photograph's shorter side, kept in memory
ENDINGS = (".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Shot(Scene):
    """A scene in a photograph.

    Attributes:
        place: "".
        time: "day" for the photograph's own light, whichever it is.
        photo: File of the photograph.
        span: Side of the square crop, fraction of the shorter side; at least twice an image's pixels are taken.
        across: Where the crop is between left (0) and right (1).
        down: Where the crop is between top (0) and bottom (1).
        flipped: Whether the photograph is mirrored, without the object.
    """

    place: str = ""
    photo: Path = Path()
    span: float = 1.0
    across: float = 0.5
    down: float = 0.5
    flipped: bool = False

    def _allowed(self) -> dict[str, tuple[str, ...]]:
        allowed = super()._allowed()
        return allowed | {"place": ("",), "object": ("", *allowed["object"])}

    def backdrop(self, side: int) -> Image.Image:
        """The crop in its light, RGB, `side` × `side` pixels."""
        photo = _read(self.photo)
        shorter = min(photo.size)
        length = max(min(2 * SIDE, shorter), round(self.span * shorter))
        left, top = self.across * (photo.width - length), self.down * (photo.height - length)
        box = (left, top, left + length, top + length)
        image = photo.resize((side, side), Image.Resampling.LANCZOS, box)
        if self.flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.time == "day":
            return image
        lit = LIGHTS[self.time](np.asarray(image, dtype=np.float64) / 255.0)
        return Image.fromarray((lit * 255.0).round().astype(np.uint8), "RGB")


@cache
def _read(file: Path) -> Image.Image:
    """A photograph, reduced to what crops need."""
    image = load_photo(file).image
    scale = min(1.0, SHORTER / min(image.size))
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS, reducing_gap=3.0
    )


def photographs_in(folder: Path) -> tuple[Path, ...]:
    """The photographs of a folder, by name.

    Raises:
        PhotoError: There is none.
    """
    files = tuple(sorted(path for path in folder.glob("*") if path.suffix.lower() in ENDINGS))
    if not files:
        raise PhotoError(f"{folder} has no photographs; put files that end in {', '.join(ENDINGS)} into it")
    return files


def draw_shot(seed: int, photos: Sequence[Path]) -> Shot:
    """Draws a random scene in one of the photographs: the same for the same seed and names."""
    rng = random.Random(f"photograph {seed}")
    name, x = rng.choice(OBJECTS) if rng.random() < 0.5 else "", rng.choice(CENTRES)
    others = [companion for companion in COMPANIONS if companion != name]
    return Shot(
        object=name,
        time=rng.choices(("day", *LIGHTS), weights=(0.44, 0.28, 0.28))[0],
        look=rng.choices(tuple(LOOK_WEIGHTS), weights=tuple(LOOK_WEIGHTS.values()))[0],
        colour=rng.choice(tuple(COLOURS)) if name in COLOURED else "",
        x=x,
        size=rng.choice(SIZES),
        mirrored=rng.random() < 0.5 if x == 0.5 else x < 0.5,
        companion=rng.choice(others) if name and rng.random() < 0.12 else "",
        photo=rng.choice(photos),
        span=1.0 if rng.random() < 0.3 else 4.0 ** -rng.random(),
        across=rng.random(),
        down=rng.random(),
        flipped=rng.random() < 0.5,
    )


def unedited(shot: Shot) -> Shot:
    """The same crop in its own light, as a photograph, with nothing added."""
    return replace(shot, time="day", look="plain", object="", colour="", companion="")


def changes(shot: Shot, rng: random.Random) -> list[Change]:
    """One edit each of light, look and object of a plain shot: an object is added, or the one there removed."""
    look = rng.choice([look for look in LOOKS if look != "plain"])
    thing = Change("object", "" if shot.object else rng.choice(OBJECTS))
    return [Change("time", rng.choice(tuple(LIGHTS))), Change("look", look), thing]
