"""Errors of an edit: one line each, and the base is unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import unchanged, weights_of
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
)
from random_adapters import LORA, changed, make_adapter, make_full_adapter

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import AdapterFileError, PhotoError, PromptError, SettingError
from lora_unitune.families import Base


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_prompt_is_one_line(editor: Editor, adapter: Adapter, prompt: Any) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        editor.edit(adapter, prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1001}, "steps = 1001"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"guidance": 0.5}, "guidance = 0.5 isn't allowed; give a number from 1"),
        ({"guidance": float("nan")}, "guidance = nan"),
        ({"guidance_rescale": 1.5}, "guidance_rescale = 1.5"),
        ({"strength": 0}, "strength = 0 isn't allowed"),
        ({"strength": 1.1}, "strength = 1.1"),
        ({"strength": 0.1}, "leaves none of 4 steps"),
        ({"adapter_scale": -1}, "adapter_scale = -1"),
        ({"unconditional": "nobody"}, "unconditional = 'nobody'"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, "seed = "),
        ({"seed": "one"}, "seed = 'one'"),
    ],
)
def test_impossible_settings_are_one_line(
    editor: Editor, adapter: Adapter, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        editor.edit(adapter, "a fox", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_impossible_counts_are_one_line(editor: Editor, adapter: Adapter, count: Any) -> None:
    with pytest.raises(SettingError, match="count = "):
        editor.edit_many(adapter, "a fox", count)


def test_the_steps_a_base_has_are_the_most_it_takes(tiny_sd15: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True)
    pipeline.scheduler = DDIMScheduler(
        num_train_timesteps=10, steps_offset=1
    )  # steps 1 to 10 aren't all there
    pipeline.save_pretrained(tmp_path / "base")
    editor = Editor(str(tmp_path / "base"), device="cpu")
    editor.edit(None, "a fox", steps=9)
    with pytest.raises(SettingError, match="steps = 10 is more than"):
        editor.edit(None, "a fox", steps=10)
    with pytest.raises(SettingError, match="takes from 1 to 10"):
        editor.edit(None, "a fox", steps=11)


def test_starting_from_a_photo_needs_one(editor: Editor, adapter: Adapter, tmp_path: Path) -> None:
    bare = replace(adapter, photo_latents=None)
    with pytest.raises(SettingError, match="pass photo=PATH, or strength=1"):
        editor.edit(bare, "a fox")
    with pytest.raises(SettingError, match="starts from the photo"):
        editor.edit(None, "a fox", strength=0.5)
    with pytest.raises(SettingError, match="doesn't hold its photo"):
        editor.photo_round_trip(bare)
    with pytest.raises(PhotoError, match="doesn't exist"):
        editor.edit(bare, "a fox", photo=tmp_path / "missing.jpg")
    editor.edit(bare, "a fox", strength=1.0, steps=1)


def test_an_adapter_of_another_base_is_one_line(base15: Base, base21: Base) -> None:
    with pytest.raises(AdapterFileError, match="was made for base"):
        Editor(base21).edit(make_adapter(base15), "a fox")
    with pytest.raises(AdapterFileError, match="was made for base"):
        Editor(base21).photo_round_trip(make_adapter(base15))


def test_tensors_that_dont_fit_the_base_are_one_line_and_change_nothing(
    base15: Base, editor: Editor, adapter: Adapter
) -> None:
    before = weights_of(base15)
    full = make_full_adapter(base15)
    good = editor.edit(adapter, "a fox", steps=2).image.tobytes()
    for made in (adapter, full):
        key = next(iter(made.tensors))
        fewer = {name: tensor for name, tensor in made.tensors.items() if name != key}
        for tensors in (fewer, {**fewer, key: torch.ones(3, 3)}, {**made.tensors, key + "x": torch.ones(3)}):
            with pytest.raises(AdapterFileError) as caught:
                editor.edit(replace(made, tensors=tensors), "a fox")
            assert "\n" not in str(caught.value)
            assert editor.edit(adapter, "a fox", steps=2).image.tobytes() == good
    unfit = replace(
        adapter, recipe=replace(adapter.recipe, lora=changed(LORA, unet={"targets": ("nothing",)}))
    )
    with pytest.raises(AdapterFileError, match="doesn't suit the base"):
        editor.edit(unfit, "a fox")
    wrong_shape = replace(adapter, photo_latents=torch.ones(1, 4, 3, 3))
    with pytest.raises(AdapterFileError, match="latents in the adapter have shape"):
        editor.edit(wrong_shape, "a fox")
    editor.release()
    assert unchanged(base15, before)


def test_full_adapters_cant_use_the_base_for_the_empty_prompt(base15: Base, editor: Editor) -> None:
    adapter = make_full_adapter(base15)
    with pytest.raises(SettingError, match="needs an adapter of method 'lora'"):
        editor.edit(adapter, "a fox", unconditional="base")
    edit = replace(adapter.recipe.edit, unconditional="base")
    edited = editor.edit(replace(adapter, recipe=replace(adapter.recipe, edit=edit)), "a fox")
    assert edited.settings["unconditional"] == "adapter"
