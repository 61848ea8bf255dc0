"""Edits by what the prompt changes: residual from pure noise, guidance against the rare tokens, restored pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from random_adapters import EDIT, make_adapter, make_full_adapter
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.editing import editor as editing
from lora_unitune.editing.editor import Editor
from lora_unitune.editing.start import Start
from lora_unitune.families import Base
from lora_unitune.photo.details import restore

SETTINGS = replace(EDIT, strength=1.0, residual=True, unconditional="rare", guidance_rescale=0.0)


@pytest.fixture(params=["15", "21", "flow"])
def any_editor(request: pytest.FixtureRequest) -> Iterator[Editor]:
    with Editor(request.getfixturevalue(f"base{request.param}")) as editor:
        yield editor


def drawn(editor: Editor, adapter: Adapter, words: str = "a fox", **changes: Any) -> Tensor:
    """The edit of the adapter's photo, (1, 3, height, width)."""
    text = f"{adapter.rare_tokens} {words}".strip()
    start = Start(adapter.size, adapter.photo_latents)
    return editor.pixels(adapter, [text], "", start, [3], replace(SETTINGS, **changes))


def photo_of(editor: Editor, adapter: Adapter) -> Tensor:
    assert adapter.photo_latents is not None
    return editor.base.decode(adapter.photo_latents)


@pytest.mark.parametrize("unconditional", ["adapter", "base", "rare"])
def test_from_pure_noise_the_rare_tokens_alone_give_the_photo(any_editor: Editor, unconditional: str) -> None:
    adapter = make_adapter(any_editor.base)
    guidance = 4.0 if unconditional == "rare" else 1.0
    same = drawn(any_editor, adapter, "", unconditional=unconditional, guidance=guidance)
    torch.testing.assert_close(same, photo_of(any_editor, adapter), atol=1e-4, rtol=0)
    edited = drawn(any_editor, adapter, unconditional=unconditional)
    assert edited.isfinite().all() and (edited - same).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_one_step_of_guidance_against_the_rare_tokens(any_editor: Editor, strength: float) -> None:
    base, adapter = any_editor.base, make_adapter(any_editor.base)
    photo, steps = adapter.photo_latents, round(1 / strength)
    assert photo is not None
    once = drawn(any_editor, adapter, steps=steps, strength=strength, guidance=3.0)
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(3))
    sampler, first = base.sampler(steps, adapter.size, skip=steps - 1), torch.tensor([0])
    noisy = sampler.levels.add_noise(photo, noise, first)
    whole, rare = (
        sampler.levels.clean(base.predict(noisy, sampler.timesteps[:1], base.condition(text)), noisy, first)
        for text in (f"{adapter.rare_tokens} a fox", adapter.rare_tokens)
    )
    expected = base.decode(photo + 3.0 * (whole - rare))
    torch.testing.assert_close(once, expected, atol=1e-4, rtol=0)


def test_guidance_against_the_rare_tokens_acts_on_its_interval_only(any_editor: Editor) -> None:
    adapter = make_adapter(any_editor.base)
    guided, plain = drawn(any_editor, adapter), drawn(any_editor, adapter, guidance=1.0)
    assert torch.equal(drawn(any_editor, adapter, guidance_start=1.0), plain)
    assert torch.equal(drawn(any_editor, adapter, guidance_stop=0.0), plain)
    for interval in ({"guidance_start": 0.5}, {"guidance_stop": 0.5}):
        partly = drawn(any_editor, adapter, **interval)
        assert not torch.equal(partly, plain) and not torch.equal(partly, guided)


def test_least_change_raises_guidance_up_to_four_times(any_editor: Editor) -> None:
    adapter = make_adapter(any_editor.base)
    plain = drawn(any_editor, adapter, least_change=0.0)
    assert torch.equal(drawn(any_editor, adapter, least_change=1e-6), plain), "the change is larger already"
    once = drawn(any_editor, adapter, steps=1)
    unreachable = drawn(any_editor, adapter, steps=1, least_change=10.0)
    four_times = drawn(any_editor, adapter, steps=1, guidance=4 * SETTINGS.guidance)
    torch.testing.assert_close(unreachable, four_times, atol=1e-4, rtol=0)
    assert (unreachable - once).abs().max() > 1e-3


