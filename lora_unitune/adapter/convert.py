"""Conversion of adapter files to the layouts of other tools, and removal of private metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from lora_unitune.adapter.adapter import read
from lora_unitune.adapter.header import open_source
from lora_unitune.adapter.peft import write_folder
from lora_unitune.adapter.source import Source
from lora_unitune.errors import SettingError
from lora_unitune.output import check_output, write_atomically
from lora_unitune.settings import FitSettings, PromptSettings

Layout = Literal["diffusers", "kohya", "peft"]


def convert(
    place: str | Path, layout: Layout, output: str | Path, overwrite: bool = False, sidecar: bool = False
) -> None:
    """Writes an adapter in another layout; its tensors keep their values and their dtype.

    Author, license, tags, trigger words and the like in a file of another tool are kept.

    Args:
        place: Path of an adapter in any layout, or its address on the hub.
        layout: "diffusers", "kohya" (one file each), or "peft" (a folder with a subfolder for each part).
        output: Path of the file, whose name ends in .safetensors, or of the folder.
        overwrite: Whether an existing file or folder may be replaced.
        sidecar: Whether to write a JSON file beside a file in kohya's layout, with the trigger words for A1111,
            Forge and InvokeAI.

    Raises:
        SettingError: The layout is unknown, or the adapter's method is "full", which only diffusers' supports.
        AdapterFileError: The adapter can't be read.
        HubError: The hub can't be reached, or has no such file.
        OutputError: The result can't be written.
    """
    if layout not in get_args(Layout):
        raise SettingError(f"layout = {layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
    beside = Path(output).with_suffix(".json")
    if sidecar and layout != "kohya":
        raise SettingError("a sidecar is for the layout 'kohya'; leave it out")
    if sidecar:
        check_output(beside, overwrite)
    source = open_source(place)
    adapter, dtype = read(source), _stored_dtype(source)
    if layout == "peft":
        write_folder(adapter, Path(output), dtype, overwrite)
    else:
        adapter.save(output, overwrite, dtype, layout)
    if sidecar:
        content = json.dumps(adapter.sidecar(), indent=1).encode()
        write_atomically(beside, lambda temporary: temporary.write_bytes(content), overwrite)


def strip(place: str | Path, output: str | Path, keep_photo: bool = False, overwrite: bool = False) -> None:
    """Writes an adapter without the metadata that an edit doesn't need.

    Removed are the date, duration, seed and settings of the fit, the name of the base's folder, the photo and
    its digest. The weights can still reproduce the photo.

    Args:
        place: Path of an adapter in any layout, or its address on the hub.
        output: Path of the new file, in diffusers' layout; its name ends in .safetensors.
        keep_photo: Whether to keep the photo's latents; without them, edits need the photo.
        overwrite: Whether an existing file may be replaced.

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
        photo_size=adapter.photo_size if recipe.photo.box else (),
        entries={},
        seed=0,
        seconds=0.0,
        date="",
        history=(),
    )
    bare.save(output, overwrite, _stored_dtype(source))


def _stored_dtype(source: Source) -> torch.dtype:
    """Returns the dtype of an adapter's tensors: float32 if they differ, and float16 for int8."""
    formats = {entry.format for key, entry in source.entries.items() if not key.endswith(".alpha")}
    formats = {"F16" if name.startswith("F8") else name for name in formats}  # float16 holds all of float8
    only = {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}
    return only.get(frozenset(formats - {"I8"}), torch.float32)
