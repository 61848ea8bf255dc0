"""Recipes: every setting of a fit and the defaults of its edits, as one value that reads and writes TOML.

A recipe's TOML sections carry the names of the fields of `Recipe`; the section `lora` has one section below it
for each part of the base. Keys, types and ranges are strict: anything else is a `RecipeError` that says what
is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from lora_unitune.errors import RecipeError
from lora_unitune.settings import (
    EditSettings,
    FitSettings,
    LoraSettings,
    PhotoSettings,
    PromptSettings,
    Section,
    kind_of,
    make_section,
    nearest,
)

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

_PACKAGE_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """Every setting of a fit and the defaults of its edits.

    Attributes:
        photo: Size at which the base processes the photo.
        lora: Adapter settings by part of the base; a missing part has the defaults of the base's family.
        fit: The training.
        prompt: The rare tokens.
        edit: Default settings of the edits.
    """

    photo: PhotoSettings = field(default_factory=PhotoSettings)
    lora: Mapping[str, LoraSettings] = field(default_factory=dict)
    fit: FitSettings = field(default_factory=FitSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    edit: EditSettings = field(default_factory=EditSettings)

    def __post_init__(self) -> None:
        for name, kind in SECTIONS.items():
            if not isinstance(getattr(self, name), kind):
                raise RecipeError(
                    f"recipe section {name} has to be a {kind.__name__}, not {getattr(self, name)!r}"
                )
        if not isinstance(self.lora, Mapping):
            raise RecipeError(f"recipe section lora has to map parts to settings, not {self.lora!r}")
        for part, section in self.lora.items():
            if not isinstance(part, str) or not part.isidentifier():
                raise RecipeError(f"lora.{part} isn't a part's name; it takes letters, digits and _")
            if not isinstance(section, LoraSettings):
                raise RecipeError(f"recipe section lora.{part} has to be a LoraSettings, not {section!r}")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Reads a shipped recipe by its name ("pocket/default") or any TOML file by its path.

        Args:
            name_or_path: A name from `available_recipes()`, or a path ending in .toml.

        Returns:
            The recipe, with defaults for settings that the file doesn't set.

        Raises:
            RecipeError: The recipe doesn't exist, or its content isn't valid.
        """
        name = str(name_or_path)
        path = Path(name) if name.endswith(".toml") else _recipe_folder() / f"{name}.toml"
        if not name.endswith(".toml") and name not in available_recipes():
            raise RecipeError(
                f"unknown recipe {name!r}{nearest(name, available_recipes())}; give one of "
                f"{', '.join(available_recipes())}, or the path of a .toml file"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"recipe file {name!r} doesn't exist; check the path") from None
        except UnicodeDecodeError:
            raise RecipeError(f"recipe file {name!r} isn't UTF-8 text; give a TOML file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"recipe file {name!r} can't be read: {reason}") from None
        try:
            return cls.from_toml(text)
        except RecipeError as error:
            raise RecipeError(f"recipe {name}: {error}") from None

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Reads a recipe from TOML text.

        Raises:
            RecipeError: The text isn't TOML, or a key, type or value isn't allowed.
        """
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"not valid TOML: {' '.join(str(error).split())}") from None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from nested dictionaries, as `to_dict` returns; missing keys keep their defaults.

        Raises:
            RecipeError: A key, type or value isn't allowed.
        """
        return cls()._with(settings)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the recipe as nested dictionaries that JSON and TOML can hold (tuples as lists)."""
        return {name: _plain(section) for name, section in dataclasses.asdict(self).items()}

    def to_toml(self) -> str:
        """Returns the recipe as TOML with every value written out."""
        return toml(self.to_dict())

    def override(self, assignments: str | Sequence[str]) -> Recipe:
        """Returns a copy with some settings replaced.

        Args:
            assignments: One string, or several, like "fit.steps=50", "lora.PART.targets=a,b" or "fit.precision=bf16".

        Raises:
            RecipeError: An assignment isn't of that form, or its key, type or value isn't allowed.
        """
        changes: dict[str, Any] = {}
        for assignment in (assignments,) if isinstance(assignments, str) else assignments:
            if not isinstance(assignment, str):
                raise RecipeError(f"overrides: {assignment!r} isn't text; write 'SECTION.KEY=VALUE'")
            name, equals, text = assignment.partition("=")
            section, dot, key = name.strip().rpartition(".")
            if not equals or not dot or not key:
                raise RecipeError(
                    f"can't read the setting {assignment!r}; write SECTION.KEY=VALUE, as in fit.steps=50"
                )
            value = _parse_value(text.strip(), kind_of(_section_kind(section), section, key))
            first, _, part = section.partition(".")
            holder = changes.setdefault(first, {})
            (holder.setdefault(part, {}) if part else holder)[key] = value
        return self._with(changes)

    def _with(self, changes: Mapping[str, Any]) -> Recipe:
        """Returns a copy with the settings in nested dictionaries; invalid ones raise a RecipeError."""
        sections: dict[str, Any] = {}
        for name, values in changes.items():
            if not isinstance(values, Mapping) and (name in SECTIONS or name == "lora"):
                raise RecipeError(
                    f"{name} has to be a section, not {values!r}; write [{name}] above its keys"
                )
            if name == "lora":
                sections[name] = dict(self.lora) | self._parts_with(values)
            else:
                kind = _section_kind(name)
                sections[name] = make_section(kind, name, values, getattr(self, name))
        return dataclasses.replace(self, **sections)

    def _parts_with(self, changes: Mapping[str, Any]) -> dict[str, LoraSettings]:
        """Returns the changed sections below `lora`."""
        changed = {}
        for part, values in changes.items():
            name = f"lora.{part}"
            if not isinstance(values, Mapping):
                raise RecipeError(
                    f"{name} = {values!r} isn't allowed; each part of the base has its own section: write "
                    "[lora.PART] above its rank, alpha and targets"
                )
            changed[part] = make_section(LoraSettings, name, values, self.lora.get(part))
        return changed


SECTIONS: dict[str, type[Section]] = {
    "photo": PhotoSettings,
    "fit": FitSettings,
    "prompt": PromptSettings,
    "edit": EditSettings,
}
"""Sections of a recipe except those of `lora`."""


def available_recipes() -> list[str]:
    """Returns the names of the recipes that ship with the package, sorted, such as "pocket/default"."""
    folder = _recipe_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.toml"))


def _recipe_folder() -> Path:
    """Returns the folder of the recipes: inside an installed package, or at the top of a source checkout."""
    installed = _PACKAGE_FOLDER / "recipes"
    return installed if installed.is_dir() else _PACKAGE_FOLDER.parent / "recipes"


def _section_kind(name: str) -> type[Section]:
    """Returns the class of a section; "lora.PART" is that of a part.

    Raises:
        RecipeError: There is no such section.
    """
    first, _, part = name.partition(".")
    if first == "lora" and part:
        return LoraSettings
    if name not in SECTIONS:
        known = [*SECTIONS, "lora.PART"]
        hint = " (settings are by part: lora.PART.rank)" if first == "lora" else nearest(name, SECTIONS)
        raise RecipeError(f"unknown recipe section {name!r}{hint}; the sections are {', '.join(known)}")
    return SECTIONS[name]


def _plain(value: Any) -> Any:
    """Returns nested dictionaries with lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _parse_value(text: str, kind: Any) -> Any:
    """Parses an override in the setting's type; text that can't be parsed is returned for the check to refuse."""
    if get_origin(kind) is tuple:
        return [part.strip().strip("\"'") for part in text.strip("[]").split(",") if part.strip()]
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file of the package's own."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns sections of a recipe, as `Recipe.to_dict` returns them, as TOML."""
    others = dict(sections)
    parts = {f"lora.{part}": section for part, section in others.pop("lora").items()}
    blocks = []
    for name, section in {**parts, **others}.items():
        lines = [f"{key} = {_toml_value(value)}" for key, value in section.items()]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _toml_value(value: Any) -> str:
    """Returns a value as TOML; strings are printable, so JSON's escapes are valid TOML."""
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)
