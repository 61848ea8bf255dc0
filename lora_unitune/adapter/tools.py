"""Which tools read all of a file: their rules for the names of tensors and for alphas."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_unitune.adapter.dora import KOHYA
from lora_unitune.adapter.header import PHOTO_KEY
from lora_unitune.adapter.int8 import INT8_SUFFIX
from lora_unitune.adapter.source import Source
from lora_unitune.errors import AdapterFileError, SettingError
from lora_unitune.families.tools import KNOWN_KEYS

TOOLS = {"diffusers": "diffusers", "comfyui": "ComfyUI", "a1111": "A1111 and Forge"}
"""Names of the tools, and how they are written."""


def problems(tool: str, source: Source) -> str:
    """Returns why a tool doesn't read all of a file as it was meant; "" if it does.

    Args:
        tool: A key of `TOOLS`.
        source: The file.
    """
    if any(key.endswith(INT8_SUFFIX) for key in source.entries):
        return "its tensors are stored in 8 bits"
    keys = [entry.key for entry in source.entries.values() if entry.key != PHOTO_KEY]
    unknown = [key for key in keys if not KNOWN_KEYS[tool].fullmatch(key)]
    if unknown:
        return f"{len(unknown)} of its {len(keys)} tensors have names that it doesn't know"
    of_outputs = [key for key, shape in source.shapes.items() if key.endswith(f".{KOHYA}") and shape[0] > 1]
    if of_outputs:  # ComfyUI divides by the norms of the base's own weights, A1111 by those of inputs
        return "it applies the magnitudes of a DoRA's outputs in another way"
    stores_alphas = any(key.endswith(".alpha") for key in keys)
    if tool != "diffusers" and not stores_alphas and not _alphas_are_ranks(source):
        return "it doesn't read the header's alphas, which differ from the ranks"
    return ""


def readers_of(source: Source) -> list[str]:
    """Returns the tools that read all of a file: keys of `TOOLS`, and "peft" for a folder in its layout."""
    tools = [tool for tool in TOOLS if not problems(tool, source)]
    return [*tools, "peft"] if Path(source.name).is_dir() else tools


def readers(summary: Mapping[str, Any]) -> str:
    """Returns which tools read a file, and what the others need, as one line.

    Args:
        summary: The file's description, from `describe`.
    """
    read_by: list[str] = summary["read_by"]
    known = ", ".join({**TOOLS, "peft": "PEFT"}[tool] for tool in read_by) or "lora-unitune only"
    others = [tool for tool in TOOLS if tool not in read_by]
    if not others or summary["method"] != "lora":
        return known
    layout = "kohya" if others != ["diffusers"] else "diffusers"
    return f"{known}; for {', '.join(TOOLS[tool] for tool in others)}: convert --to {layout}"


def check_tool(tool: str, source: Source) -> None:
    """Checks that a tool reads all of a file as it was meant.

    Args:
        tool: A key of `TOOLS`.
        source: The file.

    Raises:
        SettingError: The tool is unknown.
        AdapterFileError: It doesn't.
    """
    if tool not in TOOLS:
        raise SettingError(f"tool = {tool!r} is unknown; choose one of {', '.join(TOOLS)}")
    if why := problems(tool, source):
        layout = "diffusers" if tool == "diffusers" else "kohya"
        raise AdapterFileError(
            f"{TOOLS[tool]} doesn't read all of {source.name}: {why}; convert it to {layout}'s layout"
        )


def _alphas_are_ranks(source: Source) -> bool:
    """Returns whether every alpha in diffusers' header entry is its layer's rank."""
    try:
        config = json.loads(source.metadata.get("lora_adapter_metadata", "{}"))
        numbers = [
            (config[key], config[f"{key.removesuffix('.r')}.lora_alpha"])
            for key in config
            if key.endswith(".r")
        ]
        return all(math.isclose(rank, alpha) for rank, alpha in numbers)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False
