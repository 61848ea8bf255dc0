"""PEFT folders: a subfolder with weights and configuration for each part of the base."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lora_unitune.adapter import dora
from lora_unitune.adapter.source import Entry, Source, read_file
from lora_unitune.errors import AdapterFileError, OutputError, SettingError, one_line
from lora_unitune.families import FAMILIES

if TYPE_CHECKING:
    import torch

    from lora_unitune.adapter.adapter import Adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
REST = "lora_unitune.safetensors"
"""File name of this package's header and the photo."""

_PREFIX = "base_model.model."
_LARGEST_CONFIG = 2**20  # bytes
_AGAIN = "give a folder that PEFT or lora-unitune wrote"


def read_folder(folder: Path) -> Source:
    """Reads the headers of a folder's files; its configurations become diffusers' header entry.

    Args:
        folder: Folder with a subfolder for each part, or with the files of the denoiser alone.

    Raises:
        AdapterFileError: A file is missing, or can't be read.
    """
    known = list(dict.fromkeys(part for family in FAMILIES.values() for part in family.parts))
    parts = {part: folder / part for part in known if (folder / part / CONFIG).is_file()}
    denoiser = next(iter(FAMILIES.values())).denoiser
    if not parts and (folder / CONFIG).is_file():
        parts = {"": folder}
    if not parts:
        raise AdapterFileError(f"{folder} has no {CONFIG} in it, nor in a folder {denoiser} of it; {_AGAIN}")
    entries: dict[str, Entry] = {}
    config: dict[str, Any] = {}
    size = 0
    for part, place in parts.items():
        weights = read_file(place / WEIGHTS, str(place / WEIGHTS))
        start = f"{part}." if part else ""  # without a part, the layers' names say which it is
        entries |= {f"{start}{key.removeprefix(_PREFIX)}": entry for key, entry in weights.entries.items()}
        of_part = _config_of(place / CONFIG)
        if of_part.get("peft_type") == "LOHA":
            of_part["lora_alpha"] = of_part.get("alpha")
        config |= {
            f"{each}.{key}": value for each in ([part] if part else known) for key, value in of_part.items()
        }
        size += weights.bytes + (place / CONFIG).stat().st_size
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    if (folder / REST).is_file():
        rest = read_file(folder / REST, str(folder / REST))
        entries |= rest.entries
        metadata |= rest.metadata
        size += rest.bytes
    return Source(str(folder), entries, metadata, size)


def _config_of(path: Path) -> dict[str, Any]:
    """Returns a part's configuration, unchecked."""
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError("larger than a megabyte")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} can't be read ({one_line(error)}); {_AGAIN}") from error
    return config


def write_folder(adapter: Adapter, folder: Path, dtype: torch.dtype, overwrite: bool) -> None:
    """Atomically writes a folder whose subfolders `PeftModel.from_pretrained` reads.

    Args:
        adapter: An adapter of method "lora".
        folder: Path of the folder.
        dtype: Dtype of the tensors in its files.
        overwrite: Whether an existing PEFT folder may be replaced.

    Raises:
        SettingError: The adapter's method is "full".
        OutputError: The folder already exists, or can't be written.
    """
    if adapter.recipe.fit.method != "lora":
        raise SettingError("an adapter of method 'full' has no PEFT layout; fit the photo with 'lora'")
    if folder.exists() and not (overwrite and (folder / adapter.kind.denoiser / CONFIG).is_file()):
        raise OutputError(f"{folder} already exists; choose another name or pass overwrite=True")
    if not folder.parent.is_dir():
        raise OutputError(f"{folder} can't be written: folder {folder.parent} doesn't exist; create it first")
    temporary = folder.with_name(f".{secrets.token_hex(8)}.part")
    try:
        _write_files(adapter, temporary, dtype)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder} can't be written ({error}); choose another path or free disk space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    """Writes a new folder's files."""
    from safetensors.torch import save_file

    from lora_unitune.adapter.header import METADATA_KEY, PHOTO_KEY

    for part in adapter.parts:
        tensors = {
            f"{_PREFIX}{key.removeprefix(f'{part}.')}": tensor.to(dtype).contiguous()
            for key, tensor in adapter.tensors.items()
            if key.startswith(f"{part}.")
        }
        magnitudes = dora.for_peft(adapter.tensors, adapter.magnitudes, part)
        tensors |= {
            f"{_PREFIX}{key.removeprefix(f'{part}.')}": tensor.to(dtype).contiguous()
            for key, tensor in magnitudes.items()
        }
        if tensors:
            (folder / part).mkdir(parents=True)
            save_file(tensors, folder / part / WEIGHTS, {"format": "pt"})
            (folder / part / CONFIG).write_text(json.dumps(_peft_config(adapter, part), indent=1))
    if adapter.fingerprint:
        photo = {} if adapter.photo_latents is None else {PHOTO_KEY: adapter.photo_latents.to(dtype)}
        save_file(photo, folder / REST, {METADATA_KEY: adapter.header()})
    elif adapter.entries:
        save_file({}, folder / REST, dict(adapter.entries))


def _peft_config(adapter: Adapter, part: str) -> dict[str, Any]:
    """Returns a part's configuration as JSON-serializable values."""
    from lora_unitune.adapter.layers import lora_config, patterns

    settings = adapter.recipe.lora[part]
    config = lora_config(settings).to_dict() | patterns(adapter.tensors, settings, part)
    config["use_dora"] = dora.has_magnitudes(adapter.magnitudes, part)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
