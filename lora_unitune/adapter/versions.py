"""Migration of headers of earlier format versions to the newest version.

A header of version 2 is one of version 3 without weights of the parts, which default to 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_unitune.families import FAMILIES, Family

_FIRST_LORA_KEY = re.compile(r"(?P<part>\w+)_(?P<key>rank|alpha|targets)")


def from_version_1(header: Mapping[str, Any]) -> dict[str, Any]:
    """Migrates a header of version 1 to version 2.

    Version 1 knew square photos only, and its recipe had the settings of all parts in one section. Anything
    that version 1 never wrote is left unchanged, for the checks to refuse.

    Args:
        header: The "lora_unitune" entry, decoded.
    """
    migrated = {key: value for key, value in header.items() if key != "resolution"}
    migrated["format_version"] = 2
    if "resolution" in header:
        migrated["size"] = [header["resolution"], header["resolution"]]
    name, recipe = header.get("family"), header.get("recipe")
    if isinstance(recipe, Mapping) and isinstance(name, str) and name in FAMILIES:
        migrated["recipe"] = _recipe(recipe, FAMILIES[name])
    return migrated


def _recipe(recipe: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Migrates a recipe of version 1 to version 2."""
    sections = dict(recipe)
    photo, lora, fit = (sections.get(name, {}) for name in ("photo", "lora", "fit"))
    if isinstance(photo, Mapping) and "resolution" in photo:
        side = photo["resolution"]
        size = side if type(side) is not int else f"{side}x{side}" if side else ""
        others = {key: value for key, value in photo.items() if key != "resolution"}
        sections["photo"] = {**others, "size": size}
    if not isinstance(lora, Mapping):
        return sections
    known = {part for each in FAMILIES.values() for part in each.parts}
    rates: dict[str, Any] = {}
    if isinstance(fit, Mapping):
        names = {f"{part}_learning_rate" for part in known}
        rates = {key: value for key, value in fit.items() if key in names}
        sections["fit"] = {key: value for key, value in fit.items() if key not in rates}
    sections["lora"] = {key: value for key, value in lora.items() if _part_of(key) not in known}
    for part, default in family.parts.items():
        settings = {"rank": default.rank, "alpha": float(default.rank)}  # the defaults of version 1
        settings |= {
            match["key"]: value
            for key, value in lora.items()
            if (match := _FIRST_LORA_KEY.fullmatch(key)) and match["part"] == part
        }
        first = re.sub(r"_\d+$", "", part)  # a second encoder of a kind had the first one's learning rate
        if f"{first}_learning_rate" in rates:
            settings["learning_rate"] = rates[f"{first}_learning_rate"]
        sections["lora"][part] = settings
    return sections


def _part_of(key: str) -> str:
    """Returns the part that a key of version 1's section `lora` belongs to, "" if it has none."""
    match = _FIRST_LORA_KEY.fullmatch(key)
    return match["part"] if match else ""
