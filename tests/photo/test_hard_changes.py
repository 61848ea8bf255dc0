"""Edits that are hard to compose, each with its true answer: the photo's own size, changed by a function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from lora_unitune.photo.composition import compose, find_changes

SIDE, SCALE = 64, 8
WHOLE = 0, 0, SIDE * SCALE, SIDE * SCALE
CELL = np.arange(SIDE * SCALE) / SCALE
"""Places along a side of the photo, in pixels of the base."""
Values = np.ndarray


def photo(seed: int = 0) -> Values:
    """Soft colors with fine detail that the base's size doesn't hold, (512, 512, 3) in [0, 1]."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(90, 200, (6, 6, 3), dtype=np.uint8)).resize(
        (512, 512), Image.Resampling.BICUBIC
    )
    grain = Image.fromarray(rng.integers(0, 255, (170, 170), dtype=np.uint8)).resize(
        (512, 512), Image.Resampling.BILINEAR
    )
    return (np.asarray(soft) / 255 + 0.15 * (np.asarray(grain)[..., None] / 255 - 0.5)).clip(0, 1)


def to_bytes(values: Values) -> Values:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def small(values: Values) -> Tensor:
    reduced = Image.fromarray(to_bytes(values)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(reduced).copy()).permute(2, 0, 1)[None].float() / 255


def enlarged(values: Values) -> Values:
    reduced = Image.fromarray(to_bytes(values)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(reduced.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.LANCZOS))


def edited(before: Values, truth: Values, styled: bool = False) -> tuple[str, Values]:
    """The kind of an edit that is right at the base's size, and the photo with it."""
    changes = find_changes(small(before), small(truth), styled)
    return changes.kind, compose(to_bytes(before), changes, WHOLE)


def error(edit: Values, truth: Values, where: Values | slice = slice(None)) -> float:
    """Root mean square error of values in [0, 1]."""
    return float(np.sqrt(np.square(edit[where] / 255 - truth.clip(0, 1)[where]).mean()))


def drawn(
    before: Values, color: tuple[int, int, int], shape: str, *places: float, blur: float = 0, width: int = 1
) -> Values:
    """The photo with an ellipse or a line; places in pixels of the base."""
    mask = Image.new("L", (SIDE * SCALE, SIDE * SCALE))
    corners = [place * SCALE for place in places]
    draw = ImageDraw.Draw(mask)
    draw.ellipse(corners, fill=255) if shape == "ellipse" else draw.line(corners, fill=255, width=width)
    part = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur * SCALE)))[..., None] / 255
    return before * (1 - part) + part * np.array(color) / 255


def test_clipped_highlights_stay_clipped_and_the_rest_keeps_its_detail() -> None:
    """A brighter picture loses what is above white; a darker one of a photo with white parts has no detail there."""
    before = photo()
    for light in (lambda values: 1.7 * values, lambda values: 0.5 * values):
        bright = drawn(before, (255, 255, 255), "ellipse", 10, 10, 30, 30, blur=1.5)
        truth = light(bright).clip(0, 1)
        kind, after = edited(bright, truth)
        assert kind in ("relit", "both")
        assert error(after, truth) < 0.6 * error(enlarged(truth), truth)
    white = (1.7 * before).min(2) > 1.1
    assert white.any() and edited(before, (1.7 * before).clip(0, 1))[1][white].min() > 240


@pytest.mark.parametrize("angle", [(4, 8, 60, 20), (8, 4, 20, 60)])
def test_thin_lines_are_kept_and_taken_out(angle: tuple[int, ...]) -> None:
    """Thinner than a pixel of the base they keep their sharpness; from about a pixel on, they can be taken out."""
    before = photo()
    wire = drawn(before, (20, 20, 20), "line", *angle, width=3)
    kind, after = edited(wire, 0.5 * wire)
    assert kind == "relit" and error(after, 0.5 * wire) < 0.5 * error(enlarged(0.5 * wire), 0.5 * wire)
    wire = drawn(before, (0, 0, 0), "line", *angle, width=12)
    on = np.abs(wire - before).max(2) > 0.2
    kind, after = edited(wire, before)
    assert kind == "local"
    assert error(after, before, on) < 0.25 * error(to_bytes(wire), before, on), "nothing of it is left"


def test_a_moved_object_leaves_no_ghost() -> None:
    """Neither of its body nor of its edges, and the photo keeps its bytes around both places."""
    before = photo()
    here = drawn(before, (230, 30, 30), "ellipse", 8, 24, 24, 40)
    there = drawn(before, (230, 30, 30), "ellipse", 40, 24, 56, 40)
    kind, after = edited(here, there)
    assert kind == "local"
    step = np.diff(to_bytes(here).astype(float), axis=1)
    edge = (np.abs(step).max(2) > 60) & (CELL[1:] < 32)
    left = np.diff(after.astype(float), axis=1)[edge]
    assert edge.sum() > 100 and np.square(left).sum() < 0.05 * np.square(step[edge]).sum()
    down, along = CELL[:, None], CELL[None]
    near = [(down - 32) ** 2 + (along - x) ** 2 < 11.5**2 for x in (16, 48)]
    assert np.array_equal(after[~(near[0] | near[1])], to_bytes(here)[~(near[0] | near[1])])
    assert error(after, there, near[1]) < 0.06


@pytest.mark.parametrize("softness", [0.5, 3.0])
def test_a_shadow_keeps_the_detail_of_what_it_falls_on(softness: float) -> None:
    before = photo()
    shadow = drawn(np.ones_like(before), (110, 110, 130), "ellipse", 12, 16, 52, 50, blur=softness)
    truth = before * shadow
    kind, after = edited(before, truth)
    assert kind != "nothing"
    assert error(after, truth) < 0.75 * error(enlarged(truth), truth)
    assert np.array_equal(after[:48], to_bytes(before)[:48]), "outside of it nothing changes"


# The kind of an edit


def pixel_art(values: Values) -> Values:
    blocks = Image.fromarray(to_bytes(values)).resize((24, 24), Image.Resampling.BOX)
    return np.round(np.asarray(blocks.resize((512, 512), Image.Resampling.NEAREST)) / 51) / 5


def outlines(values: Values) -> Values:
    gray = Image.fromarray(to_bytes(values)).convert("L")
    soft = np.asarray(gray.filter(ImageFilter.GaussianBlur(12)), float)
    lines = ((np.asarray(gray) + 20.0) / (soft + 20)).clip(0, 1) ** 4
    return np.repeat(lines[..., None], 3, 2)


@pytest.mark.parametrize("style", [pixel_art, outlines])
@pytest.mark.parametrize("seed", range(3))
def test_another_style_is_no_light(style: object, seed: int) -> None:
    """Whether the prompt names it or not; it looks as at the base's size, but for detail that both share."""
    before = photo(seed)
    for place in (12, 30, 48):
        before = drawn(before, (60 * seed, 200, 255 - 80 * seed), "ellipse", place - 8, 20, place + 8, 44)
    truth = style(before)  # type: ignore[operator]
    for styled in (False, True):
        kind, after = edited(before, truth, styled)
        assert kind == "restyled"
        assert error(after, truth) < 1.5 * error(enlarged(truth), truth)
    assert edited(before, 0.5 * before, styled=True)[0] == "relit", "words alone don't decide"
