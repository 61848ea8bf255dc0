"""Draws the places, the light and the looks of the pocket world."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps

Rgb = tuple[int, int, int]
Values = NDArray[np.float64]
"""A picture, (h, w, 3), in [0, 1]."""

SKY: dict[str, tuple[Rgb, Rgb]] = {  # top, horizon
    "day": ((84, 160, 235), (196, 228, 248)),
    "sunset": ((98, 62, 128), (255, 158, 84)),
    "night": ((8, 12, 40), (36, 48, 98)),
}
LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.98, 0.74, 0.62),
    "night": (0.36, 0.42, 0.66),
}
OBJECT_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.86, 0.76),
    "night": (0.62, 0.68, 0.88),
}
SUNS = (3 / 16, 8 / 16, 13 / 16)
"""Positions of the sun or the moon. Like objects, backgrounds vary in few ways, a latent or more apart."""
HORIZONS = (8 / 16, 9 / 16)
PHASES = (0.0, 1.57, 3.14, 4.71)  # of rolling lines
BLOCKS = 32
"""Blocks of pixel art along a side."""
PAPER = np.array([250.0, 248.0, 242.0])
SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])


def _lit(colour: Rgb, time: str) -> Rgb:
    return tuple(int(c * f) for c, f in zip(colour, LIGHT[time], strict=True))  # type: ignore[return-value]


def _wave(
    draw: ImageDraw.ImageDraw, side: int, height: float, swing: float, phase: float, colour: Rgb
) -> None:
    """Fills everything below a rolling line; height and swing are fractions of the side."""
    points = [(0.0, float(side)), (float(side), float(side))]
    for step in range(16, -1, -1):
        along = step / 16
        points.append((along * side, side * (height - swing * math.sin(phase + along * 4.4))))
    draw.polygon(points, fill=colour)


def sky(side: int, time: str, horizon: float, rng: random.Random) -> Image.Image:
    """A sky with its sun, setting sun, or moon and stars, `side` × `side` pixels."""
    top, bottom = (np.array(c, dtype=np.float32) for c in SKY[time])
    along = np.clip(np.arange(side, dtype=np.float32) / (side * horizon), 0, 1)[:, None, None]
    rows = np.broadcast_to(top * (1 - along) + bottom * along, (side, side, 3))
    image = Image.fromarray(rows.astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(image)
    x = side * rng.choice(SUNS)
    if time == "night":
        for _ in range(7):
            a, b, r = rng.random() * side, rng.random() * side * horizon * 0.8, side * 0.011
            draw.ellipse((a - r, b - r, a + r, b + r), fill=(235, 235, 210))
        y, radius, colour = side * 0.14, side * 0.075, (244, 240, 205)
    elif time == "sunset":
        y, radius, colour = side * (horizon - 0.02), side * 0.13, (255, 236, 140)
    else:
        y, radius, colour = side * 0.13, side * 0.08, (255, 232, 90)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def _meadow(image: Image.Image, time: str, horizon: float, rng: random.Random) -> None:
    draw, side = ImageDraw.Draw(image), image.width
    _wave(draw, side, horizon, 0.05, rng.choice(PHASES), _lit((122, 190, 90), time))
    _wave(draw, side, horizon + 0.13, 0.03, rng.choice(PHASES), _lit((84, 168, 62), time))


def _beach(image: Image.Image, time: str, horizon: float, rng: random.Random) -> None:
    draw, side = ImageDraw.Draw(image), image.width
    draw.rectangle((0, side * horizon, side, side), fill=_lit((38, 118, 188), time))
    phase = rng.choice(PHASES)
    _wave(draw, side, horizon + 0.165, 0.02, phase, _lit((236, 246, 246), time))
    _wave(draw, side, horizon + 0.19, 0.02, phase, _lit((240, 214, 158), time))


def _desert(image: Image.Image, time: str, horizon: float, rng: random.Random) -> None:
    draw, side = ImageDraw.Draw(image), image.width
    _wave(draw, side, horizon - 0.02, 0.075, rng.choice(PHASES), _lit((226, 158, 84), time))
    _wave(draw, side, horizon + 0.13, 0.06, rng.choice(PHASES), _lit((204, 126, 58), time))


def _snow(image: Image.Image, time: str, horizon: float, rng: random.Random) -> None:
    draw, side = ImageDraw.Draw(image), image.width
    for centre in (rng.choice((2 / 16, 5 / 16)), rng.choice((11 / 16, 14 / 16))):
        peak, half = side * (horizon - rng.choice((4 / 16, 5 / 16))), side * 0.33
        x, base = side * centre, side * (horizon + 0.04)
        draw.polygon([(x - half, base), (x, peak), (x + half, base)], fill=_lit((126, 142, 170), time))
        cap = 0.38
        left, right, low = x - half * cap, x + half * cap, peak + (base - peak) * cap
        draw.polygon([(left, low), (x, peak), (right, low)], fill=_lit((250, 252, 255), time))
    _wave(draw, side, horizon + 0.02, 0.02, rng.choice(PHASES), _lit((238, 244, 252), time))


def _forest(image: Image.Image, time: str, horizon: float, rng: random.Random) -> None:
    draw, side = ImageDraw.Draw(image), image.width
    shift, base = rng.choice((-1 / 16, 0.0, 1 / 16)), side * (horizon + 0.1)
    for index in range(7):
        x, half = side * (index / 6 + shift), side * 0.115
        top = side * (horizon - (0.36 if index % 2 else 0.27) - rng.choice((0.0, 1 / 16)))
        colour = _lit((30, 98, 58) if index % 2 else (44, 122, 66), time)
        draw.rectangle(
            (x - side * 0.018, base - side * 0.08, x + side * 0.018, base), fill=_lit((96, 64, 40), time)
        )
        draw.polygon([(x - half, base - side * 0.06), (x, top), (x + half, base - side * 0.06)], fill=colour)
    _wave(draw, side, horizon + 0.08, 0.012, rng.choice(PHASES), _lit((88, 116, 56), time))


def _city(image: Image.Image, time: str, horizon: float, rng: random.Random) -> None:
    draw, side = ImageDraw.Draw(image), image.width
    walls = ((150, 110, 100), (112, 126, 148), (170, 150, 120), (128, 104, 132), (96, 120, 126))
    first, base, window = rng.randrange(5), side * (horizon + 0.08), (255, 226, 120)
    for index in range(5):
        left, right = side * index / 5, side * (index + 1) / 5
        top = side * (horizon - rng.choice((2 / 16, 4 / 16, 6 / 16)))
        draw.rectangle((left, top, right - 1, base), fill=_lit(walls[(first + index) % 5], time))
        pane = window if time == "night" else _lit((206, 226, 238), time)
        y = top + side * 0.045
        while y < base - side * 0.06:
            for x in (left + side * 0.04, left + side * 0.115):
                draw.rectangle((x, y, x + side * 0.04, y + side * 0.045), fill=pane)
            y += side * 0.1
    draw.rectangle((0, base, side, side), fill=_lit((104, 104, 112), time))
    draw.rectangle((0, base, side, base + side * 0.05), fill=_lit((184, 182, 178), time))


def _room(image: Image.Image, time: str, horizon: float, rng: random.Random) -> None:
    draw, side = ImageDraw.Draw(image), image.width
    outside = image.resize((round(side * 0.42), round(side * 0.42)), Image.Resampling.BILINEAR)
    wall = rng.choice(((238, 214, 180), (216, 204, 226), (190, 220, 206)))
    floor = round(side * (horizon + 0.12))
    draw.rectangle((0, 0, side, side), fill=_lit(wall, time))
    draw.rectangle((0, floor, side, side), fill=_lit((158, 104, 64), time))
    draw.rectangle((0, floor - side // 32, side, floor), fill=_lit((250, 246, 238), time))
    x, y, frame = round(side * rng.choice((1 / 16, 5 / 16, 8 / 16))), round(side * 0.08), round(side * 0.022)
    end = (x + outside.width, y + outside.height)
    draw.rectangle((x - frame, y - frame, end[0] + frame, end[1] + frame), fill=_lit((250, 246, 238), time))
    image.paste(outside, (x, y))
    middle = x + outside.width // 2
    draw.rectangle((middle - frame // 2, y, middle + frame // 2, end[1]), fill=_lit((250, 246, 238), time))


PLACES: dict[str, Callable[[Image.Image, str, float, random.Random], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "desert": _desert,
    "snow": _snow,
    "forest": _forest,
    "city": _city,
    "room": _room,
}


def backdrop(side: int, place: str, time: str, rng: random.Random) -> Image.Image:
    """A place at a time of day, RGB, `side` × `side` pixels."""
    horizon = rng.choice(HORIZONS)
    image = sky(side, time, horizon, rng)
    PLACES[place](image, time, horizon, rng)
    return image


def stand(image: Image.Image, sprite: Image.Image, time: str, x: float, bottom: float, size: float) -> None:
    """Pastes a sprite into the image; x (centre), bottom and size (longer side) are fractions of the side."""
    side = image.width
    scale = size * side / max(sprite.size)
    shape = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    small = sprite.resize(shape, Image.Resampling.LANCZOS)
    light = zip(small.split()[:3], OBJECT_LIGHT[time], strict=True)
    bands = [band.point(lambda v, share=share: int(v * share)) for band, share in light]
    corner = (round(x * side - shape[0] / 2), round(bottom * side - shape[1]))
    image.paste(Image.merge("RGB", bands), corner, small.getchannel("A"))


def night(values: Values) -> Values:
    """A picture taken by day, as if at night."""
    dark: Values = np.clip(values * LIGHT["night"], 0, 1) ** 1.15
    return dark


def sunset(values: Values) -> Values:
    """Warm light with a glow at half the height."""
    glow = 1 - np.abs(np.linspace(-1, 1, len(values)))[:, None, None]
    warm: Values = np.clip(values * LIGHT["sunset"] + glow * (0.12, 0.05, -0.02), 0, 1)
    return warm


def sepia(values: Values) -> Values:
    """Toned, with dark corners."""
    down, along = (np.linspace(-1, 1, side) for side in values.shape[:2])
    corners = 1 - 0.42 * np.clip(down[:, None] ** 2 + along[None] ** 2 - 0.25, 0, 1.5)
    toned: Values = np.clip(values @ SEPIA.T * 0.92 + 8 / 255, 0, 1) * corners[..., None]
    return toned


def _sketch(image: Image.Image, size: int) -> Image.Image:
    grey = ImageOps.grayscale(image)
    soft = np.asarray(grey.filter(ImageFilter.GaussianBlur(image.width / 42)), dtype=np.float32)
    tone = np.asarray(grey, dtype=np.float32)
    lines = np.clip((tone + 24.0) / (soft + 24.0), 0.0, 1.0) ** 2.2
    page = (lines * (0.5 + 0.5 * tone / 255.0))[..., None] * PAPER
    return Image.fromarray(page.astype(np.uint8), "RGB").resize((size, size), Image.Resampling.LANCZOS)


def _pixel_art(image: Image.Image, size: int) -> Image.Image:
    blocks = image.resize((BLOCKS, BLOCKS), Image.Resampling.BOX)
    levels = np.round(np.asarray(blocks, dtype=np.float32) / 51.0) * 51.0
    return Image.fromarray(levels.astype(np.uint8), "RGB").resize((size, size), Image.Resampling.NEAREST)


def _sepia(image: Image.Image, size: int) -> Image.Image:
    small = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float64)
    return Image.fromarray((sepia(small / 255.0) * 255.0).astype(np.uint8), "RGB")


def _plain(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.LANCZOS)


LOOKS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "plain": _plain,
    "sketch": _sketch,
    "pixel": _pixel_art,
    "sepia": _sepia,
}
