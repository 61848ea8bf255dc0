"""The content of an adapter file, from its header alone: no torch is imported, and no tensor read.

Only what the file says is stated: what it doesn't is None.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_unitune.adapter.checks import is_line
from lora_unitune.adapter.foreign import certain_family, stated_base
from lora_unitune.adapter.header import PHOTO_KEY, Content, open_source, read_content
from lora_unitune.adapter.tools import readers_of
from lora_unitune.recipe import Recipe

_CREDITS = ("title", "author", "license", "tags", "description", "usage_hint")
_TRAINING = (
    "network_module",
    "network_dim",
    "network_alpha",
    "learning_rate",
    "optimizer",
    "lr_scheduler",
    "num_epochs",
    "num_train_images",
    "clip_skip",
)
_LONGEST = 200  # characters of an entry


def describe(place: str | Path) -> dict[str, Any]:
    """Describes an adapter file, from its header alone.

    Args:
        place: Path of a file in any layout or of a PEFT folder, or "hub://owner/name[/file]".

    Returns:
        JSON-serializable values, None where the file doesn't say; "ranks" and "targets" are by part, and empty
        for method "full". "recipe" holds only the settings that the file says, and "entries" what the header of
        another tool's file says of its author and training.

    Raises:
        AdapterFileError: The file doesn't exist, isn't an adapter, or has the wrong tensors.
        SettingError: The hub address is invalid, or names a repository with several files.
        HubError: The hub can't be reached, or has no such file.
    """
    content = read_content(open_source(place))
    values = {key: value for key, value in content.values.items() if key not in ("recipe", "entries")}
    recipe: Recipe = content.values["recipe"]
    settings = recipe.lora if recipe.fit.method == "lora" else {}
    weights = {key: shape for key, shape in content.shapes.items() if key != PHOTO_KEY}
    shapes = [*weights.values(), *(shape for _, shape in content.magnitudes.values())]
    embedded = PHOTO_KEY in content.shapes or content.photo is not None
    is_ours = content.version is not None
    if not is_ours:
        values |= _of_another_tool(content, weights)
    elif not values["seconds"]:  # stripped
        values |= {"seed": None, "seconds": None}
    if not any(values["size"] or ()):
        values["size"] = None
    targets = {part: list(each.targets) for part, each in settings.items() if each.rank}
    return {
        "path": str(place),
        "format_version": content.version,
        **values,
        "size": list(values["size"]) if values["size"] else None,
        "photo_size": list(values.get("photo_size", ())) or None,
        "box": [int(number) for number in recipe.photo.box.split(",") if number] if is_ours else None,
        "method": recipe.fit.method,
        "ranks": {part: each.rank for part, each in settings.items()},
        "targets": targets if is_ours else {part: _endings(names) for part, names in targets.items()},
        "steps": recipe.fit.steps if is_ours and values["seconds"] else values.get("steps"),
        "photo_embedded": embedded,
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes)),
        "bytes": content.source.bytes,
        "read_by": readers_of(content.source),
        "entries": _entries(content.source.metadata) if not is_ours else {},
        "privacy": _privacy(values, embedded) if is_ours else _privacy_of_another_tool(content),
        "recipe": _known_settings(recipe, bool(values["seconds"])) if is_ours else None,
    }


def _of_another_tool(content: Content, weights: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns what the header of another tool's file says of its training, in the names of `describe`."""
    metadata = content.source.metadata
    family = certain_family(weights, metadata)
    started, finished = (_number(metadata.get(f"ss_training_{end}_at")) for end in ("started", "finished"))
    date = metadata.get("modelspec.date", "")[:10]
    if not date and started is not None:
        date = time.strftime("%Y-%m-%d", time.gmtime(min(started, 2.0**32)))
    resolution = metadata.get("ss_resolution", "") or metadata.get("modelspec.resolution", "")
    sides = [int(side) for side in re.findall(r"\d{1,5}", resolution)[:2]]
    base = _line(metadata.get("ss_sd_model_name", "")) or stated_base(metadata)
    seed, steps = (_number(metadata.get(key)) for key in ("ss_seed", "ss_steps"))
    return {
        "base": base or "unknown",
        "family": family.name if family else None,
        "size": (sides * 2)[:2],
        "seed": None if seed is None else int(seed),
        "steps": None if steps is None else int(steps),
        "seconds": finished - started if None not in (started, finished) else None,  # type: ignore[operator]
        "date": _line(date),
        "photo_digest": "",
    }


def _entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns what a header says of an adapter's author and training, in its own words."""
    said = {name: metadata.get(f"modelspec.{name}", "") for name in _CREDITS}
    said |= {name: metadata.get(f"ss_{name}", "") for name in _TRAINING}
    said |= {
        key.removeprefix("ss_"): text for key, text in metadata.items() if re.fullmatch(r"ss_\w+_lr", key)
    }
    return {name: line for name, text in said.items() if (line := _line(text)) and line != "None"}


def _known_settings(recipe: Recipe, has_fit: bool) -> dict[str, Any]:
    """Returns the settings of a recipe that a file says: without those of the fit, if it was stripped."""
    settings = recipe.to_dict()
    if has_fit:
        return settings
    lora = {
        part: {key: value for key, value in section.items() if key != "learning_rate"}
        for part, section in settings["lora"].items()
    }
    return {"lora": lora, "fit": {"method": recipe.fit.method}, "edit": settings["edit"]}


def _endings(names: Iterable[str]) -> list[str]:
    """Returns the last components of layers' paths: "to_q", or "to_out.0" with its number."""
    ends = {re.sub(r"^(.*\.)?([^.]+(\.\d+)?)$", r"\2", name) for name in names}
    return sorted(ends)


def _line(text: str) -> str:
    """Returns text as one printable line, cut to a length."""
    line = " ".join(text.split())
    return line[:_LONGEST] if is_line(line[:_LONGEST]) else ""


def _number(text: str | None) -> float | None:
    """Returns a number in a header; None if it isn't one."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < 2**63 else None


def _privacy(values: Mapping[str, Any], embedded: bool) -> str:
    """Returns a sentence on what a file reveals about its photo and the person who fitted it."""
    details = [f"the base's name {values['base']!r}"] if values["base"] != "unknown" else []
    details += [f"the day of the fit {values['date']}"] if values["date"] else []
    details += ["its settings, seed and seconds"] if values["seconds"] else []
    details += ["a digest of the photo's pixels"] if values["photo_digest"] else []
    details += ["the photo in the base's latents"] if embedded else []
    held = f"; it also holds {', '.join(details)} (see strip)" if details else ""
    return f"this file can redraw its photo{held}"


def _privacy_of_another_tool(content: Content) -> str:
    """Returns a sentence on what another tool's file reveals."""
    count = len(content.source.metadata)
    held = f"; its header has {count} entries, which strip removes" if count else ""
    return f"another tool made this file, of pictures that it doesn't name{held}"
