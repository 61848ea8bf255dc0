"""The record of an edit: the settings in a PNG repeat it exactly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from random_adapters import EDIT, make_adapter

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import OutputError, SettingError
from lora_unitune.families import Base
from lora_unitune.photo.writing import read_settings


def test_a_png_repeats_its_edit_exactly(
    tiny_sd15: Path, editor: Editor, adapter: Adapter, tmp_path: Path
) -> None:
    edit = editor.edit(
        adapter,
        "a fox ünter dem 月",
        negative_prompt="a dog",
        seed=11,
        steps=5,
        guidance=2.5,
        guidance_rescale=0.3,
        strength=0.7,
        adapter_scale=0.8,
        unconditional="base",
    )
    edit.save(tmp_path / "out.png")
    adapter.save(tmp_path / "photo.safetensors")
    loaded = Adapter.load(tmp_path / "photo.safetensors")
    settings = read_settings(tmp_path / "out.png")
    assert settings == edit.settings
    fresh = Editor(str(tiny_sd15), device="cpu")
    again = fresh.repeat(loaded, settings)
    once_more = editor.repeat(loaded, settings)
    assert again.image.tobytes() == once_more.image.tobytes()
    assert editor.repeat(adapter, settings).image.tobytes() == edit.image.tobytes()
    assert again.settings == {**edit.settings, "base": again.settings["base"]}
    with Image.open(tmp_path / "out.png") as written:
        assert written.tobytes() == edit.image.tobytes()


def test_reconstructions_repeat_too(editor: Editor, adapter: Adapter) -> None:
    first = editor.reconstruct(adapter, seed=4)
    assert editor.repeat(adapter, first.settings).image.tobytes() == first.image.tobytes()


def test_repeating_with_something_else_is_one_line(
    base15: Base, editor: Editor, adapter: Adapter, photo_image: Image.Image
) -> None:
    edit = editor.edit(adapter, "a fox", photo=photo_image)
    with pytest.raises(SettingError, match="another base or adapter"):
        editor.repeat(make_adapter(base15, seed=9), edit.settings)
    with pytest.raises(SettingError, match="give that photo again"):
        editor.repeat(adapter, edit.settings)
    with pytest.raises(SettingError, match="lack guidance"):
        editor.repeat(adapter, {key: value for key, value in edit.settings.items() if key != "guidance"})
    before_residuals = {key: value for key, value in edit.settings.items() if key != "residual"}
    assert editor.repeat(adapter, before_residuals, photo_image).image.tobytes() == edit.image.tobytes()
    assert editor.repeat(adapter, edit.settings, photo_image).image.tobytes() == edit.image.tobytes()


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_an_edit_of_an_older_release_repeats_as_it_was_sampled_then(
    editor: Editor, adapter: Adapter, strength: float
) -> None:
    """Releases before 0.3 had neither `details` nor `least_change`, and no residual at strength 1."""
    then = editor.edit(adapter, "a fox", seed=2, strength=strength, residual=strength < 1)
    now = editor.edit(adapter, "a fox", seed=2, strength=strength, residual=True)
    old = {**then.settings, "lora_unitune": "0.2.0", "residual": True}
    del old["details"], old["least_change"]
    assert editor.repeat(adapter, old).image.tobytes() == then.image.tobytes()
    assert (now.image.tobytes() == then.image.tobytes()) == (strength < 1)
    assert editor.repeat(adapter, now.settings).image.tobytes() == now.image.tobytes()


def test_an_edit_with_restored_details_repeats(
    editor: Editor, adapter: Adapter, photo_image: Image.Image, tmp_path: Path
) -> None:
    edit = editor.edit(
        adapter,
        "a fox",
        photo=photo_image,
        strength=1.0,
        residual=True,
        details=True,
        unconditional="rare",
        least_change=0.4,
    )
    edit.save(tmp_path / "out.png")
    again = editor.repeat(adapter, read_settings(tmp_path / "out.png"), photo_image)
    assert again.image.tobytes() == edit.image.tobytes()
    with pytest.raises(SettingError, match="give that photo again"):
        editor.repeat(adapter, edit.settings)


def test_the_settings_hold_everything(base15: Base, editor: Editor, adapter: Adapter) -> None:
    settings = editor.edit(adapter, "a fox").settings
    assert settings["prompt"] == "a fox" and settings["rare_tokens"] == adapter.rare_tokens
    assert settings["fingerprint"] == base15.fingerprint
    assert settings["image_size"] == list(base15.size)
    assert settings["guidance"] == EDIT.guidance and settings["steps"] == EDIT.steps
    assert {"lora_unitune", "torch", "diffusers"} <= settings.keys()


def test_a_png_is_written_whole_or_not_at_all(editor: Editor, adapter: Adapter, tmp_path: Path) -> None:
    edit = editor.edit(adapter, "a fox", steps=1, strength=1.0)
    edit.save(tmp_path / "out.png")
    with pytest.raises(OutputError, match="already exists"):
        edit.save(tmp_path / "out.png")
    edit.save(tmp_path / "out.png", overwrite=True)
    with pytest.raises(OutputError, match="let it end in .png, .jpg"):
        edit.save(tmp_path / "out.gif")
    with pytest.raises(OutputError, match="folder .* doesn.t exist"):
        edit.save(tmp_path / "missing" / "out.png")
    assert os.listdir(tmp_path) == ["out.png"]


def test_other_files_hold_no_settings(tmp_path: Path, photo_image: Image.Image) -> None:
    photo_image.save(tmp_path / "plain.png")
    photo_image.save(tmp_path / "photo.jpg")
    for name in ("plain.png", "photo.jpg", "missing.png"):
        with pytest.raises(SettingError, match="has no settings of an edit"):
            read_settings(tmp_path / name)
