"""A fit of a box of the photo, whose edits come back into their place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import QUICK, refused, run
from PIL import Image

from lora_unitune import (
    Adapter,
    Editor,
    PhotoError,
    SettingError,
    convert,
    describe,
    fit,
    read_settings,
)
from lora_unitune.adapter.convert import strip
from lora_unitune.editing.finish import box_notes
from lora_unitune.families import Base
from lora_unitune.photo.composition import Changes, Kind
from lora_unitune.photo.framing import seen_part
from lora_unitune.settings import PhotoSettings

SIZE, BOX = (200, 150), (60, 30, 120, 90)
CONTEXT = (50, 20, 130, 100)
OVERRIDES = ["fit.steps=1", "fit.batch_size=1", "edit.steps=2", "photo.box=60,30,60,60"]


def picture(width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def outside(box: tuple[int, int, int, int] = CONTEXT) -> np.ndarray:
    kept = np.ones(SIZE[::-1], bool)
    kept[box[1] : box[3], box[0] : box[2]] = False
    return kept


@pytest.fixture
def boxed(adapter: Adapter) -> Adapter:
    """The random adapter, as one of a part of the picture."""
    recipe = replace(adapter.recipe, photo=PhotoSettings(box="60,30,60,60"))
    return replace(adapter, recipe=recipe, photo_size=SIZE)


def test_an_edit_changes_the_box_alone_as_if_its_part_were_the_photo(
    editor: Editor, adapter: Adapter, boxed: Adapter
) -> None:
    photo, settings = picture(), {"strength": 0.9, "seed": 2}
    kept, edit = np.asarray(photo), editor.edit(boxed, "a fox", photo=photo, **settings)
    values = np.asarray(edit.image)
    assert edit.image.size == SIZE and edit.settings["box"] == [60, 30, 60, 60]
    assert np.array_equal(values[outside()], kept[outside()])
    assert seen_part(SIZE, adapter.size, BOX) == CONTEXT
    alone = np.asarray(editor.edit(adapter, "a fox", photo=photo.crop(CONTEXT), **settings).image).astype(int)
    difference = np.abs(values[30:90, 60:120] - alone[10:70, 10:70])
    assert difference.max() <= 4 and difference.mean() < 0.5, "but for how resizing treats a photo's border"
    assert not np.array_equal(values[30:90, 60:120], kept[30:90, 60:120])
    between = np.stack([kept[20:100, 50:130], alone]).astype(int)
    context = values[20:100, 50:130]
    assert (context >= between.min(0) - 4).all() and (context <= between.max(0) + 4).all()


def test_without_the_photo_or_at_the_bases_size_an_edit_is_the_bases_picture(
    editor: Editor, boxed: Adapter
) -> None:
    edit = editor.edit(boxed, "a fox", photo=picture(), size="base")
    assert edit.image.size == editor.edit(boxed, "a fox").image.size == boxed.size
    whole = editor.edit(boxed, "a fox", photo=picture())
    assert whole.base_image is not None and whole.base_image.tobytes() == edit.image.tobytes()


def test_a_copy_of_another_size_is_edited_in_its_place_and_another_shape_is_refused(
    editor: Editor, boxed: Adapter
) -> None:
    photo = picture(400, 300)
    edit = editor.edit(boxed, "a fox", photo=photo, strength=0.9)
    changed = (np.asarray(edit.image) != np.asarray(photo)).any(-1)
    assert edit.settings["box"] == [120, 60, 120, 120]
    assert changed[60:180, 120:240].any() and changed.sum() == changed[40:200, 100:260].sum()
    with pytest.raises(PhotoError, match="is 150 x 150 pixels, .* of a photo of 200 x 150"):
        editor.edit(boxed, "a fox", photo=picture(150, 150))


def test_a_mask_has_the_whole_photos_shape(editor: Editor, boxed: Adapter) -> None:
    photo, mask = picture(), Image.new("L", SIZE)
    with pytest.raises(PhotoError, match="black all over the box"):
        mask.paste(255, (150, 0, 200, 150))
        editor.edit(boxed, "a fox", photo=photo, mask=mask)
    mask.paste(255, (0, 0, 90, 150))
    free, edit = (
        np.asarray(editor.edit(boxed, "a fox", photo=photo, strength=0.9, mask=each).image)
        for each in (None, mask)
    )
    assert np.array_equal(edit[:, 90:], np.asarray(photo)[:, 90:])
    assert np.array_equal(edit[:, :90], free[:, :90])


def test_every_turn_changes_the_box_alone(editor: Editor, boxed: Adapter) -> None:
    photo = picture()
    settings = {"strength": 0.9, "photo": photo, "then": ["a car", "a dog"]}
    edit = editor.edit(boxed, "a fox", **settings)
    assert edit.settings["box"] == [60, 30, 60, 60] and edit.image.size == SIZE
    assert np.array_equal(np.asarray(edit.image)[outside()], np.asarray(photo)[outside()])
    assert editor.repeat(boxed, edit.settings, photo).image.tobytes() == edit.image.tobytes()
    own = editor.edit(boxed, "a fox", **settings, size="base")
    assert own.image.size == boxed.size and "box" not in own.settings


def test_a_photo_of_16_bits_keeps_them_outside_of_the_box(editor: Editor, boxed: Adapter) -> None:
    values = np.random.default_rng(5).integers(0, 2**16, SIZE[::-1], dtype=np.uint16)
    edit = editor.edit(boxed, "a fox", photo=Image.fromarray(values), strength=0.9)
    assert edit.deep is not None and edit.deep.dtype == np.uint16
    assert np.array_equal(edit.deep[outside()], np.stack([values] * 3, -1)[outside()])
    assert (edit.deep[30:90, 60:120, 0] != values[30:90, 60:120]).any()


def test_an_edit_of_a_box_repeats(editor: Editor, boxed: Adapter, tmp_path: Path) -> None:
    mask = Image.linear_gradient("L").resize(SIZE)
    edit = editor.edit(boxed, "a fox", photo=picture(), mask=mask, strength=0.9)
    edit.save(tmp_path / "out.png")
    again = editor.repeat(boxed, read_settings(tmp_path / "out.png"), picture(), mask)
    assert again.image.tobytes() == edit.image.tobytes() and again.settings == edit.settings


def test_a_fit_sees_the_box_and_its_file_says_so(base15: Base, editor: Editor, tmp_path: Path) -> None:
    notes: list[str] = []
    adapter = fit(picture(), base=base15, overrides=OVERRIDES, on_note=notes.append)
    alone = fit(picture().crop(CONTEXT), base=base15, overrides=OVERRIDES[:-1])
    assert adapter.photo_latents is not None and alone.photo_latents is not None
    assert torch.allclose(adapter.photo_latents, alone.photo_latents, atol=2e-3)
    assert adapter.size == alone.size and adapter.photo_size == SIZE
    assert adapter.recipe.photo.box == "60,30,60,60" and not notes
    adapter.save(tmp_path / "box.safetensors")
    strip(tmp_path / "box.safetensors", tmp_path / "bare.safetensors")
    convert(tmp_path / "box.safetensors", "kohya", tmp_path / "kohya.safetensors")
    edit = editor.edit(adapter, "a fox", photo=picture(), strength=0.9)
    for name in ("box", "bare", "kohya"):
        said = describe(tmp_path / f"{name}.safetensors")
        assert (said["photo_size"], said["box"]) == (list(SIZE), [60, 30, 60, 60])
        loaded = Adapter.load(tmp_path / f"{name}.safetensors")
        same = editor.edit(loaded, "a fox", photo=picture(), strength=0.9)
        assert same.settings["box"] == edit.settings["box"]
        assert np.array_equal(np.asarray(same.image)[outside()], np.asarray(edit.image)[outside()])
    alone.save(tmp_path / "alone.safetensors")
    strip(tmp_path / "alone.safetensors", tmp_path / "stripped.safetensors")
    whole, bare = (describe(tmp_path / f"{name}.safetensors") for name in ("alone", "stripped"))
    assert whole["photo_size"] == [80, 80] and whole["box"] == [] and bare["photo_size"] is None
    fit(picture(), base=base15, overrides=OVERRIDES[:-1], start=adapter, on_note=notes.append)
    assert any("its box is 60,30,60,60, and this fit's is the whole photo" in note for note in notes)


def changes(left: int, top: int, right: int, bottom: int, kind: Kind = "local") -> Changes:
    """An edit of the part of a picture of 64 x 48 pixels."""
    replaced = torch.zeros(1, 1, 48, 64)
    replaced[..., top:bottom, left:right] = 1
    matrix, image = torch.eye(3)[None, :, :, None, None].repeat(1, 1, 1, 48, 64), torch.zeros(1, 3, 48, 64)
    return Changes(kind, replaced, matrix, image, image)


def test_a_small_edit_of_a_large_photo_suggests_a_box_around_it() -> None:
    seen = 100, 0, 4100, 3000
    (note,) = box_notes(changes(16, 12, 24, 20), (64, 48), seen)
    x, y, width, height = map(int, note.rpartition("--box ")[2].split(","))
    assert (x, y, width, height) == (975, 625, 750, 750)
    for other in (
        changes(16, 12, 50, 20),
        changes(0, 0, 64, 48),
        changes(0, 0, 0, 0),
        changes(16, 12, 24, 20, "both"),
    ):
        assert box_notes(other, (64, 48), seen) == ()
    assert box_notes(changes(16, 12, 24, 20), (64, 48), (0, 0, 160, 120)) == (), "a small photo"


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("1200,800,900,900", "isn't inside of the photo, which is 256 x 256 pixels"),
        ("200,200,100,20", "--box 200,200,100,20 isn't inside"),
        ("0,0,8,100", "--box 0,0,8,100 is 8 x 100 pixels"),
        ("1,2,3", "--box 1,2,3 isn't allowed; give four whole numbers"),
        ("-4,0,50,50", "--box -4,0,50,50 isn't allowed"),
    ],
)
def test_wrong_boxes_are_refused_before_the_base_is_loaded(
    tmp_path: Path, photo: Path, tiny_sd15: Path, box: str, message: str
) -> None:
    base = Path(shutil.copytree(tiny_sd15, tmp_path / "broken"))
    for weights in base.rglob("*.safetensors"):
        weights.write_bytes(b"broken")
    command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", base, "--box", box)
    assert message in refused(*command, *QUICK, folder=tmp_path)


def test_the_commands_edit_a_box(tmp_path: Path, tiny_sd15: Path) -> None:
    """The photo is stored on its side: the box is in pixels of the upright one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    adapter, base = tmp_path / "box.safetensors", ("--base", tiny_sd15)
    command = ("fit", tmp_path / "photo.png", "-o", adapter, *base, *QUICK, "--box", "60,30,60,60", "--json")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["box"] == [60, 30, 60, 60]
    shown = run("inspect", adapter).stdout.splitlines()
    assert "photo size      200 x 150 pixels" in shown and "box             60 30 60 60" in shown
    options = ("--photo", tmp_path / "photo.png", "-o", tmp_path / "out.png", "--strength", "0.9")
    result = run("edit", adapter, "a fox", *base, *options)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as image:
        values = np.asarray(image)
    assert np.array_equal(values[outside()], np.asarray(picture())[outside()])
    picture(90, 90).save(tmp_path / "square.png")
    other = ("--photo", tmp_path / "square.png", "-o", tmp_path / "other.png")
    line = refused("edit", adapter, "a fox", *base, *other, folder=tmp_path)
    assert "is 90 x 90 pixels" in line and "a photo of 200 x 150" in line


def test_a_box_that_its_own_photo_doesnt_have_is_refused(editor: Editor, boxed: Adapter) -> None:
    for size, message in (((100, 75), "isn't inside of the photo"), ((), "isn't inside of the photo")):
        photo = picture(100, 75)
        with pytest.raises(SettingError, match=message):
            editor.edit(replace(boxed, photo_size=size), "a fox", photo=photo)
