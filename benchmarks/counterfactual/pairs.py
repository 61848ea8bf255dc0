"""The benchmark's pairs: a photo, an edit prompt, and the ground truth.

The lists "test" and "tuning" show what the base was trained on: held-out scenes of known objects. The lists
"test-unknown" and "tuning-unknown" show objects that no pretraining has seen, on places that it has.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from lora_unitune.pocket import world
from lora_unitune.pocket.world.drawing import LOOKS, PLACES
from lora_unitune.pocket.world.examiner import has_colour
from lora_unitune.pocket.world.sprites import COLOURS, OBJECTS, UNKNOWN

FIRST_SEED = {"test": 50_000, "tuning": 60_000, "test-unknown": 70_000, "tuning-unknown": 80_000}
"""First seeds of the lists of held-out scenes; no other command of this project uses these scenes."""
TEST = {"known": "test", "unknown": "test-unknown"}
TUNING = {"known": "tuning", "unknown": "tuning-unknown"}
KINDS = ("object", "place", "time", "look", "colour", "companion", "x", "size")
"""What an edit changes: a field of the scene."""
EDITS_OF_PHOTO = 6
EDITS_OF_UNKNOWN = 4


@dataclass(frozen=True)
class Pair:
    """One edit of one photo.

    Attributes:
        photo: Number of its photo in its list.
        before: The photo's scene.
        kind: The field that changes, one of `KINDS`.
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
    """The first photos of a list: held-out scenes without a second object; unknown objects take turns."""
    chosen: list[world.Scene] = []
    seed, things = FIRST_SEED[split], UNKNOWN[split.removesuffix("-unknown")]
    while len(chosen) < count:
        scene = world.draw_scene(seed, "held-out")
        if split.endswith("-unknown"):
            scene = replace(scene, object=things[len(chosen) % len(things)], colour="")
        if not scene.companion:
            chosen.append(scene)
        seed += 1
    return chosen


def changes(scene: world.Scene, rng: random.Random) -> list[world.Change]:
    """Six edits of a photo: object, place, time, look, something local, and its layout.

    The base has no word for an unknown object, so a photo of one gets four: place, time, look, and a second object.
    """

    def other(field: str, values: tuple[str, ...]) -> world.Change:
        return world.Change(field, rng.choice([v for v in values if v != getattr(scene, field)]))

    def everywhere() -> list[world.Change]:
        return [other("place", tuple(PLACES)), other("time", world.TIMES), other("look", tuple(LOOKS))]

    if scene.object not in OBJECTS:
        return [*everywhere(), other("companion", world.COMPANIONS)]
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
    return [other("object", OBJECTS), *everywhere(), local, layout]


def draw_pairs(split: str, count: int) -> list[Pair]:
    """The first `count` pairs of a list, one of `FIRST_SEED`; a longer list begins with the shorter one."""
    pairs = []
    each = EDITS_OF_UNKNOWN if split.endswith("-unknown") else EDITS_OF_PHOTO
    for number, scene in enumerate(scenes(split, -(-count // each))):
        rng = random.Random(f"{split} {number}")
        pairs += [Pair(number, scene, change.field, world.counterfactual(scene, change))
                  for change in changes(scene, rng)]  # fmt: skip
    return pairs[:count]
