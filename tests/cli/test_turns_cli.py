"""Edits of edits and their repetition on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import refused, run
from PIL import Image, PngImagePlugin

from lora_unitune import read_settings

QUICK = ("--strength", "0.5", "--device", "cpu")


def repeat(base: Path, adapter: Path, picture: Path, *more: str | Path) -> list[str | Path]:
    return ["repeat", picture, "--adapter", adapter, "--base", base, "--device", "cpu", *more]


@pytest.mark.parametrize("name", ["both.jpg", "both.png"])
def test_turns_are_recorded_shown_and_repeated(
    edit: list[str | Path], tiny_sd15: Path, adapter_file: Path, photo: Path, tmp_path: Path, name: str
) -> None:
    out, again = tmp_path / name, tmp_path / f"again-{name}"
    given = ("--photo", photo)
    result = run(*edit, "at sunset", *given, *QUICK, "--then", "a fox", "--then", "in the snow", "-o", out)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(rf"{re.escape(str(out))}: \d+\.\d s\n", result.stdout)
    with Image.open(out) as image, Image.open(photo) as before:
        assert image.size == before.size
    shown = run("inspect", out).stdout
    assert [
        line.split(maxsplit=1)[1] for line in shown.splitlines() if line.strip().startswith("prompt")
    ] == [
        "at sunset",
        "a fox",
        "in the snow",
    ]
    settings = read_settings(out)
    assert json.loads(run("inspect", out, "--json").stdout) == settings
    result = run(*repeat(tiny_sd15, adapter_file, out, *given, "-o", again))
    assert result.exit_code == 0, result.output
    assert again.read_bytes() == out.read_bytes()


def test_several_samples_each_take_all_turns(
    edit: list[str | Path], tiny_sd15: Path, adapter_file: Path, tmp_path: Path
) -> None:
    out = ("-n", "2", "--seed", "5", "-o", tmp_path / "out.png")
    result = run(*edit, "at sunset", *QUICK, "--then", "a fox", *out, "--json")
    assert result.exit_code == 0, result.output
    images = json.loads(result.stdout)["images"]
    assert [(image["settings"]["seed"], image["settings"]["earlier"][0]["seed"]) for image in images] == [
        (5, 5),
        (6, 6),
    ]
    again = run(*repeat(tiny_sd15, adapter_file, tmp_path / "out-6.png", "-o", tmp_path / "6.png", "--json"))
    assert json.loads(again.stdout)["image"]["settings"] == images[1]["settings"]
    assert (tmp_path / "6.png").read_bytes() == (tmp_path / "out-6.png").read_bytes()


def test_what_cannot_be_repeated_is_one_line(
    edit: list[str | Path], tiny_sd15: Path, adapter_file: Path, photo: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    run(*edit, "at sunset", "--photo", photo, *QUICK, "-o", out)
    other = tmp_path / "other.png"
    Image.linear_gradient("L").convert("RGB").save(other)
    for more, message in (
        ((), "give that photo again"),
        (("--photo", other), "another photo"),
        (("--photo", photo, "--mask", other), "repeat it without --mask PATH"),
    ):
        line = refused(*repeat(tiny_sd15, adapter_file, out, *more, "-o", again), folder=tmp_path)
        assert message in line
    for picture, message in (
        (photo, "has no settings of an edit"),
        (tmp_path / "missing.png", "has no settings"),
    ):
        assert message in refused(*repeat(tiny_sd15, adapter_file, picture, "-o", again), folder=tmp_path)
    taken = repeat(tiny_sd15, adapter_file, out, "--photo", photo, "-o", out, "--overwrite")
    assert "which the command reads" in refused(*taken, folder=tmp_path)
    line = refused(*edit, "at sunset", "--strength", "1", "--then", "a fox", "-o", again, folder=tmp_path)
    assert "--strength 1" in line and "can't edit an edit" in line
    assert "empty" in refused(*edit, "at sunset", "--then", "", "-o", again, folder=tmp_path)


def test_settings_with_broken_turns_are_one_line(tmp_path: Path) -> None:
    for number, earlier in enumerate(("a fox", [1], {"prompt": "a fox"})):
        info = PngImagePlugin.PngInfo()
        info.add_text("lora_unitune", json.dumps({"prompt": "a fox", "earlier": earlier}))
        picture = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8)).save(picture, pnginfo=info)
        assert "use the complete settings" in refused("inspect", picture, folder=tmp_path)
