"""Hardware and libraries of this machine, and the recipes that fit it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from lora_unitune import Recipe, __version__
from lora_unitune.families import FAMILIES
from lora_unitune.families.loading import resolve_device
from lora_unitune.recipe import available_recipes

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")
_CARD = re.compile(r"(\d+)gb")
_OWN_USE = 1
"""GB of a GPU's memory that its driver and a display may take: a GPU of 12 GB has 11.x available."""


def examine(device: str = "auto") -> dict[str, Any]:
    """Returns the resources of this machine for a fit, as JSON-serializable values.

    Args:
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        DeviceError: The device isn't available.
    """
    target = resolve_device(device)
    free, total = _memory(target)
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else platform.processor()
    bf16 = torch.cuda.is_bf16_supported() if target.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    recipes = recipes_for(free if target.type == "cuda" else None)
    notes = _notes(target, free, recipes)
    if target.type == "cuda" and free is not None and total is not None and free < total // 2:
        notes.append(
            "over half of the GPU's memory is in use; what no longer fits may spill into system memory, "
            "many times slower: close other programs"
        )
    return {
        "lora_unitune": __version__,
        "python": platform.python_version(),
        "versions": {library: _version(library) for library in _LIBRARIES},
        "device": target.type,
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "free_bytes": free,
        "total_bytes": total,
        "bf16": bool(bf16),
        "fp16": target.type == "cuda",
        "optimizers_8bit": _imports("bitsandbytes"),
        "recipes": recipes,
        "notes": notes,
    }


def _memory(device: torch.device) -> tuple[int | None, int | None]:
    """Returns the free and total bytes of a GPU's memory, or of the system's; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024, int(rows["MemTotal"].split()[0]) * 1024
    names = getattr(os, "sysconf_names", {})
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    return None, total


def recipes_for(free: int | None) -> dict[str, str | None]:
    """Returns the largest recipe that fits for each kind of base; None if every one needs more memory.

    A recipe named KIND/12gb is for a GPU of 12 GB.

    Args:
        free: Free bytes of a GPU's memory; None takes each kind's default, for a machine without a GPU.
    """
    defaults = {row.recipe for row in FAMILIES.values()}
    chosen: dict[str, tuple[int, str | None]] = {}
    for name in available_recipes():
        kind, _, intent = name.partition("/")
        card = _CARD.fullmatch(intent)
        needed = max(0, int(card[1]) - _OWN_USE) * 2**30 if card else 0
        before = chosen.setdefault(kind, (-1, None))
        fits = not card or name in defaults if free is None else needed <= free
        if fits and needed > before[0]:
            chosen[kind] = (needed, name)
    return {kind: name for kind, (_, name) in chosen.items()}


def _notes(device: torch.device, free: int | None, recipes: dict[str, str | None]) -> list[str]:
    """Returns notes on the recipes and the memory, one sentence each."""
    if device.type != "cuda":
        return ["without a CUDA GPU, only a fit of pocket takes seconds; of larger bases, minutes to hours"]
    notes = []
    missing = [kind for kind, name in recipes.items() if name is None]
    if missing and free is not None:
        notes.append(
            f"{free / 2**30:.1f} GiB are free on the GPU, too little for any recipe of {', '.join(missing)}; "
            "use --device cpu"
        )
    rounded = [name for name in recipes.values() if name and Recipe.load(name).fit.quantize != "none"]
    if rounded and not _imports("bitsandbytes"):
        notes.append(f"{', '.join(rounded)} needs bitsandbytes; install lora-unitune[8bit]")
    return notes


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _imports(library: str) -> bool:
    try:
        importlib.import_module(library)
    except (ImportError, OSError, RuntimeError):
        return False
    return True
