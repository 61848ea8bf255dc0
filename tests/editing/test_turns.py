"""Edits of edits: each turn begins with the pixels of the one before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_adapters import EDIT, make_adapter

from lora_unitune import Adapter, Editor, PromptError, SettingError
from lora_unitune.editing.finish import finished
from lora_unitune.editing.prompts import earlier_prompts
from lora_unitune.editing.record import Edit
from lora_unitune.editing.start import starting_point
from lora_unitune.families import Base
from lora_unitune.photo.depth import eight_bits
from lora_unitune.photo.details import restore
from lora_unitune.photo.reading import Photo
from lora_unitune.settings import EditSettings

QUICK: dict[str, Any] = {"steps": 2, "strength": 0.7}
TURNS = ("at night", "in the snow")


def photo_of(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def half(width: int, height: int) -> Image.Image:
    """A mask whose right half is white."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


@pytest.mark.parametrize("photo", [None, photo_of(90, 60)])
@pytest.mark.parametrize("residual", [False, True])
def test_then_edits_the_edit(
    editor: Editor, adapter: Adapter, photo: Image.Image | None, residual: bool
) -> None:
    given: dict[str, Any] = {"residual": residual, **QUICK}
    whole = editor.edit(adapter, "a fox", photo=photo, then=TURNS, seed=4, **given)
    edit = editor.edit(adapter, "a fox", photo=photo, seed=4, **given)
    for prompt in TURNS:
        size, edit = edit.image.size, editor.edit(adapter, prompt, photo=edit, seed=4, **given)
        assert edit.image.size == size
    assert whole.image.tobytes() == edit.image.tobytes() and whole.settings == edit.settings
    said = "in the snow" if residual else "a fox at night in the snow"
    assert whole.prompt == f"{adapter.rare_tokens} {said}"
    assert [turn["prompt"] for turn in whole.settings["earlier"]] == ["a fox", "at night"]
    assert (whole.photo is None) == (photo is None)
    assert whole.seconds > edit.seconds
    (one,) = editor.edits(adapter, "a fox", [4], photo=photo, then="at night", **given)
    assert [turn["prompt"] for turn in one.settings["earlier"]] == ["a fox"]


def test_each_sample_goes_its_own_way(editor: Editor, adapter: Adapter) -> None:
    several = list(editor.edits(adapter, "a fox", [1, 2], then=TURNS, **QUICK))
    assert [edit.settings["seed"] for edit in several] == [1, 2]
    assert several[0].image.tobytes() != several[1].image.tobytes()
    alone = editor.edit(adapter, "a fox", seed=2, then=TURNS, **QUICK)
    assert several[1].image.tobytes() == alone.image.tobytes()