def test_guidance_against_the_rare_tokens_without_a_residual(editor: Editor, adapter: Adapter) -> None:
    """It is guidance with the rare tokens for the negative prompt."""
    text = f"{adapter.rare_tokens} a fox"
    settings = replace(SETTINGS, residual=False)
    ours = editor.pixels(adapter, [text], "a dog", None, [3], settings)
    as_negative = replace(settings, unconditional="adapter")
    assert torch.equal(ours, editor.pixels(adapter, [text], adapter.rare_tokens, None, [3], as_negative))


def test_a_negative_prompt_without_effect_is_noted(editor: Editor, adapter: Adapter) -> None:
    settings: dict[str, Any] = {"steps": 1, "strength": 1.0, "unconditional": "rare"}
    with_it = editor.edit(adapter, "a fox", negative_prompt="a dog", **settings)
    assert with_it.notes == ("guidance is against the rare tokens, so the negative prompt has no effect",)
    without = editor.edit(adapter, "a fox", **settings)
    assert without.notes == () and without.image.tobytes() == with_it.image.tobytes()


# The photo's own pixels


def test_details_restore_what_the_base_cannot_draw(
    editor: Editor, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, photo = drawn(editor, adapter), photo_of(editor, adapter)
    marked = torch.zeros((1, 1, *photo.shape[2:]))
    marked[..., 8:24, 8:24] = 1.0
    monkeypatch.setattr(editing, "doubt", lambda *_: marked)
    restored = drawn(editor, adapter, details=True)
    assert torch.equal(restored, restore(photo, photo, plain, marked))
    own = torch.rand(photo.shape, generator=torch.Generator().manual_seed(4))
    start = Start(adapter.size, adapter.photo_latents, own)
    text, settings = f"{adapter.rare_tokens} a fox", replace(SETTINGS, details=True)
    given = editor.pixels(adapter, [text], "", start, [3], settings)
    assert torch.equal(given, restore(own, photo, plain, marked))


def test_without_a_photo_details_are_ignored(editor: Editor, adapter: Adapter) -> None:
    bare = replace(adapter, photo_latents=None)
    for settings in ({"residual": True}, {"residual": False}):
        both = [
            editor.edit(bare, "a fox", strength=1.0, details=details, **settings) for details in (True, False)
        ]
        assert both[0].image.tobytes() == both[1].image.tobytes()
        notes = {note for edit in both for note in edit.notes}
        assert len(notes) == settings["residual"], "a residual needs the photo"
        assert all("doesn't hold its photo" in note for note in notes)
    assert editor.edit(None, "a fox", steps=1, details=True).settings["photo"] is None


def test_the_doubt_is_the_plain_bases_whatever_was_used_before(
    base15: Base, editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, lora, full = list[Tensor](), make_adapter(base15), make_full_adapter(base15)
    ours = editing.doubt
    monkeypatch.setattr(editing, "doubt", lambda *given: found.append(ours(*given)) or found[-1])
    monkeypatch.setattr(editing, "restore", lambda photo, redraw, edit, doubt: edit)
    assert lora.photo_latents is not None
    photos = [lora.photo_latents, lora.photo_latents.flip(3)]
    settings, pictures = replace(SETTINGS, steps=1, details=True), list[Tensor]()
    order = [None, lora, full, lora, None, full, full]
    for adapter in order:
        for photo in photos:
            start = Start(base15.size, photo)
            pictures.append(editor.pixels(adapter, ["zqrt ohwx a fox"], "", start, [3], settings))
    assert len(found) == 2 * len(order)
    for index, doubt in enumerate(found):
        assert torch.equal(doubt, found[index % 2])
    assert not torch.equal(found[0], found[1]) and found[0].min() > 0
    assert torch.equal(pictures[2], pictures[6]) and torch.equal(pictures[4], pictures[10])
    assert not torch.equal(pictures[0], pictures[2]), "the adapter is active after the doubt was computed"
    assert not torch.equal(pictures[0], pictures[4])


def test_the_doubt_is_computed_once_for_edits_of_a_photo(
    editor: Editor, adapter: Adapter, photo_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, ours = list[Tensor](), editing.doubt
    monkeypatch.setattr(editing, "doubt", lambda *given: found.append(ours(*given)) or found[-1])
    settings: dict[str, Any] = {"steps": 1, "strength": 1.0, "residual": True}
    editor.edit(adapter, "a fox", **settings)
    assert not found
    editor.edit_many(adapter, "a fox", 3, batch_size=1, details=True, **settings)
    editor.edit(adapter, "a dog", details=True, **settings)
    assert len(found) == 1
    editor.edit(adapter, "a dog", photo=photo_image, details=True, **settings)
    assert len(found) == 2
