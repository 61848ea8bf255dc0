"""The objects of the pocket world, from sprite sheets in this folder.

The pictures come from Noto Color Emoji (SIL Open Font License 1.1, Debian package `fonts-noto-color-emoji`).
They were rendered once, by `pocket/pretraining/sprite_sheet.py`, so that nobody needs the font.

No pretraining may use the objects in `UNKNOWN`: the benchmark's photos of unknown things show them.
"""

from __future__ import annotations

import colorsys
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SHEET = Path(__file__).with_name("sprites.png")
UNKNOWN_SHEET = Path(__file__).with_name("unknown.png")
CELL = 96  # pixels
COLUMNS = 6

EMOJI = {
    "dog": "🐕",
    "cat": "🐱",
    "fox": "🦊",
    "rabbit": "🐇",
    "penguin": "🐧",
    "elephant": "🐘",
    "duck": "🦆",
    "frog": "🐸",
    "car": "🚗",
    "bus": "🚌",
    "sailboat": "⛵",
    "rocket": "🚀",
    "train": "🚂",
    "house": "🏠",
    "castle": "🏰",
    "tent": "⛺",
    "apple": "🍎",
    "banana": "🍌",
    "strawberry": "🍓",
    "tulip": "🌷",
    "cactus": "🌵",
    "tree": "🌳",
    "mushroom": "🍄",
    "balloon": "🎈",
}
OBJECTS = tuple(EMOJI)

UNKNOWN_EMOJI = {
    "tuning": {
        "giraffe": "🦒",
        "owl": "🦉",
        "snail": "🐌",
        "horse": "🐎",
        "crab": "🦀",
        "bicycle": "🚲",
        "guitar": "🎸",
        "chair": "🪑",
        "pumpkin": "🎃",
        "cake": "🎂",
        "robot": "🤖",
        "dancer": "💃",
    },
    "test": {
        "turtle": "🐢",
        "octopus": "🐙",
        "whale": "🐳",
        "cow": "🐄",
        "butterfly": "🦋",
        "helicopter": "🚁",
        "tractor": "🚜",
        "teapot": "🫖",
        "pineapple": "🍍",
        "burger": "🍔",
        "snowman": "⛄",
        "camera": "📷",
    },
}
"""Emoji that no pretraining uses, by the list of the benchmark that shows them."""

VARIANTS = {
    "tuning": {
        "striped dog": ("dog", 0.0, "stripes"),
        "purple cat": ("cat", 240.0, ""),
        "dotted bus": ("bus", 0.0, "dots"),
        "green fox": ("fox", 120.0, "stripes"),
    },
    "test": {
        "dotted rabbit": ("rabbit", 0.0, "dots"),
        "green elephant": ("elephant", 120.0, ""),
        "striped castle": ("castle", 0.0, "stripes"),
        "blue frog": ("frog", 170.0, "dots"),
    },
}
"""Known objects in a form that no pretraining uses: object, rotation of its hues in degrees, and pattern."""

UNKNOWN = {split: (*emoji, *VARIANTS[split]) for split, emoji in UNKNOWN_EMOJI.items()}
"""Objects that no pretraining uses, by list."""

_CELLS = {name: (SHEET, index) for index, name in enumerate(OBJECTS)} | {
    name: (UNKNOWN_SHEET, index)
    for index, name in enumerate(n for each in UNKNOWN_EMOJI.values() for n in each)
}

# Original hue of the recolourable objects: (hue in degrees, half width of the range of hues to change).
OWN_HUE = {"car": (0, 25), "balloon": (0, 25), "mushroom": (10, 22), "tulip": (335, 35), "tent": (25, 22)}
COLOURS = {"red": 0.0, "blue": 215.0, "green": 125.0, "yellow": 50.0}
COLOURED = tuple(OWN_HUE)


def _rgb_to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    high, low = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(high - low, 1e-6)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(
        high == r, (g - b) / spread % 6, np.where(high == g, (b - r) / spread + 2, (r - g) / spread + 4)
    )
    return sector * 60.0, (high - low) / np.maximum(high, 1e-6), high


def _recoloured(sprite: np.ndarray, name: str, colour: str) -> np.ndarray:
    own, width = OWN_HUE[name]
    hue, saturation, value = _rgb_to_hsv(sprite[..., :3])
    distance = np.abs((hue - own + 180.0) % 360.0 - 180.0)
    chosen = (distance < width) & (saturation > 0.3)
    pure = np.array(colorsys.hsv_to_rgb(COLOURS[colour] / 360.0, 1.0, 1.0))
    strength = np.clip(saturation * 1.15, 0.55, 0.9)[..., None]
    brightness = value[..., None] ** (0.6 if colour == "yellow" else 1.0)
    painted = brightness * (1.0 - strength + strength * pure)
    out = sprite.copy()
    out[..., :3] = np.where(chosen[..., None], painted, sprite[..., :3])
    return out


def _varied(sprite: np.ndarray, turn: float, pattern: str) -> np.ndarray:
    """A sprite with its hues rotated by `turn` degrees, grey parts tinted, and dark stripes or light dots."""
    hue, saturation, value = _rgb_to_hsv(sprite[..., :3])
    if turn:
        hue, saturation = (hue + turn) % 360.0, np.clip(saturation + 0.15, 0, 1)
    sector = (np.array([5.0, 3.0, 1.0]) + hue[..., None] / 60.0) % 6.0
    down = np.clip(np.minimum(sector, 4.0 - sector), 0, 1)
    painted = value[..., None] * (1.0 - saturation[..., None] * down)
    y, x = np.indices(hue.shape)
    if pattern == "stripes":
        painted *= np.where((x + y) % 26 < 11, 0.35, 1.0)[..., None]
    elif pattern == "dots":
        rows = (x + 14 * (y // 28 % 2)) % 28 - 14
        dots = np.asarray(rows**2 + (y % 28 - 14) ** 2 < 64)
        painted = np.where(dots[..., None], [0.98, 0.92, 0.3], painted)
    return np.concatenate([painted, sprite[..., 3:]], axis=-1)


@lru_cache(maxsize=2)
def _sheet(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGBA"), dtype=np.float32) / 255.0


@cache
def sprite(name: str, colour: str = "") -> Image.Image:
    """One object, cropped to its visible pixels.

    Args:
        name: One of `OBJECTS` or of `UNKNOWN`.
        colour: One of `COLOURS` for an object of `COLOURED`, or "" for its own colours.

    Returns:
        An RGBA image, at most `CELL` pixels on its longer side.
    """
    varied = {variant: form for each in VARIANTS.values() for variant, form in each.items()}.get(name)
    file, index = _CELLS[varied[0] if varied else name]
    row, column = divmod(index, COLUMNS)
    cell = _sheet(file)[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    if varied:
        cell = _varied(cell, *varied[1:])
    if colour:
        cell = _recoloured(cell, name, colour)
    image = Image.fromarray((cell * 255.0 + 0.5).astype(np.uint8), "RGBA")
    return image.crop(image.getchannel("A").getbbox())
