"""Edits give back the photo at its own size."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from command_line import refused, run
from PIL import Image

from lora_unitune import Adapter, Editor, PhotoError, SettingError
from lora_unitune.editing import finish
from lora_unitune.photo.composition import Changes
from lora_unitune.photo.reading import load_photo
from lora_unitune.photo.writing import read_settings

SHAPES = [(64, 64), (90, 61), (47, 130), (32, 32), (16, 200)]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def half(width: int, height: int, mode: str = "L") -> Image.Image:
    """A mask whose right half is white."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask.convert(mode)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("details", [True, False])
def test_an_edit_has_the_photos_size(
    editor: Editor, adapter: Adapter, shape: tuple[int, int], details: bool
) -> None:
    photo = picture(*shape)
    edit, base = (
        editor.edit(adapter, "a fox", photo=photo, strength=0.5, details=details, size=size)
        for size in ("photo", "base")
    )
    assert edit.image.size == shape and edit.changes is not None
    assert base.image.size == adapter.size and base.changes is None
    assert edit.base_image is not None and edit.base_image.tobytes() == base.image.tobytes()
    assert edit.settings["image_size"] == list(shape) and edit.settings["size"] == "photo"


@pytest.mark.parametrize("given", [True, False])
def test_changes_are_found_once(
    editor: Editor, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """The base's own image has the photo's pixels where its changes say so, whether the file or the caller has it."""
    found, ours = list[Changes](), finish.find_changes
    monkeypatch.setattr(finish, "find_changes", lambda *of: found.append(ours(*of)) or found[-1])
    photo = picture(*adapter.size)
    edit = editor.edit(
        adapter, "a pencil sketch", details=True, residual=True, **({"photo": photo} if given else {})
    )
    assert len(found) == 1 and edit.base_image is not None
    assert edit.changes is (found[0] if given else None)
    assert edit.settings["kind"] == found[0].kind


def test_without_a_photo_an_edit_has_the_bases_size(editor: Editor, adapter: Adapter) -> None:
    edit = editor.edit(adapter, "a fox")
    assert edit.image.size == adapter.size and edit.changes is None and edit.photo is None


def test_a_note_says_how_to_get_the_photos_size(editor: Editor, adapter: Adapter) -> None:
    size = " x ".join(map(str, adapter.size))
    assert any(
        f"the base's size, {size}; give the photo" in note for note in editor.edit(adapter, "a fox").notes
    )
    for given in ({"size": "base"}, {"photo": picture(90, 60)}):
        assert not any("base's size" in note for note in editor.edit(adapter, "a fox", **given).notes)


def test_another_photo_than_the_fitted_one_is_noted_and_edited(editor: Editor, adapter: Adapter) -> None:
    fitted = dataclasses.replace(adapter, photo_digest="0" * 32)
    for shape in ((90, 61), (47, 130)):
        edit = editor.edit(fitted, "a fox", photo=picture(*shape), strength=0.5)
        assert edit.image.size == shape
        assert "the photo: it isn't the one that the adapter was fitted on, pixel for pixel" in edit.notes


@pytest.mark.parametrize("size", ["photo", "base"])
@pytest.mark.parametrize("details", [True, False])
def test_the_settings_say_the_kind_of_edit(
    editor: Editor, adapter: Adapter, size: str, details: bool
) -> None:
    kinds = {"nothing", "local", "relit", "both", "restyled"}
    for photo in (None, picture(90, 60)):
        edit = editor.edit(adapter, "a fox", photo=photo, strength=0.9, size=size, details=details)
        assert edit.settings["kind"] in kinds
        assert edit.changes is None or edit.settings["kind"] == edit.changes.kind
    with_nothing = editor.edit(None, "a fox", strength=1.0, residual=False, details=False)
    assert "kind" not in with_nothing.settings, "nothing to compare it with"


@pytest.mark.parametrize("name", ["out.png", "out.tif", "out.jpg"])
def test_a_photo_of_sixteen_bits_comes_back_so(
    editor: Editor, adapter: Adapter, tmp_path: Path, name: str
) -> None:
    deep = np.random.default_rng(0).integers(0, 65_536, (60, 90, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "photo.tif", deep, photometric="rgb")
    edit = editor.edit(adapter, "a fox", photo=tmp_path / "photo.tif", strength=0.9, mask=half(90, 60))
    assert edit.deep is not None and edit.image.size == (90, 60)
    assert np.array_equal(edit.deep[:, :45], deep[:, :45]) and not np.array_equal(edit.deep, deep)
    assert np.array_equal(np.asarray(edit.image), (edit.deep / 257).round())
    notes = edit.save(tmp_path / name)
    again = load_photo(tmp_path / name).deep
    if name == "out.jpg":
        assert again is None and "8 bits" in notes[0]
    else:
        assert again is not None and np.array_equal(again, edit.deep) and notes == ()
    settings = read_settings(tmp_path / name)
    repeated = editor.repeat(adapter, settings, tmp_path / "photo.tif", half(90, 60))
    assert repeated.deep is not None and np.array_equal(repeated.deep, edit.deep)


def test_a_mask_keeps_every_byte_outside(editor: Editor, adapter: Adapter) -> None:
    photo = picture(90, 60)
    kept = np.asarray(photo)
    free = editor.edit(adapter, "a fox", photo=photo, strength=0.9)
    edit = editor.edit(adapter, "a fox", photo=photo, strength=0.9, mask=half(90, 60))
    assert np.array_equal(np.asarray(edit.image)[:, :45], kept[:, :45])
    assert np.array_equal(np.asarray(edit.image)[:, 45:], np.asarray(free.image)[:, 45:])
    assert not np.array_equal(np.asarray(free.image)[:, :45], kept[:, :45])
    gray = Image.new("L", (90, 60), 128)
    partly = np.asarray(editor.edit(adapter, "a fox", photo=photo, strength=0.9, mask=gray).image).astype(
        float
    )
    assert np.abs(partly - (kept.astype(float) + np.asarray(free.image)) / 2).max() < 2


def test_a_mask_of_another_size_is_scaled(editor: Editor, adapter: Adapter) -> None:
    photo = picture(90, 60)
    edit = editor.edit(adapter, "a fox", photo=photo, strength=0.9, mask=half(45, 30, "RGB"))
    assert np.array_equal(np.asarray(edit.image)[:, :42], np.asarray(photo)[:, :42])
    assert any("scaled from 45 x 30" in note for note in edit.notes)


def test_transparent_parts_of_a_mask_do_not_change(editor: Editor, adapter: Adapter) -> None:
    photo, mask = picture(90, 60), Image.new("RGBA", (90, 60), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (45, 0, 90, 60))
    edits = [
        editor.edit(adapter, "a fox", photo=photo, strength=0.9, mask=each) for each in (mask, half(90, 60))
    ]
    assert edits[0].image.tobytes() == edits[1].image.tobytes()
    assert "the mask: its transparent parts become black" in edits[0].notes


def test_masks_that_cannot_be_used_are_refused(editor: Editor, adapter: Adapter) -> None:
    photo = picture(90, 60)
    for mask, message in (
        (half(60, 60), "give one of the photo's shape"),
        (Image.new("L", (90, 60)), "black"),
    ):
        with pytest.raises(PhotoError, match=message):
            editor.edit(adapter, "a fox", photo=photo, mask=mask)
    for given in ({}, {"photo": photo, "size": "base"}):
        with pytest.raises(SettingError, match="mask is for the photo at its own size"):
            editor.edit(adapter, "a fox", mask=half(90, 60), **given)


def test_an_edit_of_the_whole_photo_repeats(editor: Editor, adapter: Adapter, tmp_path: Path) -> None:
    photo, mask = picture(90, 60), half(90, 60)
    edit = editor.edit(adapter, "a fox", photo=photo, strength=0.5, mask=mask)
    edit.save(tmp_path / "out.png")
    settings = read_settings(tmp_path / "out.png")
    assert editor.repeat(adapter, settings, photo, mask).image.tobytes() == edit.image.tobytes()
    with pytest.raises(SettingError, match="give that mask again"):
        editor.repeat(adapter, settings, photo)


@pytest.mark.parametrize("before", ["a list", "nothing"])
def test_edits_older_than_whole_photos_repeat_at_the_bases_size(
    editor: Editor, adapter: Adapter, before: str
) -> None:
    edit = editor.edit(adapter, "a fox", photo=picture(90, 60), strength=0.5, size="base")
    old = {name: value for name, value in edit.settings.items() if name not in ("size", "mask")}
    old |= {"size": list(edit.image.size)} if before == "a list" else {}
    assert editor.repeat(adapter, old, picture(90, 60)).image.tobytes() == edit.image.tobytes()


@pytest.mark.parametrize("name", ["out.jpg", "out.webp", "out.tif"])
def test_the_command_gives_back_the_photo_with_its_entries(
    edit: list[str | Path], tmp_path: Path, name: str
) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", 6
    exif.get_ifd(0x8825)[1] = "N"
    picture(90, 60).rotate(90, expand=True).save(tmp_path / "photo.jpg", exif=exif)
    half(90, 60).save(tmp_path / "mask.png")
    options = ("--photo", tmp_path / "photo.jpg", "--mask", tmp_path / "mask.png", "--strength", "0.5")
    for more in ((), ("--keep-gps", "--overwrite")):
        result = run(*edit, "a fox", *options, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        shown = run("inspect", tmp_path / name).stdout
        assert re.search("^prompt +a fox$", shown, re.M) and re.search("^strength +0.5$", shown, re.M)
        told = json.loads(run("inspect", tmp_path / name, "--json").stdout)
        assert told == read_settings(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.size == (90, 60)
            assert image.getexif()[0x010F] == "Camera" and image.getexif().get(0x0112, 1) == 1
            assert dict(image.getexif().get_ifd(0x8825)) == ({1: "N"} if more else {})
    assert "no settings of an edit" in refused("inspect", tmp_path / "photo.jpg", folder=tmp_path)
    for taken in ("photo.jpg", "mask.png"):
        assert "which the command reads" in refused(
            *edit, "a fox", *options, "--overwrite", "-o", tmp_path / taken, folder=tmp_path
        )
