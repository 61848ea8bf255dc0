"""Quantized linear layers: they predict nearly the same, need less memory, and adapters can be trained on them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from lora_unitune import Editor
from lora_unitune.errors import SettingError
from lora_unitune.families import POCKET_FOLDER, Base, load_base
from lora_unitune.pocket.world import draw_scene, render
from lora_unitune.recipe import Recipe
from lora_unitune.training.fit import fit


def answer(base: Base) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return base.predict(latents, torch.tensor([500]), base.condition("a dog"))


def linear_bytes(base: Base) -> int:
    layers = [m for part in base.parts.values() for m in part.modules() if isinstance(m, nn.Linear)]
    return sum(layer.weight.nbytes for layer in layers)


@pytest.mark.parametrize(("quantize", "error", "share"), [("int8", 0.05, 0.3), ("nf4", 0.35, 0.2)])
@torch.no_grad()
def test_a_quantized_base_predicts_nearly_the_same_and_is_smaller(
    basepocket: Base, quantize: str, error: float, share: float
) -> None:
    rounded = load_base("pocket", "cpu", quantize=quantize)
    whole, ours = answer(basepocket), answer(rounded)
    assert 0 < (ours - whole).norm() < error * whole.norm()
    assert linear_bytes(rounded) < share * linear_bytes(basepocket)
    assert rounded.fingerprint == basepocket.fingerprint and rounded.quantized == quantize


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_an_adapter_trained_on_a_quantized_base_works_on_the_full_precision_one(
    basepocket: Base, quantize: str
) -> None:
    losses: list[float] = []
    photo = render(draw_scene(0, "held-out"))
    recipe = Recipe.load("pocket/default").override(["fit.steps=12", f"fit.quantize={quantize}"])
    adapter = fit(photo, recipe=recipe, device="cpu", on_step=lambda *step: losses.append(step[2]))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    editor = Editor(basepocket)
    assert editor.edit(adapter, "a fox", steps=2).image.size == (64, 64)
    editor.release()


def test_what_cant_be_quantized_is_one_line(
    base15: Base, photo_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="a base that the fit loads"):
        fit(photo_image, base=base15, recipe=Recipe(), overrides=["fit.quantize=nf4"])
    with pytest.raises(SettingError, match="rounded weights can't be trained"):
        fit(photo_image, overrides=["fit.quantize=nf4", "fit.method=full"], device="cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(SettingError, match="'int8' needs bitsandbytes.*fit.quantize=none"):
        load_base(str(Path(POCKET_FOLDER)), "cpu", quantize="int8")
