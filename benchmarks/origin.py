"""Provenance of a result: commit, versions, device."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch

from lora_unitune import __version__


def origin(device: torch.device) -> dict[str, Any]:
    """Commit, versions and device of a result, as JSON-serializable values."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    versions = {"lora_unitune": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": commit.stdout.strip() or "unknown",
        "versions": {**versions, "peft": peft.__version__, "python": platform.python_version()},
        "device": f"{device}, {torch.get_num_threads()} threads, {name}",
    }
