from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from lora_unitune.pocket import world
from lora_unitune.pocket.pretraining import evaluate
from lora_unitune.pocket.world.pictures import renders


def test_a_quarter_of_the_requests_are_pairs_never_trained_on() -> None:
    asked = [scene for _, scene in evaluate.requests(80)]
    assert sum(world.is_unseen_pair(scene.object, scene.place) for scene in asked) == 20
    assert len({prompt for prompt, _ in evaluate.requests(80)}) > 70
    assert evaluate.requests(8) == evaluate.requests(80)[:8]


def test_a_description_names_everything() -> None:
    scene = world.Scene("car", "meadow", time="night", look="pixel", colour="blue")
    text = world.describe(scene, random.Random(0))
    for words in (world.PLACE_WORDS["meadow"], world.TIME_WORDS["night"], ("pixel art",), ("blue car",)):
        assert any(word in text for word in words), text


def test_true_renders_are_judged_right_and_wrong_ones_wrong() -> None:
    asked = [world.draw_scene(seed + 30_000, "held-out") for seed in range(60)]
    pictures = renders(asked)
    rows, _ = evaluate.judge(pictures, asked)
    assert all(parts["all"]["share"] >= 0.9 for parts in rows.values())
    rows, mistaken = evaluate.judge(pictures, asked[1:] + asked[:1])
    assert rows["object"]["all"]["share"] < 0.3
    assert mistaken[0][2] >= 1


def test_the_interval_holds_the_share() -> None:
    low, high = evaluate.interval(45, 50)
    assert 0.78 < low < 0.9 < high < 0.96
    assert evaluate.interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("rare", [[], ["--rare"]])
def test_the_command_prints_one_object(rare: list[str], tmp_path: Path) -> None:
    command = ["--prompts", "4", "--steps", "2", "--json", "--sheet", str(tmp_path / "sheet.png"), *rare]
    result = CliRunner().invoke(evaluate.main, command, catch_exceptions=False)
    summary = json.loads(result.stdout)
    assert summary["prompts"] == summary["read_right"]["object"]["all"]["of"] == 4
    assert summary["steps"] == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 128


def test_the_gallery_is_one_picture(tmp_path: Path) -> None:
    command = ["--steps", "1", "gallery", str(tmp_path / "gallery.png")]
    assert CliRunner().invoke(evaluate.main, command, catch_exceptions=False).exit_code == 0
    with Image.open(tmp_path / "gallery.png") as sheet:
        assert sheet.width > 8 * 128
