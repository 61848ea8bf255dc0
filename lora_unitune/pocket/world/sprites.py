"""The objects of the pocket world, from a sprite sheet that is bundled with the package.

The pictures come from Noto Color Emoji (SIL Open Font License 1.1, Debian package `fonts-noto-color-emoji`).
They were rendered once, by `pocket/pretraining/sprite_sheet.py`, so that nobody needs the font.
"""

from __future__ import annotations

import colorsys
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SHEET = Path(__file__).with_name("sprites.png")
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


@lru_cache(maxsize=1)
def _sheet() -> np.ndarray:
    with Image.open(SHEET) as image:
        return np.asarray(image.convert("RGBA"), dtype=np.float32) / 255.0


@cache
def sprite(name: str, colour: str = "") -> Image.Image:
    """One object, cropped to its visible pixels.

    Args:
        name: One of `OBJECTS`.
        colour: One of `COLOURS` for an object of `COLOURED`, or "" for its own colours.

    Returns:
        An RGBA image, at most `CELL` pixels on its longer side.
    """
    row, column = divmod(OBJECTS.index(name), COLUMNS)
    cell = _sheet()[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    if colour:
        cell = _recoloured(cell, name, colour)
    image = Image.fromarray((cell * 255.0 + 0.5).astype(np.uint8), "RGBA")
    return image.crop(image.getchannel("A").getbbox())
