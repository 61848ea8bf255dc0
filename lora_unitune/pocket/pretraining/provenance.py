"""Writes PROVENANCE.md next to pocket's weights: how they were trained, from the logs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .collect import listed

LOGS = ("vae.jsonl", "unet.jsonl")
FINDINGS = "## Findings\n"
LICENSES = """## Licenses

- The weights: Apache License 2.0, as the project.
- The objects of the scenes: Noto Color Emoji, SIL Open Font License 1.1 (`sprites.LICENSE.txt`).
- Photos in the VAE's training, from scikit-image's wheel: astronaut and rocket (public domain), coffee (CC0).
  The photo of the demo, Chelsea (CC0), is not among them.
"""
PHOTOGRAPHS = """## Photographs

Trained on crops of these, in changed light and looks and with objects of the scenes added, and tested on those held
out. None of them is part of this project. `pocket/pretraining/collect.py` collects them from the named packages.

| name | author | license | use | package |
| --- | --- | --- | --- | --- |
"""


def commit() -> str:
    """The commit of this checkout, with -dirty where tracked files were changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def copy_logs(source: Path, target: Path) -> None:
    """Copies the logs of a training along with its weights."""
    for name in LOGS:
        shutil.copy(source / name, target / name)


def _stage_lines(folder: Path, name: str) -> list[str]:
    """A table of one stage: its first, some middle, and its last row of the log."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    chosen = sorted({round(i * (len(rows) - 1) / 9) for i in range(10)})
    table = [[str(rows[i].get(key, "")) for key in keys] for i in chosen]
    return ["| " + " | ".join(cells) + " |" for cells in [keys, ["---"] * len(keys), *table]]


def _photograph_lines(folder: Path) -> list[str]:
    """The table of photographs, if the logs say that there were any."""
    if "photo_right" not in (folder / "unet.jsonl").read_text():
        return []
    rows = [f"| {' | '.join(photograph[:5])} |" for photograph in listed()]
    return [PHOTOGRAPHS + "\n".join(rows), ""]


def plot_curves(folder: Path) -> None:
    """Draws `training.png` next to the logs: loss, errors and the accuracy by the examiner against images seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "unet.jsonl").read_text().splitlines()]
    groups = {
        "training loss": ("loss",),
        "error of the clean latent, given a caption": ("right", "none", "wrong"),
        "share that the examiner reads right": ("object", "place", "time", "look", "colour"),
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axis, (title, keys) in zip(axes, groups.items(), strict=True):
        axis.set(title=title, xlabel="pictures seen, thousands")
        axis.grid(alpha=0.3)
        for key in keys:
            chosen = [(row["pictures"] / 1000, row[key]) for row in rows if key in row]
            if chosen:
                axis.plot(*zip(*chosen, strict=True), marker="o", markersize=3, label=key)
                axis.legend()
    figure.savefig(folder / "training.png", dpi=60)
    pyplot.close(figure)


def write_provenance(folder: Path, scenes: int, made_at: str) -> None:
    """Writes the file; the section "Findings" of an existing one is kept.

    Args:
        folder: Folder of the weights, with the logs of their training.
        scenes: Number of training scenes.
        made_at: Commit of the export, read before the weights in the checkout changed.
    """
    file = folder / "PROVENANCE.md"
    plot_curves(folder)
    findings = file.read_text().partition(FINDINGS)[2] if file.exists() else ""
    versions = ", ".join(
        f"{library.__name__} {library.__version__}" for library in (torch, diffusers, transformers)
    )
    lines = [
        "# Where these weights come from",
        "",
        "Trained from scratch, by this project, on scenes that it renders itself:",
        "",
        "    python -m lora_unitune.pocket.pretraining.pretrain all WORK",
        "    python -m lora_unitune.pocket.pretraining.pretrain export WORK lora_unitune/pocket/weights",
        "",
        "and to train them further, with --photos on photographs too (the text encoder then stays as it is):",
        "",
        "    python -m lora_unitune.pocket.pretraining.pretrain all WORK --start FOLDER \\",
        "        --vae-minutes V --unet-minutes U [--photos PHOTOGRAPHS]",
        "",
        f"- exported at commit {made_at}",
        f"- {versions}; {platform.machine()}, {os.cpu_count()} cores, "
        f"{'CUDA' if torch.cuda.is_available() else 'no GPU'}",
        f"- {scenes} training scenes (seeds 0 to {scenes - 1}), 256 held-out ones for the scores below",
        "",
        "## VAE",
        "",
        "From `vae.jsonl`, with the mean PSNR in dB of the round trip of held-out scenes (psnr), and photographs",
        "(photo_psnr):",
        "",
        *_stage_lines(folder, "vae"),
        "",
        "## Text encoder and UNet",
        "",
        "From `unet.jsonl`, with the error of the predicted clean latent on held-out scenes, and photographs",
        "(photo_), given the right caption, none, or a wrong one:",
        "",
        *_stage_lines(folder, "unet"),
        "",
        "![Training curves](training.png)",
        "",
        LICENSES,
        *_photograph_lines(folder),
        FINDINGS.rstrip("\n"),
    ]
    file.write_text("\n".join(lines) + "\n" + (findings or "\nNone yet.\n"))
