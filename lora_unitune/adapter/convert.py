"""Adapter files in the layouts of other tools, and without what a reader needn't know."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.checks import check_is_safetensors, damaged
from lora_unitune.adapter.header import METADATA_KEY, PHOTO_KEY
from lora_unitune.adapter.layers import lora_config, patterns
from lora_unitune.errors import AdapterFileError, OutputError, SettingError
from lora_unitune.families import PARTS, one_line
from lora_unitune.recipe import FitSettings, PromptSettings

Layout = Literal["diffusers", "kohya", "peft"]

_REST = "lora_unitune.safetensors"  # in a PEFT folder: this package's header, and the photo
_WEIGHTS, _CONFIG, _PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
_LARGEST_CONFIG = 2**20  # bytes
_AGAIN = "give a folder that PEFT or lora-unitune wrote"


def open_adapter(path: str | Path, tokens: str = "") -> Adapter:
    """Reads an adapter in any layout: diffusers' or kohya's file, or a folder of PEFT's.

    Args:
        path: of the file or the folder.
        tokens: the words that call its subject; needed for a file of another tool, which doesn't say them.

    Raises:
        AdapterFileError: it can't be read, or isn't an adapter.
    """
    adapter = _read_peft(Path(path)) if Path(path).is_dir() else Adapter.load(path)
    return replace(adapter, rare_tokens=" ".join(tokens.split())) if tokens.strip() else adapter


def convert(path: str | Path, layout: Layout, output: str | Path, overwrite: bool = False) -> None:
    """Writes an adapter in another layout; its tensors keep their values and their number format.

    Args:
        path: of an adapter in any layout.
        layout: "diffusers", "kohya" (one file each), or "peft" (a folder with a subfolder for each part).
        output: of the file, or the folder.
        overwrite: whether what is there may be replaced.

    Raises:
        SettingError: there is no such layout, or the adapter's method is "full", which has only one.
        AdapterFileError: the adapter can't be read.
        OutputError: the result can't be written.
    """
    if layout not in get_args(Layout):
        raise SettingError(f"layout {layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
    adapter, dtype = open_adapter(path), _number_format(Path(path))
    if layout == "peft":
        _write_peft(adapter, Path(output), dtype, overwrite)
    else:
        adapter.save(output, overwrite, dtype, layout)


def strip(path: str | Path, output: str | Path, keep_photo: bool = False, overwrite: bool = False) -> None:
    """Writes an adapter without what an edit doesn't need: when, how long, from which seed and settings it
    was fitted, the folder's name of its base, and the photo. Its weights can redraw the photo all the same.

    Args:
        path: of an adapter in any layout.
        output: of the new file, in diffusers' layout.
        keep_photo: leave the photo's latents in it; without them, edits have to be given the photo.
        overwrite: whether a file that is there may be replaced.

    Raises:
        AdapterFileError: the adapter can't be read.
        OutputError: the result can't be written.
    """
    adapter = open_adapter(path)
    is_public = adapter.base == "pocket" or "/" in adapter.base
    recipe = replace(
        adapter.recipe, fit=FitSettings(method=adapter.recipe.fit.method), prompt=PromptSettings()
    )
    bare = replace(
        adapter,
        recipe=recipe,
        base=adapter.base if is_public else "unknown",
        photo_latents=adapter.photo_latents if keep_photo else None,
        seed=0,
        seconds=0.0,
        date="",
    )
    bare.save(output, overwrite, _number_format(Path(path)))


def _number_format(path: Path) -> torch.dtype:
    """Returns the number format of an adapter's tensors; the widest, where they differ, and 16 bits for 8."""
    files = sorted(path.glob(f"*/{_WEIGHTS}")) or [path / _WEIGHTS] if path.is_dir() else [path]
    formats = set[str]()
    for each in files:
        with safe_open(each, framework="pt", device="cpu") as file:
            formats |= {file.get_slice(k).get_dtype() for k in file.keys() if not k.endswith(".alpha")}  # noqa: SIM118
    only = {frozenset({"F16"}): torch.float16, frozenset({"BF16"}): torch.bfloat16}
    return only.get(frozenset(formats - {"I8"}), torch.float32)


def _write_peft(adapter: Adapter, folder: Path, dtype: torch.dtype, overwrite: bool) -> None:
    """Writes a folder that `PeftModel.from_pretrained` reads part by part: all of it, or nothing."""
    if adapter.recipe.fit.method != "lora":
        raise SettingError("an adapter of method 'full' has no PEFT layout; fit the photo with 'lora'")
    if folder.exists() and not (overwrite and (folder / "unet" / _CONFIG).is_file()):
        raise OutputError(f"{folder} is there already; choose another name or allow it with --overwrite")
    if not folder.parent.is_dir():
        raise OutputError(f"{folder} can't be written: there is no folder {folder.parent}; create it first")
    temporary = folder.with_name(f".{secrets.token_hex(8)}.part")
    try:
        for part in adapter.parts:
            tensors = {f"{_PREFIX}{key.removeprefix(f'{part}.')}": tensor.to(dtype).contiguous()
                       for key, tensor in adapter.tensors.items() if key.startswith(f"{part}.")}  # fmt: skip
            if tensors:
                (temporary / part).mkdir(parents=True)
                save_file(tensors, temporary / part / _WEIGHTS, {"format": "pt"})
                (temporary / part / _CONFIG).write_text(json.dumps(_peft_config(adapter, part), indent=1))
        if adapter.fingerprint:
            photo = {} if adapter.photo_latents is None else {PHOTO_KEY: adapter.photo_latents.to(dtype)}
            save_file(photo, temporary / _REST, {METADATA_KEY: adapter.header()})
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder} can't be written ({error}); choose another place or make room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _peft_config(adapter: Adapter, part: str) -> dict[str, Any]:
    config = lora_config(part, adapter.recipe.lora).to_dict()
    config |= patterns(adapter.tensors, adapter.recipe.lora, part)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _read_peft(folder: Path) -> Adapter:
    """Reads a folder of PEFT's, by way of the one file that the same tensors make."""
    parts = {part: folder / part for part in PARTS["sdxl"] if (folder / part / _CONFIG).is_file()}
    if not parts and (folder / _CONFIG).is_file():
        parts = {"unet": folder}
    if not parts:
        raise AdapterFileError(f"{folder} has no {_CONFIG} in it, nor in a folder unet of it; {_AGAIN}")
    tensors, told = dict[str, Tensor](), dict[str, Any]()
    for part, place in parts.items():
        for key, tensor in _tensors_of(place / _WEIGHTS).items():
            tensors[f"{part}.{key.removeprefix(_PREFIX)}"] = tensor
        told |= {f"{part}.{key}": value for key, value in _config_of(place / _CONFIG).items()}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    if (folder / _REST).is_file():
        tensors |= _tensors_of(folder / _REST)
        with safe_open(folder / _REST, framework="pt", device="cpu") as file:
            metadata |= file.metadata() or {}
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "adapter.safetensors"
        save_file(tensors, whole, metadata)
        try:
            return Adapter.load(whole)
        except AdapterFileError as error:
            raise AdapterFileError(str(error).replace(str(whole), str(folder))) from error


def _tensors_of(path: Path) -> dict[str, Tensor]:
    check_is_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def _config_of(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError("larger than a megabyte")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} can't be read ({one_line(error)}); {_AGAIN}") from error
    return config
