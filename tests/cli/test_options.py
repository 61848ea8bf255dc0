"""Options generated from a recipe's fields, and shell completion."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import click
import pytest
from click.shell_completion import ShellComplete
from command_line import run

from lora_unitune.cli import main
from lora_unitune.cli.terminal import Command
from lora_unitune.errors import RecipeError
from lora_unitune.recipe import available_recipes
from lora_unitune.settings import EditSettings

COMMANDS = sorted(main.commands)
SETTINGS = {setting.name: setting for setting in dataclasses.fields(EditSettings)}
HINTS = get_type_hints(EditSettings)
NUMBERS = [name for name in SETTINGS if HINTS[name] in (int, float)]


def option_of(name: str) -> click.Option:
    """Returns the option of `edit` for a setting."""
    (option,) = [each for each in main.commands["edit"].params if each.name == name]
    assert isinstance(option, click.Option)
    return option


def accepts(option: click.Option, value: float) -> bool:
    """Returns whether an option takes a value."""
    try:
        option.type.convert(str(value), option, None)
    except click.BadParameter:
        return False
    return True


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_of_an_edit_is_an_option_without_a_default(name: str) -> None:
    option, hint = option_of(name), HINTS[name]
    assert f"--{name.replace('_', '-')}" in option.opts and option.default is None
    assert option.help == SETTINGS[name].metadata["help"]
    if hint is bool:
        assert option.secondary_opts == [f"--no-{name.replace('_', '-')}"]
    if get_origin(hint) is Literal:
        assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == get_args(hint)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_option_takes_what_its_field_takes(name: str) -> None:
    low, high = SETTINGS[name].metadata["low"], SETTINGS[name].metadata["high"]
    step = 1 if HINTS[name] is int else 1e-6
    for value in (low - step, low, low + step, high - step, high, high + step):
        value = HINTS[name](value)
        try:
            EditSettings(**{name: value})
            is_allowed = True
        except RecipeError:
            is_allowed = False
        assert accepts(option_of(name), value) == is_allowed, value
    assert not accepts(option_of(name), float("nan"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_examples_and_help_for_each_option(name: str) -> None:
    command = main.commands[name]
    assert isinstance(command, Command)
    text = run(name, "-h").stdout
    assert text == run(name, "--help").stdout and f"\n    lora-unitune {name}" in text and "--json" in text
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and option.help.endswith("."), option.name


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands_that_exist(name: str) -> None:
    for words in re.findall(r"^    lora-unitune (.*)$", run(name, "-h").stdout, re.MULTILINE):
        arguments = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', words)]
        main.commands[arguments[0]].make_context("example", arguments[1:])


def completions(arguments: list[str], incomplete: str) -> list[tuple[str, str]]:
    """Returns type and value of each shell completion."""
    shell = ShellComplete(main, {}, "lora-unitune", "_LORA_UNITUNE_COMPLETE")
    return [(item.type, item.value) for item in shell.get_completions(arguments, incomplete)]


def test_shells_complete_paths_recipes_and_bases() -> None:
    for arguments in (["fit"], ["fit", "-o"], ["edit"], ["edit", "--photo"], ["push", "--picture"]):
        assert completions(arguments, "ph") == [("file", "ph")]
    assert completions(["demo", "-o"], "ph") == [("dir", "ph")]
    names = [("plain", name) for name in available_recipes()]
    assert completions(["fit", "--recipe"], "") == [("file", ""), *names]
    assert completions(["fit", "--recipe"], "pocket/d") == [("file", "pocket/d"), ("plain", "pocket/default")]
    assert completions(["edit", "--base"], "po") == [("file", "po"), ("plain", "pocket")]
    assert completions(["edit", "--base"], "x") == [("file", "x")]
    assert ("plain", "--strength") in completions(["edit"], "--str")


def test_help_and_inspect_load_nothing_heavy(tmp_path: Path, adapter_file: Path) -> None:
    code = (
        "import sys\nfrom lora_unitune.cli import main\n"
        "main({arguments}, standalone_mode=False)\n"
        "print(sorted({{'torch', 'numpy', 'PIL', 'diffusers', 'rich', 'huggingface_hub'}} & set(sys.modules)))"
    )
    for arguments in (["inspect", str(adapter_file)], ["edit", "--help"]):
        command = [sys.executable, "-c", code.format(arguments=arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == "[]"
