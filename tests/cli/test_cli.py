"""The command line: what a person types."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from command_line import QUICK, refused, run
from PIL import Image

from lora_unitune import Adapter, __version__
from lora_unitune.editing.record import read_settings


def test_fit_prints_one_json_object_and_progress_elsewhere(fitted: tuple[Path, Result]) -> None:
    file, result = fitted
    told = json.loads(result.stdout)
    assert told["path"] == str(file) and told["bytes"] == file.stat().st_size and told["steps"] == 2
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
    for text in (Adapter.load(file).rare_tokens, "unet 8", "to_q", "format version  1", "[fit]", "steps = 2"):
        assert text in result.stdout
    told = json.loads(run("inspect", file, "--json").stdout)
    assert told["seed"] == 3 and told["recipe"]["fit"]["steps"] == 2


def test_every_png_carries_its_settings_and_repeats(tmp_path: Path, edit: list[str | Path]) -> None:
    dials = ["--guidance", "3", "--strength", "0.8", "--adapter-scale", "0.5", "--steps", "4"]
    result = run(*edit, "a fox", "-o", tmp_path / "out.png", "-n", "3", "--seed", "5", *dials, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [Path(image["file"]).name for image in told["images"]] == ["out-5.png", "out-6.png", "out-7.png"]
    for seed, image in enumerate(told["images"], start=5):
        settings = read_settings(image["file"])
        assert settings == image["settings"]
        assert (settings["seed"], settings["guidance"], settings["strength"]) == (seed, 3.0, 0.8)
        assert (settings["adapter_scale"], settings["steps"]) == (0.5, 4)
    assert run(*edit, "a fox", "-o", tmp_path / "one.png", "--seed", "6", *dials).exit_code == 0
    assert Image.open(tmp_path / "one.png").tobytes() == Image.open(tmp_path / "out-6.png").tobytes()


def test_a_file_without_its_photo_takes_one_along(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    file = tmp_path / "bare.safetensors"
    assert run("fit", photo, "-o", file, "--base", tiny_sd15, *QUICK, "--no-embed-photo").exit_code == 0
    edit = ("edit", "--base", tiny_sd15, file, "a fox", "-o", tmp_path / "out.png", "--strength", "0.8")
    assert "--photo" in refused(*edit, folder=tmp_path)
    assert run(*edit, "--photo", photo).exit_code == 0


def test_all_weights_can_be_fitted_for_comparison(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    file = tmp_path / "full.safetensors"
    assert run("fit", photo, "-o", file, "--base", tiny_sd15, *QUICK, "--method", "full").exit_code == 0
    assert json.loads(run("inspect", file, "--json").stdout)["method"] == "full"
    assert run("edit", "--base", tiny_sd15, file, "a fox", "-o", tmp_path / "out.png").exit_code == 0


@pytest.mark.parametrize("command", ["fit", "edit", "inspect", "demo"])
def test_every_command_has_examples_in_its_help(command: str) -> None:
    text = run(command, "--help").stdout
    assert f"lora-unitune {command} " in text and "--json" in text
    assert f"lora-unitune {command} " in run("--help").stdout or command == "demo"


def test_the_version_is_told() -> None:
    assert run("--version").stdout.strip() == f"lora-unitune, version {__version__}"


# Photos that are handled as a person expects.


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
    [(cmyk, ""), (deep, "8 bits"), (transparent, "on white"), (animated, "first of 3"), (turned, "")],
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


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from lora_unitune.cli import main; main()"
    )
    given = ["fit", photo, "-o", tmp_path / "a.safetensors", "--base", tiny_sd15, "--set", "fit.steps=5000"]
    command = [sys.executable, "-c", code, *map(str, given)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("fitting"):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130 and output == ""
    assert errors.splitlines() == ["stopped; nothing was written"]
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
