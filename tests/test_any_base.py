"""One end-to-end test for bases of every family: fit, save, load, edit, hot-swap, and a base restored bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from conftest import at, unchanged, weights_of
from PIL import Image
from safetensors import safe_open

from lora_unitune import Adapter, Editor, describe, fit
from lora_unitune.adapter.convert import convert
from lora_unitune.families import Base, load_base
from lora_unitune.photo.reading import photo_to_tensor
from lora_unitune.recipe import Recipe
from lora_unitune.training.loop import denoising_error
from lora_unitune.training.prepare import prepare

KINDS = {"15": "epsilon", "21": "v_prediction", "xl": "epsilon", "flow": "flow"}
EDIT = ("edit.steps=4", "edit.guidance=3", "edit.strength=0.8")
FROM_NOISE: dict[str, Any] = {
    "strength": 1.0,
    "residual": True,
    "unconditional": "rare",
    "least_change": 0.4,
    "details": True,
}


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> Base:
    base: Base = request.getfixturevalue(f"base{request.param}")
    assert base.schedule().prediction == KINDS[request.param]
    return base


@pytest.fixture(scope="module")
def wide_photo() -> Image.Image:
    """A photo of aspect ratio 3 : 2 with structure."""
    x, y = np.meshgrid(np.linspace(0, 1, 96), np.linspace(0, 1, 64))
    pixels = np.stack([x, (np.sin(9 * x + 5 * y) + 1) / 2, y], -1)
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


@torch.no_grad()
def error_on(photo: Image.Image, base: Base, adapter: Adapter) -> float:
    """The base's loss on the photo with its rare tokens, with fixed noise."""
    prepared = prepare(at(photo, *adapter.size), Recipe().override(["prompt.rare_tokens="]), base)
    generator, schedule = torch.Generator().manual_seed(8), base.schedule(adapter.size)
    clean = prepared.mean.expand(32, -1, -1, -1)
    noise = torch.randn(clean.shape, generator=generator)
    condition = base.condition(adapter.rare_tokens)
    return denoising_error(base, schedule, clean, noise, torch.arange(32) * 31 + 15, condition).item()


def test_every_family_works_end_to_end(base: Base, wide_photo: Image.Image, tmp_path: Path) -> None:
    before, parts = weights_of(base), list(base.family.parts)
    rate = f"lora.{base.family.denoiser}.learning_rate=1e-2"
    overrides = ["fit.steps=30", rate, *EDIT]
    adapter = fit(wide_photo, base=base, recipe=Recipe(), overrides=overrides)
    assert unchanged(base, before) and len(adapter.history) == 30
    width, height = adapter.size
    assert width > height and width % base.size_step == height % base.size_step == 0
    assert {key.partition(".")[0] for key in adapter.tensors} == set(parts)

    adapter.save(tmp_path / "photo.safetensors")
    loaded = Adapter.load(tmp_path / "photo.safetensors")
    assert loaded.digest == adapter.digest and loaded.recipe == adapter.recipe
    assert (loaded.size, loaded.family, loaded.photo_digest) == (
        adapter.size,
        base.family.name,
        adapter.photo_digest,
    )
    assert describe(tmp_path / "photo.safetensors")["size"] == [width, height]

    with Editor(base) as editor:
        plain = error_on(wide_photo, base, loaded)
        first = editor.edit(loaded, "a fox", seed=3)
        assert first.image.size == adapter.size
        assert error_on(wide_photo, base, loaded) < plain, "the adapter is on the base now"
        assert editor.edit(adapter, "a fox", seed=3).image.tobytes() == first.image.tobytes()
        other = fit(
            wide_photo.rotate(180), base=load_again(base), recipe=Recipe(), overrides=overrides, seed=1
        )
        modules = [id(module) for part in base.parts.values() for module in part.modules()]
        swapped = editor.edit(other, "a fox", seed=3)
        assert [id(module) for part in base.parts.values() for module in part.modules()] == modules
        assert swapped.image.tobytes() != first.image.tobytes()
        assert editor.edit(loaded, "a fox", seed=3).image.tobytes() == first.image.tobytes()
        residual = editor.edit(loaded, "a fox", seed=3, residual=True, unconditional="base")
        assert residual.image.tobytes() != first.image.tobytes()
        from_noise = editor.edit(loaded, "a fox", seed=3, **FROM_NOISE)
        given = editor.edit(loaded, "a fox", seed=3, photo=wide_photo, **FROM_NOISE)
        assert given.base_image is not None and from_noise.image.size == given.base_image.size == adapter.size
        assert given.image.size == wide_photo.size
        assert len({each.image.tobytes() for each in (first, residual, from_noise, given)}) == 4
        assert editor.reconstruct(loaded).image.size == adapter.size
    assert unchanged(base, before)
    with Editor(base) as fresh:
        assert fresh.repeat(loaded, from_noise.settings).image.tobytes() == from_noise.image.tobytes()
        assert fresh.repeat(loaded, given.settings, wide_photo).image.tobytes() == given.image.tobytes()
        assert fresh.repeat(loaded, first.settings).image.tobytes() == first.image.tobytes()


def load_again(base: Base) -> Base:
    """Returns a second base with the same weights: while an Editor uses one, a fit needs another."""
    return load_base(FOLDERS[base.name], device="cpu")


FOLDERS: dict[str, str] = {}


@pytest.fixture(autouse=True)
def _folders(tiny_sd15: Path, tiny_sd21: Path, tiny_sdxl: Path, tiny_flow: Path) -> None:
    FOLDERS.update({folder.name: str(folder) for folder in (tiny_sd15, tiny_sd21, tiny_sdxl, tiny_flow)})


def test_a_base_of_another_kind_through_the_command_line_and_kohyas_layout(
    tiny_flow: Path, wide_photo: Image.Image, tmp_path: Path
) -> None:
    wide_photo.save(tmp_path / "photo.png")
    file, picture = tmp_path / "photo.safetensors", tmp_path / "out.png"
    quick = [part for value in ("fit.steps=2", *EDIT) for part in ("--set", value)]
    fitted = run("fit", tmp_path / "photo.png", "-o", file, "--base", tiny_flow, *quick, "--json")
    assert fitted.exit_code == 0, fitted.output
    assert json.loads(fitted.stdout)["family"] == "tiny-flow"
    edited = run("edit", file, "a fox", "-o", picture, "--base", tiny_flow)
    assert edited.exit_code == 0, edited.output
    with Image.open(picture) as image:
        assert image.size == Adapter.load(file).size
    convert(file, "kohya", tmp_path / "kohya.safetensors")
    with safe_open(tmp_path / "kohya.safetensors", framework="pt") as opened:
        assert all(key.startswith(("lora_transformer_", "lora_reader_")) for key in opened.keys())  # noqa: SIM118
    again = Adapter.load(tmp_path / "kohya.safetensors")
    assert again.digest == Adapter.load(file).digest


def test_encoding_and_decoding_keep_the_shape(base: Base, wide_photo: Image.Image) -> None:
    size = (base.size[0] + base.size_step, base.size[1])
    mean, std = base.encode(photo_to_tensor(at(wide_photo, *size)))
    assert mean.shape == std.shape == (1, *base.sample_shape(size))
    assert base.decode(mean).shape == (1, 3, size[1], size[0])
