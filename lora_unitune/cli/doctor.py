"""What this machine has, and which recipe suits it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from lora_unitune import __version__
from lora_unitune.families import resolve_device

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")
_CARDS = ((11, "sd15/12gb"), (7, "sd15/8gb"), (5, "sd15/6gb"))
"""GiB that have to be free, and the recipe for it: a card of 12 GB has 11.x to give."""


def examine(device: str = "auto") -> dict[str, Any]:
    """Returns what a fit on this machine can count on, as values that JSON can hold.

    Args:
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        DeviceError: it isn't there.
    """
    target = resolve_device(device)
    free, total = _memory(target)
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else platform.processor()
    bf16 = torch.cuda.is_bf16_supported() if target.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    recipe, notes = _recipe(target, free)
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
        "recipes": {"pocket": "pocket/default", "stable_diffusion_1": recipe},
        "notes": notes,
    }


def _memory(device: torch.device) -> tuple[int | None, int | None]:
    """Returns the free and all bytes of a GPU's memory, or of the system's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    known = Path("/proc/meminfo")
    if known.exists():
        rows = dict(line.split(":", 1) for line in known.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024, int(rows["MemTotal"].split()[0]) * 1024
    names = getattr(os, "sysconf_names", {})
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    return None, total


def _recipe(device: torch.device, free: int | None) -> tuple[str | None, list[str]]:
    """Returns the recipe for Stable Diffusion 1.x, and what to know about it."""
    if device.type != "cuda" or free is None:
        return "sd15/8gb", [
            "without a CUDA GPU, a fit of Stable Diffusion takes minutes to hours; pocket, seconds"
        ]
    for least, recipe in _CARDS:
        if free >= least * 2**30:
            return recipe, []
    return None, [
        f"{free / 2**30:.1f} GiB are free on the GPU, and the smallest recipe needs 5; use --device cpu"
    ]


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
