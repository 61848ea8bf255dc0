"""An edit at the base's size, composed into the photo at its own size."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lora_unitune.photo import composition
from lora_unitune.photo.composition import Changes, compose, find_changes

SIZES = [((64, 64), 8), ((80, 48), 5), ((48, 72), 10)]  # (width, height) of the base's image, enlargement


def photo(size: tuple[int, int], scale: int, seed: int = 0) -> np.ndarray:
    """A photo with soft regions of color, edges, and fine grain that the base's size doesn't hold."""
    rng = np.random.default_rng(seed)
    width, height = size
    colors = Image.fromarray(rng.integers(40, 216, (height // 8, width // 8, 3), dtype=np.uint8))
    large = np.asarray(colors.resize((width * scale, height * scale), Image.Resampling.BICUBIC), np.float32)
    large[:, : width * scale // 3] = 255 - large[:, : width * scale // 3]
    return (large + rng.normal(0, 12, large.shape)).clip(0, 255).round().astype(np.uint8)


def small(values: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The photo at the base's size."""
    reduced = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.LANCZOS))
    return torch.from_numpy(reduced.copy()).permute(2, 0, 1)[None].float() / 255


def whole(values: np.ndarray) -> tuple[int, int, int, int]:
    return 0, 0, values.shape[1], values.shape[0]


