"""The benchmark's pairs: a photo, an edit prompt, and the ground truth."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from lora_unitune.pocket import world
from lora_unitune.pocket.world.drawing import LOOKS, PLACES
from lora_unitune.pocket.world.examiner import has_colour
from lora_unitune.pocket.world.sprites import COLOURS, OBJECTS

FIRST_SEED = {"test": 50_000, "tuning": 60_000}
"""First seeds of the two lists of held-out scenes; no other command of this project uses these scenes."""
SIZE_OF_KIND = {
    "object": "large",
    "place": "large",
    "time": "global",
    "look": "global",
    "colour": "local",
    "companion": "local",
    "x": "layout",
    "size": "layout",
}
EDITS_OF_PHOTO = 6


@dataclass(frozen=True)
class Pair:
    """One edit of one photo.

    Attributes:
        photo: Number of its photo in its list.
        before: The photo's scene.
        kind: The field that changes, one of `SIZE_OF_KIND`.
        truth: The edited scene, the prompt that asks for it, and the mask of pixels that differ.
    """

    photo: int
    before: world.Scene
    kind: str
    truth: world.Counterfactual

    @property
    def image(self) -> Image.Image:
        """The photo."""
        return world.render(self.before)

    @property
    def prompt(self) -> str:
        """The edit as a user would type it."""
        return self.truth.prompt


def scenes(split: str, count: int) -> list[world.Scene]:
    """The first photos of a list: held-out scenes without a second object."""
    chosen: list[world.Scene] = []
    seed = FIRST_SEED[split]
    while len(chosen) < count:
        scene = world.draw_scene(seed, "held-out")
        if not scene.companion:
            chosen.append(scene)
        seed += 1
    return chosen


def changes(scene: world.Scene, rng: random.Random) -> list[world.Change]:
    """Six edits of a photo: object, place, time, look, something local, and its layout."""

    def other(field: str, values: tuple[str, ...]) -> world.Change:
        return world.Change(field, rng.choice([v for v in values if v != getattr(scene, field)]))

    if has_colour(scene):
        local = other("colour", tuple(COLOURS))
    else:
        local = other("companion", tuple(c for c in world.COMPANIONS if c != scene.object))
    if rng.random() < 0.5:
        away = world.CENTRES[0] if scene.mirrored else world.CENTRES[-1]  # so that it still faces the middle
        layout = world.Change("x", away if scene.side == "middle" else 0.5)
    else:
        far = {"small": world.SIZES[0], "big": world.SIZES[-1]}
        layout = world.Change(
            "size", rng.choice([size for scale, size in far.items() if scale != scene.scale])
        )
    return [
        other("object", OBJECTS),
        other("place", tuple(PLACES)),
        other("time", world.TIMES),
        other("look", tuple(LOOKS)),
        local,
        layout,
    ]


def draw_pairs(split: str, count: int) -> list[Pair]:
    """The first `count` pairs of a list, "test" or "tuning"; a longer list begins with the shorter one."""
    pairs = []
    for number, scene in enumerate(scenes(split, -(-count // EDITS_OF_PHOTO))):
        rng = random.Random(f"{split} {number}")
        pairs += [Pair(number, scene, change.field, world.counterfactual(scene, change))
                  for change in changes(scene, rng)]  # fmt: skip
    return pairs[:count]
