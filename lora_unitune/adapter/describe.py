"""The content of an adapter file, from its header alone: no torch is imported, and no tensor read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_unitune.adapter.header import PHOTO_KEY, open_source, read_content
from lora_unitune.recipe import Recipe


def describe(place: str | Path) -> dict[str, Any]:
    """Describes an adapter file, from its header alone.

    Args:
        place: Path of a file in any layout or of a PEFT folder, or "hub://owner/name[/file]".

    Returns:
        JSON-serializable values; "ranks" and "targets" are by part, and empty for method "full".

    Raises:
        AdapterFileError: The file doesn't exist, isn't an adapter, or has the wrong tensors.
        SettingError: The hub address is invalid, or names a repository with several files.
        HubError: The hub can't be reached, or has no such file.
    """
    content = read_content(open_source(place))
    recipe: Recipe = content.values["recipe"]
    settings = recipe.lora if recipe.fit.method == "lora" else {}
    weights = {key: shape for key, shape in content.shapes.items() if key != PHOTO_KEY}
    embedded = PHOTO_KEY in content.shapes or content.photo is not None
    size = content.values["size"]
    return {
        "path": str(place),
        "format_version": content.version,
        **{key: value for key, value in content.values.items() if key != "recipe"},
        "size": list(size) if all(size) else None,
        "method": recipe.fit.method,
        "ranks": {part: each.rank for part, each in settings.items()},
        "targets": {part: list(each.targets) for part, each in settings.items() if each.rank},
        "steps": recipe.fit.steps,
        "photo_embedded": embedded,
        "tensors": len(weights),
        "parameters": sum(math.prod(shape) for shape in weights.values()),
        "bytes": content.source.bytes,
        "privacy": _privacy(content.values, embedded),
        "recipe": recipe.to_dict(),
    }


def _privacy(values: Mapping[str, Any], embedded: bool) -> str:
    """Returns a sentence on what a file reveals about its photo and the person who fitted it."""
    details = [f"the base's name {values['base']!r}"]
    details += [f"the day of the fit {values['date']}"] if values["date"] else []
    details += ["its settings, seed and seconds"] if values["seconds"] else []
    details += ["a digest of the photo's pixels"] if values["photo_digest"] else []
    details += ["the photo in the base's latents"] if embedded else []
    return f"this file can redraw its photo; it also holds {', '.join(details)} (see strip)"
