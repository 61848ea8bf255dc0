"""README's commands and programs: all are valid, and those that need only pocket run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import click
import pytest
from command_line import QUICK, run
from diffusers import StableDiffusionPipeline
from PIL import Image

import lora_unitune
from benchmarks.readme import BEGIN, END, RESULTS, with_table
from lora_unitune.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [line for language, text in BLOCKS if language in ("", "sh", "bash") for line in text.splitlines()]
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
MAIN = ("fit", "edit", "repeat", "inspect", "convert", "compress")


def commands_in(lines: list[str]) -> list[list[str]]:
    """Returns the words after `lora-unitune` of each command, comments left out."""
    parts = [part.strip() for line in lines for part in line.split("&&")]
    split = [shlex.split(part, comments=True) for part in parts if part.startswith("lora-unitune ")]
    return [words[1:] for words in split]


COMMANDS = commands_in(SHELL)


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parses a command without running it; returns its name and its parameters."""
    with main.make_context("lora-unitune", list(words)) as context:
        name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None and command is not None
        with command.make_context(name, rest, parent=context) as inner:
            return name, inner.params


def runs_here(name: str, parameters: dict[str, Any]) -> bool:
    """Returns whether a command needs nothing but pocket and files that README's commands wrote."""
    elsewhere = parameters.get("base") not in (None, "pocket") or any(
        isinstance(value, str) and "://" in value for value in parameters.values()
    )
    return name in MAIN and not elsewhere


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the photo and the recipe that README uses."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").resize((80, 64)).save("photo.jpg")
    Image.linear_gradient("L").resize((80, 64)).save("sky.png")
    Image.radial_gradient("L").convert("RGB").resize((2400, 1800)).save("holiday.jpg")
    shutil.copy(ROOT / "recipes" / "pocket" / "default.toml", "mine.toml")
    return tmp_path


def test_readme_shows_the_main_commands_and_a_program() -> None:
    assert {words[0] for words in COMMANDS} >= {*MAIN, "demo"} and PROGRAMS


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_accepted(words: list[str]) -> None:
    parsed(words)


@pytest.mark.parametrize(
    "wrong", ["fitt photo.jpg", "fit photo.jpg -o a --bass pocket", "edit a.safetensors"]
)
def test_a_wrong_command_is_not(wrong: str) -> None:
    with pytest.raises(click.UsageError):
        parsed(wrong.split())


def test_the_main_commands_run_in_order(folder: Path) -> None:
    ran = set()
    for words in COMMANDS:
        name, parameters = parsed(words)
        if runs_here(name, parameters):
            quick = {"fit": QUICK, "edit": ["--steps", "2"]}.get(name, [])
            if parameters.get("method") == "full":  # for comparison: what comes after it means adapters
                quick = [*quick, "-o", "full.safetensors"]
            overwrite = ["--overwrite"] if "overwrite" in parameters else []
            result = run(*words, *quick, *overwrite)
            assert result.exit_code == 0, f"{' '.join(words)}: {result.output}"
            ran.add(name)
    assert ran == set(MAIN)


def test_the_programs_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(lora_unitune.fit, overrides=("fit.steps=2", "fit.batch_size=1", "edit.steps=2"))
    monkeypatch.setattr(lora_unitune, "fit", quick)
    two_steps = partialmethod(StableDiffusionPipeline.__call__, num_inference_steps=2)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", two_steps)
    for text in PROGRAMS:
        Path("photo.safetensors").unlink(missing_ok=True)
        if ".save(" not in text.partition("photo.safetensors")[0]:  # it reads a file that a command made
            assert run("fit", "photo.jpg", "-o", "photo.safetensors", *QUICK).exit_code == 0
        Path("out.png").unlink(missing_ok=True)
        exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
        assert Path("out.png").exists() == ("out.png" in text)


def test_what_the_set_up_commands_name_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installs = re.findall(r"pip install ([^&`\n]*)", README)
    assert installs
    for words in map(shlex.split, installs):
        assert (ROOT / words[words.index("-c") + 1]).is_file(), words
        target = words[-1]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
        assert extras, f"{target} isn't this project"
        named = set((extras[1] or "").split(",")) - {""}
        assert named <= project["optional-dependencies"].keys()
    assert any("lora-unitune demo" in line for line in SHELL if line.startswith("pip install"))
    assert any("python -m pytest" in line for line in SHELL if line.startswith("pip install"))


def test_the_table_is_that_of_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert with_table(README, results) == README, "run python -m benchmarks.readme"
    assert "**LoRA** (ours) |" in with_table(f"{BEGIN}\n{END}", results)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) < 140
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert "://" in target or (file.parent / target).exists(), f"{file.name}: {target}"