def enlarged(edit: Tensor, values: np.ndarray) -> np.ndarray:
    image = Image.fromarray((edit[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    return np.asarray(image.resize(values.shape[1::-1], Image.Resampling.LANCZOS))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = np.square(first.astype(float) - second).mean() / 255**2
    return -10 * math.log10(error)


def disk(size: tuple[int, int], radius: float) -> Tensor:
    """A disk in the middle of the picture, (1, 1, h, w), with soft edges."""
    y, x = torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="ij")
    away = ((x - size[0] / 2) ** 2 + (y - size[1] / 2) ** 2).sqrt()
    return (radius + 0.5 - away).clamp(0, 1)[None, None]


LIGHTS = {
    "night": lambda values: 255 * (values / 255 * [0.36, 0.42, 0.66]) ** 1.1,
    "sunset": lambda values: values * [0.98, 0.74, 0.62] + np.linspace(0, 30, len(values))[:, None, None],
    "gray": lambda values: np.repeat(values.mean(2, keepdims=True), 3, axis=2),
}


@pytest.mark.parametrize(("size", "scale"), SIZES)
@pytest.mark.parametrize("light", LIGHTS)
def test_other_light_keeps_the_photos_detail(light: str, size: tuple[int, int], scale: int) -> None:
    before = photo(size, scale)
    truth = LIGHTS[light](before.astype(float)).clip(0, 255).round().astype(np.uint8)
    edit = small(truth, size)
    changes = find_changes(small(before, size), edit)
    assert changes.kind == "relit"
    after = compose(before, changes, whole(before))
    assert psnr(after, truth) > max(30, psnr(enlarged(edit, before), truth) + 5)


@pytest.mark.parametrize(("size", "scale"), SIZES)
@pytest.mark.parametrize("error", [0.0, 0.02])
def test_what_an_edit_leaves_keeps_its_bytes(error: float, size: tuple[int, int], scale: int) -> None:
    """Neither a shift of all colors by the base's own error nor its noise is a change."""
    before = photo(size, scale)
    reduced = small(before, size)
    noise = error * torch.randn(reduced.shape, generator=torch.Generator().manual_seed(1)) / 2
    same = find_changes(reduced, (reduced + error + noise).clamp(0, 1))
    assert same.kind == "nothing"
    assert np.array_equal(compose(before, same, whole(before)), before)

    red = torch.tensor([0.9, 0.1, 0.1]).reshape(1, 3, 1, 1)
    edit = torch.lerp((reduced + error + noise).clamp(0, 1), red, disk(size, 9))
    changes = find_changes(reduced, edit)
    assert changes.kind == "local"
    after = compose(before, changes, whole(before))
    near = F.interpolate(disk(size, 13), scale_factor=scale)[0, 0].numpy() > 0
    assert np.array_equal(after[~near], before[~near])
    inside = F.interpolate(disk(size, 7), scale_factor=scale)[0, 0].numpy() == 1
    assert np.abs(after[inside] - np.array([230, 26, 26])).max() < 16, "nothing of the photo is left in it"


def test_light_and_a_new_thing_together() -> None:
    size, scale = (64, 64), 6
    before = photo(size, scale)
    truth = LIGHTS["night"](before.astype(float)).astype(np.uint8)
    moon = F.interpolate(disk(size, 8), scale_factor=scale, mode="bilinear")[0, 0].numpy()[..., None]
    truth = (truth * (1 - moon) + 240 * moon).round().astype(np.uint8)
    changes = find_changes(small(before, size), small(truth, size))
    assert changes.kind == "both"
    assert psnr(compose(before, changes, whole(before)), truth) > 30


def test_what_a_relit_picture_leaves_keeps_its_values() -> None:
    """As where the place changes behind a thing."""
    size, scale = (64, 64), 6
    before = photo(size, scale)
    reduced, left = small(before, size), torch.arange(64) < 32
    edit = torch.where(left, 0.4 * reduced, reduced)
    after = compose(before, find_changes(reduced, edit), whole(before))
    assert np.array_equal(after[:, 40 * scale :], before[:, 40 * scale :])
    assert psnr(after[:, : 24 * scale], 0.4 * before[:, : 24 * scale]) > 30


def test_an_unrelated_picture_is_enlarged() -> None:
    before, other = photo((64, 64), 4), small(photo((64, 64), 4, seed=5), (64, 64))
    changes = find_changes(small(before, (64, 64)), other)
    assert changes.kind == "restyled"
    assert np.array_equal(compose(before, changes, whole(before)), enlarged(changes.edit, before))


@pytest.mark.parametrize("enlargement", [4, 8])
def test_a_larger_base_finds_the_same_changes(enlargement: int) -> None:
    """A base of 512 pixels is no other than one of 64; what is new has its sharpness."""
    size, scale = (64, 64), 16
    before = photo(size, scale)
    red, around = torch.tensor([0.9, 0.1, 0.1]).reshape(1, 3, 1, 1), 9 * enlargement
    larger = (64 * enlargement, 64 * enlargement)
    reduced = small(before, larger)
    changes = find_changes(reduced, torch.lerp(reduced, red, disk(larger, around)))
    assert changes.kind == "local" and max(changes.replaced.shape) <= 128
    after = compose(before, changes, whole(before))
    near = F.interpolate(disk(larger, 12 * enlargement), scale_factor=scale // enlargement)[0, 0].numpy() > 0
    assert np.array_equal(after[~near], before[~near])
    dark = find_changes(reduced, 0.5 * reduced)
    assert dark.kind == "relit"
    assert np.abs(compose(before, dark, whole(before)) - 0.5 * before).mean() < 2
    torch.testing.assert_close(composition.apply_changes(reduced, dark), 0.5 * reduced, atol=0.02, rtol=0)


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_the_strips_leave_no_trace(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size, before = (64, 48), photo((64, 48), 4)
    edit = torch.lerp(0.5 * small(before, size), torch.ones(1, 3, 1, 1), disk(size, 9))
    changes = find_changes(small(before, size), edit)
    expected = compose(before, changes, whole(before))
    monkeypatch.setattr(composition, "_STRIP", rows * before.shape[1])
    assert np.array_equal(compose(before, changes, whole(before)), expected)


def test_beyond_what_the_base_saw_the_light_goes_on() -> None:
    size, seen = (48, 48), (100, 0, 340, 240)
    before = photo((88, 48), 5)
    middle = before[:, 100:340]
    dark = find_changes(small(middle, size), 0.5 * small(middle, size))
    after = compose(before, dark, seen)
    assert np.abs(after.astype(float) - 0.5 * before).mean() < 3
    new = torch.lerp(small(middle, size), torch.ones(1, 3, 1, 1), disk(size, 9))
    after = compose(before, find_changes(small(middle, size), new), seen)
    assert np.array_equal(after[:, :100], before[:, :100]) and np.array_equal(after[:, 340:], before[:, 340:])
    assert not np.array_equal(after, before)


def test_a_replaced_region_has_no_holes() -> None:
    size, before = (64, 64), photo((64, 64), 4)
    ring = disk(size, 14) - disk(size, 8)
    edit = torch.lerp(small(before, size), torch.ones(1, 3, 1, 1), ring)
    changes = find_changes(small(before, size), edit)
    assert isinstance(changes, Changes) and changes.replaced[0, 0, 32, 32] == 1
    assert changes.replaced[0, 0, :8].max() == 0


@pytest.mark.parametrize("light", LIGHTS)
def test_sixteen_bits_are_kept_and_relit_in_sixteen_bits(light: str) -> None:
    """What isn't relit keeps its values, and what is has more levels than 8 bits hold."""
    (size, scale), rng = SIZES[0], np.random.default_rng(0)
    shallow = photo(size, scale)
    deep = (shallow.astype(int) * 257 + rng.integers(-128, 129, shallow.shape)).astype(np.uint16)
    before = small(shallow, size)
    lit = small(LIGHTS[light](shallow.astype(float)).clip(0, 255).astype(np.uint8), size)
    changes = find_changes(before, lit)
    nothing = dataclasses.replace(
        changes,
        kind="relit",
        replaced=torch.zeros_like(changes.replaced),
        matrix=torch.eye(3)[None, :, :, None, None].repeat(1, 1, 1, *changes.offset.shape[-2:]),
        offset=torch.zeros_like(changes.offset),
    )
    assert np.array_equal(compose(deep, nothing, whole(deep)), deep)
    relit = compose(deep, changes, whole(deep))
    assert relit.dtype == np.uint16 and len(np.unique(relit)) > 10_000
    exact = compose((shallow.astype(np.uint16) * 257), changes, whole(deep)) / 257
    assert np.abs(exact - compose(shallow, changes, whole(deep))).max() <= 0.51
    masked = compose(deep, changes, whole(deep), np.zeros(deep.shape[:2], np.uint8))
    assert np.array_equal(masked, deep)
