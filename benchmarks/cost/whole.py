"""End-to-end cost of fits and commands: time to equal reconstruction, time to the first edit, and growth of cost."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from lora_unitune import Adapter, Editor, Recipe, fit
from lora_unitune.adapter import layers
from lora_unitune.editing.score import psnr
from lora_unitune.editing.start import Start
from lora_unitune.families import Base, load_base
from lora_unitune.pocket import world
from lora_unitune.training.fit import _trainable

from ..memory import Peak
from .rival import RATES, train_rival
from .steps import noise_photo

CHECKED = (120, 240, 480, 960, 1920, 3840)
"""Steps of the rival at which its reconstruction is evaluated; the evaluation isn't timed."""


def reconstruction(base: Base, adapter: Adapter) -> float:
    """PSNR between the photo sampled from noise and rare tokens and its VAE reconstruction; mean of 2 seeds."""
    editor = Editor(base)
    target = editor.photo_round_trip(adapter)
    values = [psnr(target, editor.reconstruct(adapter, seed=seed).image) for seed in range(2)]
    editor.release()
    return float(np.mean(values))


def reach(scene: int, most: int, device: str) -> dict[str, Any]:
    """Seconds of this project's fit of a held-out scene, and of the rival's until it has the same reconstruction."""
    base, recipe = load_base("pocket", device), Recipe.load("pocket/default")
    photo = world.render(world.draw_scene(scene, "held-out"))
    started = time.perf_counter()
    ours = fit(photo, base=base, recipe=recipe)
    row: dict[str, Any] = {"scene": scene, "lora": {"seconds": time.perf_counter() - started}}
    row["lora"]["psnr"] = goal = reconstruction(base, ours)
    for name, rate in {
        "rival": RATES["lora"],
        "rival at our rate": recipe.lora["unet"].learning_rate,
    }.items():
        row[name] = _rival_until(goal, photo, base, recipe, ours, rate, most)
        row[name]["times_lora"] = row[name]["seconds"] / row["lora"]["seconds"]
    return row


def _rival_until(
    goal: float, photo: Any, base: Base, recipe: Recipe, ours: Adapter, rate: float, most: int
) -> dict[str, Any]:
    result: dict[str, Any] = {"rate": rate, "checked": []}
    recipe = recipe.override([f"fit.steps={most}"])
    spent, mark = 0.0, time.perf_counter()

    def on_step(step: int) -> bool:
        nonlocal spent, mark
        if step not in CHECKED and step != most:
            return False
        spent += time.perf_counter() - mark
        adapter = replace(ours, tensors=layers.collect(base))
        fresh = load_base("pocket", str(base.device))
        result["checked"].append({"steps": step, "seconds": spent, "psnr": reconstruction(fresh, adapter)})
        mark = time.perf_counter()
        return bool(result["checked"][-1]["psnr"] >= goal)

    with _trainable(base, recipe, torch.Generator().manual_seed(0)):
        train_rival(photo, base, recipe, on_step, rate)
    last = result["checked"][-1]
    return {**result, "seconds": last["seconds"], "reached": last["psnr"] >= goal}


FIRST_PICTURE = """
import time, sys
begun = float(sys.argv[1])
moments = {"interpreter": time.time()}
from lora_unitune import Adapter, Editor
moments["import"] = time.time()
editor = Editor("pocket", device=sys.argv[3])
moments["load the base"] = time.time()
adapter = Adapter.load(sys.argv[2])
editor._mount.use(adapter, 1.0)
moments["prepare the adapter"] = time.time()
edit = editor.edit(adapter, "a fox at night")
moments["sample"] = time.time()
edit.save(sys.argv[4])
moments["save"] = time.time()
for name, moment in moments.items():
    print(f"{name}\\t{moment - begun}")
    begun = moment
"""


COMMAND = "from lora_unitune.cli import main; main()"


