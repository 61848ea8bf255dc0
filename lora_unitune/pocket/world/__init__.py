"""The pocket world: synthetic scenes, their images and captions, and the ground truth of every edit.

A scene is one object in one place, at a time of day, in a look; everything else about it (position, size,
facing, background details) is in the scene too, so that the same scene can be rendered with one attribute changed.
In `photographs`, the place is a photograph instead of a drawing.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from .drawing import HORIZONS, LOOKS, PLACES, SUNS, backdrop, stand
from .sprites import COLOURED, COLOURS, OBJECTS, UNKNOWN, sprite

SIDE = 64  # pixels of an image
TIMES = ("day", "sunset", "night")
SIZES = (26 / 64, 34 / 64, 42 / 64)  # small, middling, big
CENTRES = (5 / 16, 8 / 16, 11 / 16)
"""Few, and whole latents (four pixels) apart, so that a latent covers the same part of an object in every scene:
a small model learns such objects sharply, but arbitrary shifts only as blurs."""
COMPANIONS = ("balloon", "mushroom", "tulip", "duck", "apple", "cactus")
LOOK_WEIGHTS = {"plain": 0.58, "sketch": 0.14, "pixel": 0.14, "sepia": 0.14}

OBJECT_WORDS = {name: (name,) for name in OBJECTS} | {
    "dog": ("dog", "puppy"),
    "cat": ("cat", "kitten"),
    "rabbit": ("rabbit", "bunny"),
    "sailboat": ("sailboat", "boat"),
}
PLACE_WORDS = {
    "meadow": ("in a meadow", "on the grass", "in a green field"),
    "beach": ("on the beach", "by the sea", "at the beach"),
    "desert": ("in the desert", "in a desert", "on a dune"),
    "snow": ("in the snow", "in the snowy mountains", "in winter"),
    "forest": ("in the forest", "in a forest", "in the woods"),
    "city": ("in the city", "in a city", "on a street"),
    "room": ("in a room", "in the living room", "indoors"),
}
TIME_WORDS = {
    "day": ("by day", "in the daytime", "on a sunny day", "during the day"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
    "night": ("at night", "by night", "under the moon"),
}
LOOK_WORDS = {
    "plain": (("a picture of", ""), ("an illustration of", "")),
    "sketch": (
        ("a pencil sketch of", ""),
        ("a sketch of", ""),
        ("", "pencil sketch"),
        ("a pencil drawing of", ""),
    ),
    "pixel": (("pixel art of", ""), ("", "pixel art"), ("a pixel art picture of", "")),
    "sepia": (("a sepia photo of", ""), ("an old sepia photograph of", ""), ("", "sepia photo")),
}
PHOTO_WORDS = (("a photo of", ""), ("a photograph of", ""), ("", "photo"))
"""The plain look of a scene in a photograph. No caption of a drawn scene has these words without "sepia"."""
SIDE_WORDS = {"left": "on the left", "right": "on the right", "middle": "in the middle"}
SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture of the pocket world.

    Attributes:
        object: One of `OBJECTS`, or of `UNKNOWN`, whose objects are never drawn at random; "" (in a photograph
            only) if nothing was added to it.
        place: One of `PLACES`; "" for a photograph.
        time: One of `TIMES`.
        look: One of `LOOKS`.
        colour: One of `COLOURS` for an object of `COLOURED`, else "".
        x: Centre of the object, fraction of the width; drawn from `CENTRES`.
        size: Longer side of the object, fraction of the width; drawn from `SIZES`.
        mirrored: Whether the object faces right; at a side it is drawn facing the middle.
        companion: A small second object on the other side, one of `COMPANIONS`, or "".
        seed: Seed of the background details.
    """

    object: str
    place: str
    time: str = "day"
    look: str = "plain"
    colour: str = ""
    x: float = 0.5
    size: float = 0.5
    mirrored: bool = False
    companion: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in self._allowed().items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"scene {field} is {getattr(self, field)!r}; allowed: {', '.join(map(repr, allowed))}"
                )

    def _allowed(self) -> dict[str, tuple[str, ...]]:
        return {
            "object": (*OBJECTS, *(name for names in UNKNOWN.values() for name in names)),
            "place": tuple(PLACES),
            "time": TIMES,
            "look": tuple(LOOKS),
            "colour": tuple(COLOURS) if self.object in COLOURED else ("",),
            "companion": ("", *COMPANIONS),
        }

    def backdrop(self, side: int) -> Image.Image:
        """The place at its time of day, without the object, RGB, `side` × `side` pixels."""
        return backdrop(side, self.place, self.time, random.Random(self.seed))

    @property
    def side(self) -> str:
        """Where the object is, as a caption says it: left, middle or right."""
        return "left" if self.x < 0.4 else "right" if self.x > 0.6 else "middle"

    @property
    def scale(self) -> str:
        """How large the object is, as a caption says it: small, "" or big."""
        return "small" if self.size < 0.47 else "big" if self.size > 0.59 else ""


