"""The command line: valid commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from command_line import QUICK, refused, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from lora_unitune import Adapter, __version__
from lora_unitune.photo.writing import read_settings


def test_fit_prints_one_json_object_and_progress_elsewhere(fitted: tuple[Path, Result]) -> None:
    file, result = fitted
    values = json.loads(result.stdout)
    assert values["path"] == str(file) and values["bytes"] == file.stat().st_size and values["steps"] == 2
    assert len(values["losses"]) == 2 and all(loss > 0 for loss in values["losses"])
    assert values["size"] == [32, 32] and values["notes"] == []
    assert "fitting" in result.stderr and "loss" in result.stderr
    assert [path.name for path in file.parent.iterdir() if path.suffix == ".safetensors"] == [file.name]


def test_fit_edit_inspect(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    file = tmp_path / "a.safetensors"
    result = run("fit", photo, "-o", file, "--base", tiny_sd15, *QUICK, "--seed", "3")
    assert result.exit_code == 0 and "a.safetensors" in result.stdout
    edit = ("edit", "--base", tiny_sd15, file, "a fox at night")
    result = run(*edit, "-o", tmp_path / "out.png", "--steps", "2")
    assert result.exit_code == 0 and "out.png" in result.stdout
    assert Image.open(tmp_path / "out.png").size == (32, 32)
    result = run("inspect", file)
    assert result.exit_code == 0
    for text in (Adapter.load(file).rare_tokens, "unet 8", "to_q", " x ", "[fit]", "steps = 2"):
        assert text in result.stdout
    values = json.loads(run("inspect", file, "--json").stdout)
    assert values["seed"] == 3 and values["recipe"]["fit"]["steps"] == 2


def test_every_png_carries_its_settings_and_repeats(tmp_path: Path, edit: list[str | Path]) -> None:
    dials = ["--guidance", "3", "--strength", "0.8", "--adapter-scale", "0.5", "--steps", "4"]
    result = run(*edit, "a fox", "-o", tmp_path / "out.png", "-n", "3", "--seed", "5", *dials, "--json")
    assert result.exit_code == 0, result.output
    images = json.loads(result.stdout)["images"]
    assert [Path(image["path"]).name for image in images] == ["out-5.png", "out-6.png", "out-7.png"]
    for seed, image in enumerate(images, start=5):
        settings = read_settings(image["path"])
        assert image["size"] == list(Image.open(image["path"]).size)
        assert settings == image["settings"]
        assert (settings["seed"], settings["guidance"], settings["strength"]) == (seed, 3.0, 0.8)
        assert (settings["adapter_scale"], settings["steps"]) == (0.5, 4)
    assert run(*edit, "a fox", "-o", tmp_path / "one.png", "--seed", "6", *dials).exit_code == 0
    assert Image.open(tmp_path / "one.png").tobytes() == Image.open(tmp_path / "out-6.png").tobytes()


def test_a_file_without_its_photo_needs_the_photo_option(
    tmp_path: Path, tiny_sd15: Path, photo: Path
) -> None:
    file = tmp_path / "bare.safetensors"
    assert run("fit", photo, "-o", file, "--base", tiny_sd15, *QUICK, "--no-embed-photo").exit_code == 0
    edit = ("edit", "--base", tiny_sd15, file, "a fox", "-o", tmp_path / "out.png", "--strength", "0.8")
    assert "the adapter doesn't hold it" in refused(*edit, folder=tmp_path)
    assert run(*edit, "--photo", photo).exit_code == 0


def test_all_weights_can_be_fitted_for_comparison(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    file = tmp_path / "full.safetensors"
    assert run("fit", photo, "-o", file, "--base", tiny_sd15, *QUICK, "--method", "full").exit_code == 0
    assert json.loads(run("inspect", file, "--json").stdout)["method"] == "full"
    assert run("edit", "--base", tiny_sd15, file, "a fox", "-o", tmp_path / "out.png").exit_code == 0


def test_a_file_of_another_tool_is_opened_with_its_trigger(
    tmp_path: Path, tiny_sd15: Path, adapter_file: Path
) -> None:
    foreign, out = tmp_path / "foreign.safetensors", tmp_path / "out.png"
    with safe_open(adapter_file, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if "lora" in key}  # noqa: SIM118
    save_file(tensors, foreign)
    edit = ("edit", "--base", tiny_sd15, foreign, "a fox", "-o", out, "--strength", "1", "--steps", "2")
    assert "--trigger" in refused(*edit, folder=tmp_path)
    assert run(*edit, "--trigger", "zqrt").exit_code == 0
    assert read_settings(out)["rare_tokens"] == "zqrt"


def test_strip_compress_and_convert_print_json(tmp_path: Path, adapter_file: Path) -> None:
    for command, more in (("strip", []), ("compress", ["--keep", "0.5"]), ("convert", ["--to", "kohya"])):
        output = tmp_path / f"{command}.safetensors"
        result = run(command, adapter_file, "-o", output, *more, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["path"] == str(output) and output.is_file()


def test_a_dry_run_of_a_push_shows_its_license(adapter_file: Path) -> None:
    result = run("push", adapter_file, "me/photo", "--license", "cc-by-4.0", "--dry-run", "--json")
    values = json.loads(result.stdout)
    assert "license: cc-by-4.0" in values["card"] and values["url"] is None
    assert values["files"] == {adapter_file.name: adapter_file.stat().st_size}


def test_the_version() -> None:
    assert run("--version").stdout.strip() == f"lora-unitune, version {__version__}"


# Unusual photos.


def cmyk(path: Path) -> None:
    Image.radial_gradient("L").convert("CMYK").save(path, "JPEG")


def deep(path: Path) -> None:
    Image.fromarray((np.arange(4096) * 16).astype(np.uint16).reshape(64, 64)).save(path, "PNG")


def transparent(path: Path) -> None:
    image = Image.radial_gradient("L").convert("RGBA")
    image.putalpha(Image.linear_gradient("L"))
    image.save(path, "PNG")


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.radial_gradient("L").convert("RGB").save(path, "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("write", "note"),
    [(cmyk, ""), (deep, ""), (transparent, "become white"), (animated, "first of 3"), (turned, "")],
)
def test_unusual_photos_are_fitted(
    tmp_path: Path, tiny_sd15: Path, write: Callable[[Path], None], note: str
) -> None:
    write(tmp_path / "odd")
    result = run("fit", tmp_path / "odd", "-o", tmp_path / "a.safetensors", "--base", tiny_sd15, *QUICK)
    assert result.exit_code == 0, result.output
    assert note in result.stderr and ("note: " in result.stderr) == bool(note)


def test_a_prompt_that_is_too_long_says_what_was_cut(tmp_path: Path, edit: list[str | Path]) -> None:
    result = run(*edit, "a red fox " * 20 + "boat", "-o", tmp_path / "out.png")
    assert result.exit_code == 0
    assert "note: " in result.stderr and "boat" in result.stderr