def first_picture(rounds: int, device: str) -> dict[str, Any]:
    """Time from the start of a process to its first edit on disk, by phase; medians."""
    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder) / "photo.safetensors", Path(folder) / "out.png"
        fit(noise_photo(), overrides=("fit.steps=2",), device=device).save(file)
        rows: dict[str, list[float]] = {}
        for number in range(rounds):
            picture = Path(folder) / f"{number}.png"
            arguments = [str(time.time()), str(file), device, str(picture)]
            split = [sys.executable, "-c", FIRST_PICTURE, *arguments]
            done = subprocess.run(split, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                name, seconds = line.split("\t")
                rows.setdefault(name, []).append(float(seconds))
            whole = time.perf_counter()
            command = ["edit", str(file), "a fox at night", "-o", str(picture), "--overwrite"]
            subprocess.run([sys.executable, "-c", COMMAND, *command], capture_output=True, check=True)
            rows.setdefault("the command edit in all", []).append(time.perf_counter() - whole)
    return {
        name: {"median": float(np.median(v)), "least": min(v), "most": max(v)} for name, v in rows.items()
    }


def cold_commands(rounds: int, other: str, steps: int) -> dict[str, Any]:
    """Seconds of cold commands of this tree and of another, alternating; medians.

    Args:
        rounds: Number of timed runs of each command in each tree, after one warm-up run.
        other: Folder of the other tree, which contains its lora_unitune.
        steps: Steps of the fit.
    """
    here = str(Path(__file__).resolve().parents[2])
    rows: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        photo, file, picture = "photo.png", "photo.safetensors", "out.png"
        commands = {
            "fit": ["fit", photo, "-o", file, "--overwrite", f"--set=fit.steps={steps}"],
            "inspect": ["inspect", file],
            "edit": ["edit", file, "a fox at night", "-o", picture, "--overwrite"],
        }
        places = {tree: (place, Path(folder) / tree) for tree, place in (("other", other), ("this", here))}
        for _, own in places.values():
            own.mkdir()
            noise_photo().save(own / photo)
        for _, (name, command) in itertools.product(range(rounds + 1), commands.items()):
            for tree, (place, own) in places.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, "-c", COMMAND, *command], capture_output=True, check=True,
                               env={**os.environ, "PYTHONPATH": place}, cwd=own)  # fmt: skip
                seconds = time.perf_counter() - started
                rows.setdefault(name, {}).setdefault(tree, []).append(seconds)
    rows = {name: {tree: v[1:] for tree, v in row.items()} for name, row in rows.items()}  # without warm-up
    return {
        name: {
            **{t: {"median": float(np.median(v)), "least": min(v), "most": max(v)} for t, v in row.items()},
            "times_other": float(np.median(row["this"]) / np.median(row["other"])),
        }
        for name, row in rows.items()
    }


def growth(steps: int, device: str) -> list[dict[str, Any]]:
    """Seconds and peak memory of pocket's fits by size, batch and rank, and of edits by number of samples."""
    base, rows = load_base("pocket", device), list[dict[str, Any]]()
    settings = [f"photo.size={side}x{side}" for side in (32, 64, 96, 128)]
    settings += [f"fit.batch_size={batch}" for batch in (1, 2, 8, 16)]
    settings += [f"lora.unet.rank={rank}" for rank in (1, 4, 8, 16)]
    for setting in settings:
        moments, peak = list[float](), Peak()
        fit(noise_photo(), base=base, overrides=(setting, f"fit.steps={steps}"),
            on_step=lambda *_, moments=moments: moments.append(time.perf_counter()))  # fmt: skip
        seconds = float(np.median(np.diff(moments)))
        rows.append({"fit": setting, "step_seconds": seconds, "peak_bytes": peak.bytes()})
        click.echo(json_line(rows[-1]), err=True)
    adapter, editor = fit(noise_photo(), base=base, overrides=("fit.steps=2",)), Editor(base)
    for count in (1, 2, 4, 8, 16):
        peak = Peak()
        for _ in range(2):
            started = time.perf_counter()
            texts, start = (
                [f"{adapter.rare_tokens} a fox"] * count,
                Start(adapter.size, adapter.photo_latents),
            )
            editor.pixels(adapter, texts, "", start, list(range(count)), adapter.recipe.edit)
            seconds = time.perf_counter() - started
        rows.append({"edit": f"candidates={count}", "seconds": seconds, "peak_bytes": peak.bytes()})
        click.echo(json_line(rows[-1]), err=True)
    return rows


def json_line(row: dict[str, Any]) -> str:
    """A row as one readable line."""
    return ", ".join(f"{name} {value}" for name, value in row.items())
