"""Edits: they equal plain diffusers, are reproducible, and leave the base unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import has_adapters, saved_and_loaded, unchanged, weights_of
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)
from PIL import Image
from random_adapters import EDIT, LORA, changed, make_adapter, make_full_adapter

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.cache import AdapterCache
from lora_unitune.editing.editor import Editor
from lora_unitune.editing.start import Start
from lora_unitune.errors import AdapterFileError, SettingError
from lora_unitune.families import Base
from lora_unitune.settings import LoraSettings


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(np.int16)


# Invariants


def test_saving_and_loading_changes_no_output(editor: Editor, adapter: Adapter, tmp_path: Path) -> None:
    assert adapter.photo_latents is not None
    rounded = replace(
        adapter,
        tensors={key: tensor.half().float() for key, tensor in adapter.tensors.items()},
        photo_latents=adapter.photo_latents.half().float(),
    )
    loaded = saved_and_loaded(adapter, tmp_path / "photo.safetensors")
    first, second = editor.edit(rounded, "a fox"), editor.edit(loaded, "a fox")
    assert first.image.tobytes() == second.image.tobytes()
    assert first.settings == second.settings


def test_edits_and_swaps_restore_the_base_bit_for_bit(base15: Base, editor: Editor) -> None:
    before = weights_of(base15)
    plain = editor.edit(None, "a fox", steps=2).image.tobytes()
    other = {"unet": LoraSettings(2, targets=("to_q", "conv1")), "text_encoder": LoraSettings(0)}
    for adapter in (
        make_adapter(base15),
        make_adapter(base15, seed=5),
        make_full_adapter(base15),
        make_adapter(base15, other),
        make_full_adapter(base15),
    ):
        for settings in ({}, {"adapter_scale": 0.5}, {"strength": 1.0, "guidance": 1.0}):
            editor.edit(adapter, "a fox", steps=2, **settings)
    editor.release()
    assert not has_adapters(base15)
    assert unchanged(base15, before)
    assert editor.edit(None, "a fox", steps=2).image.tobytes() == plain


def test_a_swapped_adapter_edits_as_in_a_fresh_editor(base15: Base, editor: Editor) -> None:
    other = {"unet": LoraSettings(2, targets=("to_q",)), "text_encoder": LoraSettings(0)}
    same_shapes = changed(LORA, unet={"alpha": 1.0})
    made = [
        make_adapter(base15),
        make_adapter(base15, seed=5),
        make_adapter(base15, same_shapes, seed=5),
        make_full_adapter(base15),
        make_adapter(base15, other),
    ]
    fresh = []
    for adapter in made:
        alone = Editor(base15)
        fresh.append(alone.edit(adapter, "a fox", steps=2).image.tobytes())
        alone.release()
    assert len(set(fresh)) == len(made)
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 1, 0, 2]):
        for index in order:
            assert editor.edit(made[index], "a fox", steps=2).image.tobytes() == fresh[index]


def test_an_adapter_of_the_same_layout_is_exchanged_in_place(base15: Base, editor: Editor) -> None:
    first, second = make_adapter(base15), make_adapter(base15, seed=5)
    editor.edit(first, "a fox", steps=1, strength=1)
    modules = [id(module) for module in base15.parts["unet"].modules()]
    editor.edit(second, "a fox", steps=1, strength=1)
    assert [id(module) for module in base15.parts["unet"].modules()] == modules


def test_attached_layers_have_the_capacity_for_every_adapter_used_so_far(
    base15: Base, editor: Editor
) -> None:
    other = {"unet": LoraSettings(2, targets=("to_q", "conv1")), "text_encoder": LoraSettings(0)}
    made = [make_adapter(base15), make_adapter(base15, other)]
    for adapter in made:
        editor.edit(adapter, "a fox", steps=1, strength=1)
    modules = [id(module) for module in base15.parts["unet"].modules()]
    for adapter in made:
        editor.edit(adapter, "a fox", steps=1, strength=1)
    assert [id(module) for module in base15.parts["unet"].modules()] == modules


def test_the_last_adapters_stay_in_memory_within_a_budget(base15: Base, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        make_adapter(base15, seed=number).save(path)
    one = AdapterCache(10**9)
    first = one.open(paths[0])
    assert one.open(paths[0]) is first and one.open(paths[0], trigger="zqrt") is not first
    cache = AdapterCache(2 * one.size // 2 + 1)
    opened = [cache.open(path) for path in paths]
    assert cache.size <= cache.budget
    assert cache.open(paths[2]) is opened[2] and cache.open(paths[0]) is not opened[0]
    make_adapter(base15, seed=9).save(paths[2], overwrite=True)
    assert cache.open(paths[2]).digest != opened[2].digest, "a file that changed is read again"
    assert AdapterCache(0).open(paths[0]).digest == first.digest
    with pytest.raises(AdapterFileError, match="doesn't exist"):
        Editor(base15).open(tmp_path / "none.safetensors")


def test_adapter_scale_0_is_the_plain_base(base15: Base, editor: Editor, adapter: Adapter) -> None:
    settings = replace(EDIT, strength=1.0, adapter_scale=0.0)
    plain = editor.pixels(None, ["a fox"], "", None, [0], settings)
    for made in (adapter, make_full_adapter(base15)):
        assert torch.equal(editor.pixels(made, ["a fox"], "", None, [0], settings), plain)
        scaled = editor.pixels(made, ["a fox"], "", None, [0], replace(settings, adapter_scale=1.0))
        assert not torch.equal(scaled, plain)


def test_the_base_can_predict_the_empty_prompt(editor: Editor, adapter: Adapter) -> None:
    settings = replace(EDIT, strength=1.0, guidance_rescale=0.0)
    with_adapter = editor.pixels(adapter, ["zqrt a fox"], "", None, [0], settings)
    with_base = editor.pixels(adapter, ["zqrt a fox"], "", None, [0], replace(settings, unconditional="base"))
    assert not torch.equal(with_adapter, with_base)
    assert torch.equal(with_adapter, editor.pixels(adapter, ["zqrt a fox"], "", None, [0], settings))
    unscaled = replace(settings, adapter_scale=0.0)
    torch.testing.assert_close(
        editor.pixels(adapter, ["zqrt a fox"], "", None, [0], unscaled),
        editor.pixels(adapter, ["zqrt a fox"], "", None, [0], replace(unscaled, unconditional="base")),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("layout", ["sd15", "sd21"])
def test_a_residual_adds_to_the_photo_what_the_prompt_changed(
    request: pytest.FixtureRequest, layout: str
) -> None:
    base: Base = request.getfixturevalue(f"base{layout[2:]}")
    editor, adapter = Editor(base), make_adapter(base)
    photo, settings = adapter.photo_latents, replace(EDIT, strength=0.8, residual=True)
    assert photo is not None

    def drawn(text: str, **changes: Any) -> torch.Tensor:
        return editor.pixels(
            adapter, [text], "", Start(adapter.size, photo), [3], replace(settings, **changes)
        )

    text = f"{adapter.rare_tokens} a fox"
    torch.testing.assert_close(drawn(adapter.rare_tokens), base.decode(photo))
    assert (drawn(text) - base.decode(photo)).abs().max() > 1e-3
    together = editor.pixels(
        adapter, [adapter.rare_tokens, text], "", Start(adapter.size, photo), [4, 3], settings
    )
    torch.testing.assert_close(together[1:], drawn(text))

    once = drawn(text, steps=2, strength=0.5, guidance=1.0)  # one step: from the noised photo to clean
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(3))
    sampler, first = base.sampler(2, skip=1), torch.tensor([0])
    noisy = sampler.levels.add_noise(photo, noise, first)
    whole, rare = (
        sampler.levels.clean(base.predict(noisy, sampler.timesteps, base.condition(words)), noisy, first)
        for words in (text, adapter.rare_tokens)
    )
    torch.testing.assert_close(once, base.decode(photo + whole - rare))
    editor.release()


@pytest.mark.parametrize("kind", [EulerAncestralDiscreteScheduler, HeunDiscreteScheduler])
def test_a_residual_uses_only_the_timesteps_of_a_sampler(
    base15: Base, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    other = kind.from_config(base15.make_scheduler(skip=1).config, timestep_spacing="trailing")
    ours = base15.make_scheduler(skip=1).from_config(other.config)
    settings, pictures = replace(EDIT, strength=0.6, residual=True), []
    for sampler in (ours, other):
        monkeypatch.setattr(base15, "make_scheduler", lambda skip, sampler=sampler: sampler)
        pictures.append(Editor(base15).pixels(
            adapter, [f"{adapter.rare_tokens} a fox"], "", Start(adapter.size, adapter.photo_latents), [3], settings
        ))  # fmt: skip
        Editor(base15).release()
    torch.testing.assert_close(*pictures)


def test_without_a_photo_there_is_no_residual(editor: Editor, adapter: Adapter) -> None:
    from_noise = replace(EDIT, strength=1.0)
    with_and_without = [
        editor.pixels(adapter, ["zqrt a fox"], "", None, [0], replace(from_noise, residual=residual))
        for residual in (True, False)
    ]
    assert torch.equal(*with_and_without)


def test_guidance_acts_on_its_interval_only(editor: Editor, adapter: Adapter) -> None:
    settings = replace(EDIT, strength=1.0)

    def drawn(**changes: float) -> torch.Tensor:
        return editor.pixels(adapter, ["zqrt a fox"], "", None, [0], replace(settings, **changes))

    guided, plain = drawn(), drawn(guidance=1.0)
    assert torch.equal(drawn(guidance_start=1.0), plain)
    assert torch.equal(drawn(guidance_stop=0.0), plain)
    for interval in ({"guidance_start": 0.5}, {"guidance_stop": 0.5}):
        partly = drawn(**interval)
        assert not torch.equal(partly, plain) and not torch.equal(partly, guided)


def test_many_edits_equal_single_ones_with_consecutive_seeds(editor: Editor, adapter: Adapter) -> None:
    for size in (1, 2, 8):
        many = editor.edit_many(adapter, "a fox", 3, seed=7, guidance=3.0, batch_size=size)
        for index, edit in enumerate(many):
            assert edit.settings["seed"] == 7 + index
            alone = editor.edit(adapter, "a fox", seed=7 + index, guidance=3.0)
            assert alone.settings == edit.settings
            assert np.abs(pixels(alone.image) - pixels(edit.image)).max() <= (0 if size == 1 else 1)
        assert len({edit.image.tobytes() for edit in many}) == 3


def test_a_batch_that_memory_cannot_hold_is_halved(
    base15: Base, editor: Editor, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, sizes = base15.predict, list[int]()

    def on_a_small_card(noisy: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(noisy))
        if len(noisy) > 2:
            raise torch.OutOfMemoryError("the card is full")
        return predict(noisy, *others)

    settings: dict[str, Any] = {"guidance": 1.0, "steps": 2, "strength": 1.0}
    expected = editor.edit_many(adapter, "a fox", 5, batch_size=2, **settings)
    monkeypatch.setattr(base15, "predict", on_a_small_card)
    edits = editor.edit_many(adapter, "a fox", 5, **settings)
    assert [edit.image.tobytes() for edit in edits] == [edit.image.tobytes() for edit in expected]
    assert max(sizes) == 5 and [edit.settings["seed"] for edit in edits] == [0, 1, 2, 3, 4]


def test_leaving_the_with_block_restores_the_base(base15: Base, adapter: Adapter) -> None:
    before = weights_of(base15)
    with Editor(base15) as editor:
        editor.edit(adapter, "a fox", steps=1, strength=1)
        assert has_adapters(base15)
    assert not has_adapters(base15) and unchanged(base15, before)


def test_an_unknown_setting_suggests_the_nearest(editor: Editor, adapter: Adapter) -> None:
    with pytest.raises(SettingError, match="'guidence' of edit .did you mean 'guidance'"):
        editor.edit(adapter, "a fox", guidence=3)


@pytest.mark.parametrize("order", [["reconstruct", "edit"], ["edit", "reconstruct"]])
def test_reconstruct_is_the_rare_tokens_from_noise_without_guidance(
    editor: Editor, adapter: Adapter, order: list[str]
) -> None:
    edits = {}
    for name in order:
        if name == "edit":
            editor.edit(adapter, "a fox")
        else:
            edits = {"edit": editor.reconstruct(adapter, seed=2)}
    edit = edits["edit"]
    assert edit.prompt == adapter.rare_tokens
    assert (edit.settings["strength"], edit.settings["guidance"], edit.settings["photo"]) == (1.0, 1.0, None)
    settings = replace(EDIT, strength=1.0, guidance=1.0)
    sampled = editor.pixels(adapter, [adapter.rare_tokens], "", None, [2], settings)
    assert np.abs(pixels(edit.image) / 255 - sampled[0].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_the_photo_given_with_an_edit_replaces_the_one_in_the_file(
    base15: Base, editor: Editor, adapter: Adapter, photo_image: Image.Image
) -> None:
    embedded = editor.edit(adapter, "a fox", strength=0.5)
    external = editor.edit(adapter, "a fox", strength=0.5, photo=photo_image)
    bare = editor.edit(replace(adapter, photo_latents=None), "a fox", strength=0.5, photo=photo_image)
    assert embedded.image.tobytes() != external.image.tobytes() == bare.image.tobytes()
    assert [edit.settings["photo"] for edit in (embedded, external)] == ["adapter", "given"]
    assert any("sees only its centre" in note for note in external.notes)


def test_less_strength_stays_nearer_to_the_photo(editor: Editor, adapter: Adapter) -> None:
    photo = pixels(editor.photo_round_trip(adapter))
    away = [
        np.abs(pixels(editor.edit(adapter, "a fox", steps=10, strength=strength).image) - photo).mean()
        for strength in (0.1, 0.4, 1.0)
    ]
    assert away == sorted(away) and away[0] < away[-1]


def test_photo_round_trip_decodes_the_latents_in_the_file(
    base15: Base, editor: Editor, adapter: Adapter
) -> None:
    image = editor.photo_round_trip(adapter)
    assert image.size == base15.size
    assert adapter.photo_latents is not None
    decoded = base15.decode(adapter.photo_latents)[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels(image) / 255 - decoded).max() <= 0.5 / 255 + 1e-6


def test_what_doesnt_fit_into_the_prompt_is_named(editor: Editor, adapter: Adapter) -> None:
    edit = editor.edit(adapter, "a red fox at night " * 4 + "sunset", steps=1, strength=1.0)
    (note,) = edit.notes
    assert "too long" in note and note.endswith("sunset'")
    assert editor.edit(adapter, "a fox", steps=1, strength=1.0).notes == ()
    (note,) = editor.edit(adapter, "a fox", steps=1, strength=1.0, guidance=1, negative_prompt="a dog").notes
    assert "no effect" in note