@dataclass(frozen=True)
class Change:
    """One edit: a field of a scene and its new value."""

    field: str
    value: str | float


@dataclass(frozen=True)
class Counterfactual:
    """The ground truth of an edit.

    Attributes:
        scene: The changed scene.
        prompt: The edit as a user would type it.
        mask: Pixels that differ, (64, 64) bool.
    """

    scene: Scene
    prompt: str
    mask: np.ndarray


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@cache
def is_unseen_pair(name: str, place: str) -> bool:
    """Whether this object never occurs in this place in training (one pair in eight)."""
    return _share(f"{name} {place}") < 0.125


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept out of training: an unseen pair, or one scene in ten by hash."""
    return is_unseen_pair(scene.object, scene.place) or _share(repr(scene)) < 0.1


def draw_scene(seed: int, split: str = "train") -> Scene:
    """Draws a random scene.

    Args:
        seed: Seed; the same seed and split give the same scene.
        split: "train"; "held-out" (scenes never trained on, of seen pairs); or "unseen" (pairs that never occur).
    """
    rng = random.Random(f"{split} {seed}")
    while True:
        name, place = rng.choice(OBJECTS), rng.choice(tuple(PLACES))
        if is_unseen_pair(name, place) != (split == "unseen"):
            continue
        x = rng.choice(CENTRES)
        scene = Scene(
            object=name,
            place=place,
            time=rng.choice(TIMES),
            look=rng.choices(tuple(LOOK_WEIGHTS), weights=tuple(LOOK_WEIGHTS.values()))[0],
            colour=rng.choice(tuple(COLOURS)) if name in COLOURED else "",
            x=x,
            size=rng.choice(SIZES),
            mirrored=rng.random() < 0.5 if x == 0.5 else x < 0.5,
            companion=rng.choice([c for c in COMPANIONS if c != name]) if rng.random() < 0.12 else "",
            seed=rng.randrange(1 << 31),
        )
        if is_held_out(scene) == (split != "train"):
            return scene


def render(scene: Scene, side: int = SIDE) -> Image.Image:
    """Renders a scene, RGB, `side` × `side` pixels: at twice the size, then downsampled by the look."""
    image = scene.backdrop(side * 2)
    if scene.companion:
        small = sprite(scene.companion, "red" if scene.companion in COLOURED else "")
        other = 0.15 if scene.x > 0.5 else 0.85
        stand(image, small, scene.time, other, _ground(scene) + 0.03, 0.22)
    if scene.object:
        _stand_object(image, scene)
    return LOOKS[scene.look](image, side)


def object_mask(scene: Scene) -> np.ndarray:
    """Returns the pixels of a scene's object, which it must have, (64, 64) bool."""
    black = Image.new("RGB", (SIDE * 2, SIDE * 2))
    white = sprite(scene.object, scene.colour).copy()
    white.paste((255, 255, 255), (0, 0), white.getchannel("A"))
    _stand_object(black, replace(scene, time="day"), white)
    mask: np.ndarray = np.asarray(black.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)) > 127
    return mask


def _ground(scene: Scene) -> float:
    """Returns where an object's lower end is, as a fraction of the height: what is further off stands higher."""
    return (54 if scene.scale == "small" else 58) / 64


def _stand_object(image: Image.Image, scene: Scene, picture: Image.Image | None = None) -> None:
    """Pastes a scene's object, or another picture of its shape, into the image."""
    main = picture or sprite(scene.object, scene.colour)
    if scene.mirrored:
        main = main.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    bottom = _ground(scene) - 0.125 if scene.object == "balloon" else _ground(scene)
    stand(image, main, scene.time, scene.x, max(bottom, scene.size + 0.04), scene.size)


def sun(scene: Scene) -> int:
    """Returns the index in `SUNS` of a scene's sun or moon: the second random draw of `render`."""
    rng = random.Random(scene.seed)
    rng.choice(HORIZONS)
    return SUNS.index(rng.choice(SUNS))


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _phrase(scene: Scene, words: str, *, colour: bool, scale: bool) -> str:
    parts = [SIZE_WORDS[scene.scale][0]] if scale and scene.scale else []
    return _with_article(" ".join([*parts, *([scene.colour] if colour and scene.colour else []), words]))


def _said_object(scene: Scene, rng: random.Random) -> list[str]:
    """What a caption says of the objects; it mostly names them."""
    if not scene.object or rng.random() >= 0.92:
        return []
    words = rng.choice(OBJECT_WORDS[scene.object])
    parts = [_phrase(scene, words, colour=rng.random() < 0.85, scale=rng.random() < 0.1)]
    if scene.companion and rng.random() < 0.85:
        parts.append("and " + _with_article(scene.companion))
    return [*parts, SIDE_WORDS[scene.side]] if rng.random() < 0.5 else parts


