"""Memory and file size of a fit."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_unitune import Adapter


class Peak:
    """Peak memory in bytes since construction: resident on the CPU (Linux), allocated on a GPU."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        for line in status.read_text().splitlines() if status.exists() else []:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        return None


def of_adapter(adapter: Adapter) -> dict[str, Any]:
    """Trained parameters, bytes of AdamW's state for them, bytes of the file, and seconds to load it.

    The file is measured without the duration of its fit, whose number of digits would vary its size.
    """
    trained = sum(tensor.numel() for tensor in adapter.tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        replace(adapter, seconds=0.0).save(file)
        started = time.perf_counter()
        Adapter.load(file)
        seconds, size = time.perf_counter() - started, file.stat().st_size
    return {
        "trained_parameters": trained,
        "optimizer_bytes": 8 * trained,
        "file_bytes": size,
        "load_seconds": seconds,
    }
