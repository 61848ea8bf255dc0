"""Errors name arguments in Python and options on the command line."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import click
import pytest

import lora_unitune
from lora_unitune.cli import main
from lora_unitune.cli.messages import in_options
from lora_unitune.errors import RecipeError
from lora_unitune.recipe import SECTIONS, Recipe
from lora_unitune.settings import LoraSettings

PACKAGE = Path(lora_unitune.__file__).resolve().parent
EVERY = {**SECTIONS, "lora.unet": LoraSettings}
SETTINGS = [f"{name}.{field.name}" for name, kind in EVERY.items() for field in dataclasses.fields(kind)]
OPTIONS = [
    (name, option)
    for name, command in sorted(main.commands.items())
    for option in command.params
    if isinstance(option, click.Option)
]


def refusal(setting: str) -> str:
    """Returns the library's message about a value that a setting can't have."""
    section, _, key = setting.rpartition(".")
    values = {key: object()} if section in SECTIONS else {"rank": 1, key: object()}
    settings = {"lora": {"unet": values}} if section not in SECTIONS else {section: values}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(settings)
    return str(caught.value)


def translated(message: str, command: str, **values: object) -> str:
    return in_options(message, main.commands[command], values)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_named_as_it_is_typed(setting: str) -> None:
    message, key = refusal(setting), setting.rpartition(".")[2].replace("_", "-")
    assert message.startswith(f"{setting} = ")
    fit = translated(message, "fit")
    assert fit.startswith(f"--{key} " if setting in ("fit.method", "photo.box") else f"--set {setting}=")
    edit = translated(message, "edit")
    assert edit.startswith(f"--{key}" if setting.startswith("edit.") else setting)
    assert translated(message, "inspect") == message


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_in_a_file_keep_their_names(setting: str) -> None:
    for message in (
        f"recipe my.toml: {refusal(setting)}",
        f"a.safetensors: the recipe in its header is wrong: {refusal(setting)}",
    ):
        assert translated(message, "fit", recipe="my.toml") == message


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda each: getattr(each, "name", each))
def test_every_argument_with_its_value_is_an_option(command: str, option: click.Option) -> None:
    flag = max(option.opts, key=len)
    if option.is_flag:
        assert translated(f"pass {option.name}=True.", command) == f"pass {flag}."
        if option.secondary_opts:
            assert translated(f"({option.name}=False)", command) == f"({option.secondary_opts[0]})"
    else:
        assert translated(f"{option.name} = 2 isn't allowed", command) == f"{flag} 2 isn't allowed"
        assert translated(f"with {option.name}='a b'; go", command) == f"with {flag} 'a b'; go"


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("edit", "edit.strength = 0.01 leaves none of 9 steps; raise one",
         "--strength 0.01 leaves none of 9 steps; raise one"),
        ("edit", "open it with trigger='WORDS', which stand for it",
         "open it with --trigger WORDS, which stand for it"),
        ("edit", "pass photo=PATH, or strength=1", "pass --photo PATH, or --strength 1"),
        ("edit", "the seed of a photo, its base and steps", "the seed of a photo, its base and steps"),
        ("edit", "edit.residual = 'x' isn't allowed", "--residual isn't allowed"),
        ("compress", "give one limit, keep=SHARE or to_bytes=N", "give one limit, --keep SHARE or --to-bytes N"),
        ("fit", "fit.precision = 'fp16' needs a GPU; use fp32", "--set fit.precision=fp16 needs a GPU; use fp32"),
        ("fit", "lower lora.unet.learning_rate (0.1), or use fit.precision=fp32",
         "lower --set lora.unet.learning_rate (0.1), or use --set fit.precision=fp32"),
        ("demo", "pass overwrite=True to replace them", "pass --overwrite to replace them"),
    ],
)  # fmt: skip
def test_sentences(command: str, message: str, expected: str) -> None:
    assert translated(message, command) == expected


def test_what_was_typed_stays() -> None:
    for typed in ("steps=3.png", "overwrite=True", "a photo with seed = 4"):
        message = f"{typed} doesn't exist; edit.steps = 3"
        assert translated(message, "edit", photo=typed) == f"{typed} doesn't exist; --steps 3"
        quoted = f"{typed!r} isn't allowed"
        assert translated(quoted, "edit", photo=typed) == quoted


def test_the_library_speaks_python() -> None:
    """No error outside of the command line, and of pretraining's own, names an option."""
    for path in PACKAGE.rglob("*.py"):
        if {"cli", "pretraining"} & set(path.relative_to(PACKAGE).parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = [inner for node in ast.walk(tree) if isinstance(node, ast.Raise) for inner in ast.walk(node)]
        texts = [str(each.value) for each in raised if isinstance(each, ast.Constant)]
        options = [text for text in texts if re.search(r"(?<![\w-])--[a-z]", text)]
        assert not options, f"{path.name}: {options}"
