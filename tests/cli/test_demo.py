"""The demo, on a tiny random base: its outputs, which are written completely or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_unitune import Adapter, OutputError, PhotoError, UnituneError
from lora_unitune.cli.demo import EXAMPLES, Row, contact_sheet, read_examples, run_demo

QUICK = ["fit.steps=2", "fit.batch_size=1", "edit.steps=2"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two photos and two edits for each."""
    folder = tmp_path_factory.mktemp("examples")
    Image.linear_gradient("L").convert("RGB").save(folder / "ramp.png")
    Image.radial_gradient("L").convert("RGB").save(folder / "ring.png")
    tables = [
        f'[{name}]\ndescription = "A {name}"\nedits = ["a fox", "a red car"]\n' for name in ("ring", "ramp")
    ]
    (folder / "edits.toml").write_text("\n".join(tables))
    return folder


def test_it_writes_adapters_edits_a_sheet_and_a_summary(
    tmp_path: Path, tiny_sd15: Path, examples: Path
) -> None:
    stages: list[tuple[str, int, int]] = []
    folder = tmp_path / "shown"
    summary = run_demo(
        folder,
        base=str(tiny_sd15),
        overrides=QUICK,
        device="cpu",
        examples=examples,
        on_progress=lambda *stage: stages.append(stage),
    )
    expected = {"contact-sheet.png", "summary.json"}
    for name in ("ring", "ramp"):
        expected |= {
            f"{name}.safetensors",
            f"{name}-reconstruction.png",
            f"{name}-edit-1.png",
            f"{name}-edit-2.png",
        }
    assert {path.name for path in folder.iterdir()} == expected
    written = json.loads((folder / "summary.json").read_text())
    assert {**written, "folder": str(folder), "contact_sheet": str(folder / "contact-sheet.png")} == summary
    assert [photo["name"] for photo in written["photos"]] == ["ring", "ramp"]
    for photo in written["photos"]:
        assert photo["adapter_bytes"] == (folder / photo["adapter"]).stat().st_size
        assert Adapter.load(folder / photo["adapter"]).rare_tokens == photo["rare_tokens"]
        assert [edit["prompt"] for edit in photo["edits"]] == ["a fox", "a red car"]
        assert all(edit["settings"]["steps"] == 2 for edit in photo["edits"])
    assert Image.open(folder / "contact-sheet.png").size[0] > 4 * 192
    assert [stage for stage in stages if stage[0].startswith("fitting ring") and stage[1] == stage[2] == 2]
    assert stages[-1][0] == "editing ramp (2 of 2)" and stages[-1][1] == stages[-1][2]


def test_a_folder_with_files_in_it_is_left_alone(tmp_path: Path, tiny_sd15: Path, examples: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="overwrite=True"):
        run_demo(tmp_path, base=str(tiny_sd15), examples=examples)
    with pytest.raises(OutputError, match="isn't a folder"):
        run_demo(tmp_path / "mine.txt", base=str(tiny_sd15), examples=examples)
    with pytest.raises(OutputError, match="can't be written"):
        run_demo(tmp_path / "none" / "deep", base=str(tiny_sd15), examples=examples)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_demo_leaves_nothing_behind(
    tmp_path: Path, tiny_sd15: Path, examples: Path, existed: bool
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in examples.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[: len(content) // 2] if path.name == "ramp.png" else content)
    folder = tmp_path / "shown"
    if existed:
        folder.mkdir()
        (folder / "summary.json").write_text("old")
    with pytest.raises(PhotoError):
        run_demo(
            folder, base=str(tiny_sd15), overrides=QUICK, device="cpu", examples=broken, overwrite=existed
        )
    assert folder.exists() == existed
    assert not existed or [path.name for path in folder.iterdir()] == ["summary.json"]


def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path, tiny_sd15: Path) -> None:
    for wrong in ({"base": "no such base"}, {"base": str(tiny_sd15), "overrides": ["fit.steps=0"]}):
        with pytest.raises(UnituneError):
            run_demo(tmp_path / "shown", **wrong)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_every_caption_fits_the_width_of_its_image() -> None:
    picture = Image.new("RGB", (64, 64), "red")
    short = contact_sheet([Row("one", ((picture, "a fox"), (picture, "a fox")))])
    long = contact_sheet([Row("one", ((picture, "a fox " * 40), (picture, "a fox")))])
    assert short.size == long.size
    right = (short.width // 2 + 8, 0, short.width, short.height)
    assert short.crop(right).tobytes() == long.crop(right).tobytes()


def test_images_of_any_shape_are_centered_without_cropping() -> None:
    left, upper, right, lower = red_box((64, 64))
    for size in ((64, 32), (32, 64)):
        box = red_box(size)
        width, height = box[2] - box[0], box[3] - box[1]
        assert width * size[1] == height * size[0] and max(width, height) == right - left
        assert (box[0] + box[2], box[1] + box[3]) == (left + right, upper + lower)


def red_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the bounding box of a red image of a size on a contact sheet."""
    sheet = contact_sheet([Row("one", ((Image.new("RGB", size, "red"), ""),))])
    box = sheet.getchannel("G").point(lambda value: 255 if value == 0 else 0).getbbox()
    assert box is not None and sheet.crop(box).getextrema() == ((255, 255), (0, 0), (0, 0))
    return box


def test_three_examples_ship_with_six_edits_each() -> None:
    examples = read_examples()
    assert len(examples) == 3
    for example in examples:
        assert len(example.edits) == 6 and example.description
        assert Image.open(EXAMPLES / f"{example.name}.png").width >= 64