def _said_look(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Words before and after what a picture shows."""
    plain = scene.look == "plain"
    if rng.random() >= (0.95 if not plain else 0.15 if scene.place else 0.6):
        return "", ""
    return rng.choice(LOOK_WORDS[scene.look] if scene.place or not plain else PHOTO_WORDS)


def caption(scene: Scene, rng: random.Random) -> str:
    """Describes a scene with varied wording, attributes left out at random; "" one time in ten.

    Without an object it may be as short as "at night" or "a pencil sketch". A photograph's own place and light have
    no words.
    """
    if rng.random() < 0.1:
        return ""
    parts, (before, after) = _said_object(scene, rng), _said_look(scene, rng)
    if not parts:
        before = before.removesuffix(" of")
        parts = [] if before or rng.random() < 0.5 else ["a scene"]
    place = [rng.choice(PLACE_WORDS[scene.place])] if scene.place and rng.random() < 0.8 else []
    known = scene.place or scene.time != "day"
    time = [rng.choice(TIME_WORDS[scene.time])] if known and rng.random() < 0.85 else []
    parts += place + time if rng.random() < 0.75 else time + place
    text = " ".join(word for word in (before, *parts) if word)
    if rng.random() < 0.1:
        text = re.sub(r"\ban?\b", "the", text)
    return ", ".join(part for part in (text, after) if part)


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption with object, colour, place, time and look all in it, in one of its wordings."""
    thing = _phrase(scene, rng.choice(OBJECT_WORDS[scene.object]), colour=True, scale=False)
    where, when = rng.choice(PLACE_WORDS[scene.place]), rng.choice(TIME_WORDS[scene.time])
    before, after = rng.choice(LOOK_WORDS[scene.look])
    text = f"{before} {thing} {where} {when}".strip()
    return f"{text}, {after}" if after else text


def change_scene(scene: Scene, change: Change) -> Scene:
    """The same scene with one thing changed; a new object keeps a colour it can have, else is red."""
    values: dict[str, Any] = {change.field: change.value}
    if change.field == "object":
        values["colour"] = (scene.colour or "red") if change.value in COLOURED else ""
    return replace(scene, **values)


def counterfactual(scene: Scene, change: Change) -> Counterfactual:
    """The scene after an edit, the prompt that asks for it, and the pixels that differ.

    The base has no words for unknown objects, so prompts for their scenes leave them out, as they do where an object
    was removed from a photograph.
    """
    changed = change_scene(scene, change)
    before, after = (np.asarray(render(s), dtype=np.int16) for s in (scene, changed))
    return Counterfactual(changed, _edit_prompt(changed, change), (np.abs(before - after) > 6).any(-1))


def _edit_prompt(scene: Scene, change: Change) -> str:
    if scene.object not in OBJECTS:
        return _edit_prompt_without_object(scene, change)
    thing = _phrase(
        scene, scene.object, colour=change.field in ("colour", "object"), scale=change.field == "size"
    )
    if change.field == "place":
        return f"{thing} {PLACE_WORDS[scene.place][0]}"
    if change.field == "time":
        return f"{thing} {TIME_WORDS[scene.time][0]}"
    if change.field == "look":
        return f"{LOOK_WORDS[scene.look][0][0]} {thing}"
    if change.field == "companion":
        return f"{thing} and {_with_article(scene.companion)}"
    return f"{thing} {SIDE_WORDS[scene.side]}" if change.field == "x" else thing


def _edit_prompt_without_object(scene: Scene, change: Change) -> str:
    if change.field == "companion":
        return f"and {_with_article(scene.companion)}"
    if change.field == "object":  # removed
        return PHOTO_WORDS[0][0].removesuffix(" of")
    if change.field == "look":
        return LOOK_WORDS[scene.look][0][0].removesuffix(" of")
    return (PLACE_WORDS if change.field == "place" else TIME_WORDS)[getattr(scene, change.field)][0]


def words() -> list[str]:
    """Every word that a caption can use, in a fixed order."""
    tables = [*PLACE_WORDS.values(), *TIME_WORDS.values(), SIDE_WORDS.values(), OBJECT_WORDS.values()]
    phrases = [p for table in tables for p in table] + [w for pair in SIZE_WORDS.values() for w in pair]
    phrases += [part for looks in LOOK_WORDS.values() for look in looks for part in look]
    flat = [p for p in phrases if isinstance(p, str)] + [
        w for p in phrases if isinstance(p, tuple) for w in p
    ]
    vocabulary = {w for phrase in [*flat, *COLOURS, "a", "an", "and", "the", "scene"] for w in phrase.split()}
    return sorted(vocabulary)