def test_the_plain_base_can_edit_its_own_picture(editor: Editor) -> None:
    edit = editor.edit(None, "a fox", then="at night", steps=2)
    assert edit.image.size == editor.base.size and edit.prompt == "a fox at night"


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((90, 61), "photo"), ((64, 64), "base")])
def test_no_turn_changes_what_it_does_not_edit(
    basepocket: Base, shape: tuple[int, int], size: Any, details: bool
) -> None:
    """Six turns, each of which changes another spot of what the autoencoder makes of the picture."""
    photo = Image.radial_gradient("L").convert("RGB").resize(shape)
    photo.paste((200, 60, 40), (20, 30, 40, 50))
    settings = EditSettings(details=details, size=size, residual=True)
    edit, touched = Edit(photo, "", {}, 0.0), np.zeros((shape[1], shape[0]), bool)
    for turn in range(6):
        start = starting_point(basepocket, None, edit, settings)
        assert start.photo is not None and start.pixels is not None
        left, top = 10 * (turn % 3) + 8, 30 * (turn // 3) + 4
        with torch.no_grad():
            redraw = basepocket.decode(start.photo)
        image = redraw.clone()
        image[..., top : top + 6, left : left + 6] = turn % 2
        if details:
            image = restore(start.pixels, redraw, image, torch.zeros(1, 1, 8, 8))
        before = edit
        (edit,) = finished(basepocket, image, "", start, settings)
        edit = edit.made({"earlier": []}, 0.0, ())
        across, down = shape[0] / start.size[0], shape[1] / start.size[1]
        rows, columns = ((first - 4, first + 10) for first in (top, left))
        spot = tuple(
            slice(max(0, int(first * scale)), int(last * scale) + 1)
            for (first, last), scale in ((rows, down), (columns, across))
        )
        touched[spot] = True
        assert edit.image.tobytes() != before.image.tobytes()
    assert touched.mean() < 0.7
    assert np.array_equal(np.asarray(edit.image)[~touched], np.asarray(photo)[~touched])


def test_a_mask_keeps_every_byte_outside_in_every_turn(editor: Editor, adapter: Adapter) -> None:
    photo, mask = photo_of(90, 60), half(90, 60)
    edit = editor.edit(adapter, "a fox", photo=photo, mask=mask, then=TURNS, **QUICK)
    assert np.array_equal(np.asarray(edit.image)[:, :45], np.asarray(photo)[:, :45])
    assert not np.array_equal(np.asarray(edit.image)[:, 45:], np.asarray(photo)[:, 45:])


def test_a_photo_of_16_bits_keeps_them_through_all_turns(editor: Editor, adapter: Adapter) -> None:
    deep = np.random.default_rng(5).integers(0, 2**16, (60, 90, 3), dtype=np.uint16)
    photo = Photo(Image.fromarray(eight_bits(deep)), "a photo", deep=deep)
    edit = editor.edit(adapter, "a fox", photo=photo, mask=half(90, 60), then=TURNS, **QUICK)
    assert edit.deep is not None and np.array_equal(edit.deep[:, :45], deep[:, :45])
    assert np.array_equal(eight_bits(edit.deep), np.asarray(edit.image))


def test_notes_say_their_turn(editor: Editor, adapter: Adapter) -> None:
    given: dict[str, Any] = {"photo": photo_of(90, 60), "negative_prompt": "a dog", "guidance": 1.0, **QUICK}
    notes = editor.edit(adapter, "a fox", then="an old man", **given).notes
    assert [note for note in notes if "negative prompt" in note and note.startswith("turn 1: ")]
    assert [note for note in notes if "consent" in note and note.startswith("turn 2: ")]
    assert len(notes) == len({note.partition(": ")[2] for note in notes})


def test_the_latest_earlier_prompts_that_have_room_are_kept(base15: Base, adapter: Adapter) -> None:
    turns = [f"a {color} fox" for color in ("red", "blue", "green", "yellow")]
    assert earlier_prompts(base15, adapter, turns[:2], "at night") == "a red fox a blue fox"
    assert earlier_prompts(base15, adapter, turns, "at night") == "a blue fox a green fox a yellow fox"
    assert earlier_prompts(base15, adapter, turns, " ".join(["fox"] * 30)) == ""


def test_turns_that_cannot_be_made_are_refused_before_any_is(
    editor: Editor, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "pixels", None)
    with pytest.raises(PromptError, match="the prompt is empty"):
        editor.edit(adapter, "a fox", then=["at night", " "])
    with pytest.raises(SettingError, match="can't edit an edit"):
        editor.edit(adapter, "a fox", then="at night", strength=1.0, residual=False)


def test_turns_repeat_exactly(base15: Base, editor: Editor, adapter: Adapter) -> None:
    photo, mask = photo_of(90, 60), half(90, 60)
    first = editor.edit(adapter, "a fox", photo=photo, mask=mask, seed=3, **QUICK)
    edit = editor.edit(adapter, "at night", photo=first, seed=8, steps=3, guidance=2.0, strength=0.5)
    again = editor.repeat(adapter, edit.settings, photo, mask)
    assert again.image.tobytes() == edit.image.tobytes() and again.settings == edit.settings
    other = replace(adapter, rare_tokens="a cat")  # the words are those that the edit was made with
    assert editor.repeat(other, edit.settings, photo, mask).image.tobytes() == edit.image.tobytes()
    with pytest.raises(SettingError, match="another photo"):
        editor.repeat(adapter, edit.settings, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask)
    with pytest.raises(SettingError, match="another mask"):
        editor.repeat(adapter, edit.settings, photo, half(90, 60).rotate(180))
    with pytest.raises(SettingError, match="give that mask again"):
        editor.repeat(adapter, edit.settings, photo)
    with pytest.raises(SettingError, match="another base or adapter"):
        editor.repeat(make_adapter(base15, seed=9), edit.settings, photo, mask)
    for broken in ([], "a fox", [{}], edit.settings["earlier"] * 2):
        with pytest.raises(SettingError, match="use the complete settings"):
            editor.repeat(adapter, {**edit.settings, "earlier": broken}, photo, mask)


def test_a_repeat_takes_no_photo_or_mask_that_was_not_given(editor: Editor, adapter: Adapter) -> None:
    photo, mask = photo_of(90, 60), half(90, 60)
    with pytest.raises(SettingError, match="starts from the photo in the adapter"):
        editor.repeat(adapter, editor.edit(adapter, "a fox", **QUICK).settings, photo)
    settings = editor.edit(adapter, "a fox", photo=photo, **QUICK).settings
    with pytest.raises(SettingError, match="made without a mask"):
        editor.repeat(adapter, settings, photo, mask)
    from_noise = editor.edit(adapter, "a fox", photo=photo, strength=1.0, residual=False, steps=EDIT.steps)
    assert editor.repeat(adapter, from_noise.settings, photo).image.tobytes() == from_noise.image.tobytes()
