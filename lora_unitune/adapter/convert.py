"""Adapter files in the layouts of other tools, and without what a reader needn't know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from lora_unitune.adapter.adapter import read
from lora_unitune.adapter.header import open_source
from lora_unitune.adapter.peft import write_folder
from lora_unitune.adapter.source import Source
from lora_unitune.errors import SettingError
from lora_unitune.settings import FitSettings, PromptSettings

Layout = Literal["diffusers", "kohya", "peft"]


def convert(place: str | Path, layout: Layout, output: str | Path, overwrite: bool = False) -> None:
    """Writes an adapter in another layout; its tensors keep their values and their number format.

    Args:
        place: Path of an adapter in any layout, or its address on the hub.
        layout: "diffusers", "kohya" (one file each), or "peft" (a folder with a subfolder for each part).
        output: Path of the file, or of the folder.
        overwrite: Whether what is there may be replaced.

    Raises:
        SettingError: There is no such layout, or the adapter's method is "full", which has only one.
        AdapterFileError: The adapter can't be read.
        HubError: The hub can't be reached, or has no such file.
        OutputError: The result can't be written.
    """
    if layout not in get_args(Layout):
        raise SettingError(f"layout = {layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
    source = open_source(place)
    adapter, dtype = read(source), _number_format(source)
    if layout == "peft":
        write_folder(adapter, Path(output), dtype, overwrite)
    else:
        adapter.save(output, overwrite, dtype, layout)


def strip(place: str | Path, output: str | Path, keep_photo: bool = False, overwrite: bool = False) -> None:
    """Writes an adapter without what an edit doesn't need: when, how long, from which seed and settings it
    was fitted, the folder's name of its base, the photo and its digest. Its weights can redraw the photo all
    the same.

    Args:
        place: Path of an adapter in any layout, or its address on the hub.
        output: Path of the new file, in diffusers' layout.
        keep_photo: Whether the photo's latents stay in it; without them, edits need the photo.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        AdapterFileError: The adapter can't be read.
        HubError: The hub can't be reached, or has no such file.
        OutputError: The result can't be written.
    """
    source = open_source(place)
    adapter = read(source)
    is_public = adapter.base == "pocket" or "/" in adapter.base
    lora = {part: replace(settings, learning_rate=0.0) for part, settings in adapter.recipe.lora.items()}
    recipe = replace(
        adapter.recipe, lora=lora, fit=FitSettings(method=adapter.recipe.fit.method), prompt=PromptSettings()
    )
    bare = replace(
        adapter,
        recipe=recipe,
        base=adapter.base if is_public else "unknown",
        photo_latents=adapter.photo_latents if keep_photo else None,
        photo_digest="",
        seed=0,
        seconds=0.0,
        date="",
        history=(),
    )
    bare.save(output, overwrite, _number_format(source))


def _number_format(source: Source) -> torch.dtype:
    """Returns the number format of an adapter's tensors; the widest, where they differ, and 16 bits for 8."""
    formats = {entry.format for key, entry in source.entries.items() if not key.endswith(".alpha")}
    only = {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}
    return only.get(frozenset(formats - {"I8"}), torch.float32)
