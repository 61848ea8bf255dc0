"""Progress where there is no terminal: a line for each stage's begin and end, and one every so often."""

from __future__ import annotations

import pytest
from command_line import run

from lora_unitune.cli import terminal
from lora_unitune.cli.terminal import progress
from lora_unitune.recipe import available_recipes


def test_lines_come_every_so_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 10_000, 2))
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with progress() as display:
        for step in range(1, 21):
            now[0] = float(next(seconds))
            display.show(f"fitting, loss {step}", step, 20)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [
        "1 of 20",
        "6 of 20",
        "11 of 20",
        "16 of 20",
        "20 of 20",
    ]


def test_help_names_recipes_and_defaults() -> None:
    text = " ".join(run("fit", "-h").stdout.split())
    for name in available_recipes():
        assert name in text
    text = " ".join(run("edit", "-h").stdout.split())
    assert "(the recipe's, or 25)" in text and "(the recipe's, or no)" in text


def test_words_are_listed_by_kind() -> None:
    lines = dict(line.split(maxsplit=1) for line in run("words").stdout.splitlines())
    assert lines["colors"] == "red, blue, green, yellow" and "fox" in lines["objects"]
