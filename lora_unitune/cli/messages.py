"""Translation of the library's messages, which name Python arguments, to command-line options."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any

import click

from lora_unitune.cli.options import SettingOption
from lora_unitune.recipe import SECTIONS
from lora_unitune.settings import LoraSettings

_MENTION = re.compile(
    r"(?<![\w./=\'\"-])(?P<name>[a-z]\w*(?:\.\w+){0,2})"
    r"(?: ?= ?(?P<value>'[^']*'|\"[^\"]*\"|[^\s;,)]*[^\s;,).]))?(?![\w/])"
)
"""A possible argument or setting, with or without its value: "edit.strength = 2", "overwrite=True"."""


def in_options(message: str, command: click.Command, values: Mapping[str, Any]) -> str:
    """Returns an error's message with the command's options in place of arguments and settings.

    "edit.strength = 2" becomes "--strength 2", and "overwrite=True" becomes "--overwrite". A setting without an
    option becomes "--set fit.steps=2", where the command has --set. Messages about a recipe in a file stay.

    Args:
        message: The library's message.
        command: The command that was run.
        values: The values of its parameters, by name; text that the user typed isn't translated.
    """
    if message.startswith(f"recipe {values.get('recipe')}: ") or "the recipe in its header" in message:
        return message
    options = _options_of(command)

    def translated(text: str) -> str:
        def in_place(match: re.Match[str]) -> str:
            name, value = match["name"], match["value"]
            if name in options and (value or "." in name or "_" in name):
                return _written(options[name], value)
            if "overrides" in options and _is_setting(name):
                return f"--set {name}" + (f"={_unquoted(value)}" if value else "")
            return match[0]

        return _MENTION.sub(in_place, text)

    typed = [value for value in values.values() if isinstance(value, str) and translated(value) != value]
    if not typed:
        return translated(message)
    pieces = re.split(f"({'|'.join(map(re.escape, typed))})", message)
    return "".join(piece if piece in typed else translated(piece) for piece in pieces)


def _options_of(command: click.Command) -> dict[str, click.Option]:
    """Returns a command's options by their names in the library."""
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}
    settings = {each.setting: each for each in options.values() if isinstance(each, SettingOption)}
    return {str(name): option for name, option in {**options, **settings}.items()}


def _is_setting(name: str) -> bool:
    section, _, key = name.rpartition(".")
    kind = LoraSettings if section.startswith("lora.") else SECTIONS.get(section)
    return kind is not None and key in {setting.name for setting in dataclasses.fields(kind)}


def _written(option: click.Option, value: str | None) -> str:
    """Returns an option with a value as typed on the command line."""
    name = max(option.opts, key=len)
    if option.is_flag:
        return option.secondary_opts[0] if value == "False" and option.secondary_opts else name
    return name if value is None else f"{name} {_unquoted(value)}"


def _unquoted(value: str) -> str:
    return shlex.quote(value[1:-1]) if value[0] in "'\"" else value
