"""Cost of one step of each method: seconds, utilization of the device, and memory of each phase."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from lora_unitune import Adapter, Editor, Recipe, fit
from lora_unitune.families import Base
from lora_unitune.training.fit import _trainable

from ..memory import Peak, of_adapter
from .bases import make_base
from .floor import matrix_rate, operations, wait
from .rival import train_rival

METHODS = ("lora", "full", "rival-lora", "rival-full")


def noise_photo() -> Image.Image:
    """A photo of random pixels, since the content doesn't matter for random weights."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))


def recipe_for(base: Base, overrides: list[str]) -> Recipe:
    """Pocket's recipe; for random bases the defaults of all settings, without gradient checkpointing."""
    recipe = Recipe.load("pocket/default") if base.name == "pocket" else Recipe()
    return base.family.complete(recipe, overrides)


def measure(base_name: str, method: str, size: str, steps: int, batch: int, device: str) -> dict[str, Any]:
    """Fits once, and edits with the adapter; seconds and bytes of each phase."""
    peak, started = Peak(), time.perf_counter()
    dtype = torch.float32 if method.endswith("full") else None
    base = make_base(base_name, device, dtype)
    wait(base.device)
    row: dict[str, Any] = {"method": method, "load_base_seconds": time.perf_counter() - started}
    row["load_base_peak_bytes"] = peak.bytes()
    kind = method.removeprefix("rival-")
    recipe = recipe_for(base, [f"fit.method={kind}", f"fit.steps={steps}", f"fit.batch_size={batch}",
                               f"photo.size={size}", "edit.steps=4"])  # fmt: skip
    photo, moments = noise_photo(), [time.perf_counter()]

    def on_step(*_: Any) -> None:
        wait(base.device)
        moments.append(time.perf_counter())

    peak = Peak()
    adapter: Adapter | None = None
    if method == kind:
        adapter = fit(photo, base=base, recipe=recipe, on_step=on_step)
    else:
        with _trainable(base, recipe, torch.Generator().manual_seed(0)):
            train_rival(photo, base, recipe, on_step)
    row |= {"fit_seconds": time.perf_counter() - moments[0], "fit_peak_bytes": peak.bytes()}
    row["step_seconds"] = np.diff(moments)[1:].tolist()  # the first one includes the preparation
    if adapter is None:
        return row
    row |= of_adapter(adapter)
    peak, editor = Peak(), Editor(base)
    settings = replace(recipe.edit, strength=1.0)
    for _ in range(2):  # the second one is warm
        started = time.perf_counter()
        editor.pixels(adapter, [f"{adapter.rare_tokens} a dog at night"], "", None, [0], settings)
        wait(base.device)
        row["edit_step_seconds"] = (time.perf_counter() - started) / settings.steps
    row["edit_peak_bytes"] = peak.bytes()
    editor.release()
    del adapter, editor  # of full fine-tuning, as large as the model
    one = recipe.override(["fit.steps=1"])
    counted = operations(lambda: fit(photo, base=base, recipe=one))
    rate = matrix_rate(base.device, torch.bfloat16 if base.device.type == "cuda" else torch.float32)
    row |= {"step_operations": counted, "matrix_rate": rate}
    row["share_of_floor"] = counted / rate / float(np.median(row["step_seconds"]))
    return row


def compare(arguments: list[str], methods: list[str], rounds: int) -> dict[str, Any]:
    """Runs each method in its own process, so that their memory is independent, and alternates between them."""
    rows = []
    for _ in range(rounds):
        for name in methods:
            command = [sys.executable, "-m", "benchmarks.cost", "steps", *arguments, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise click.ClickException(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            click.echo(f"{name}: {np.median(rows[-1]['step_seconds']):.3f} s a step", err=True)
    return summarise(rows, methods)


def summarise(rows: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Median, minimum and maximum of every number by method, and the ratio of each median to that of lora."""
    summary: dict[str, Any] = {}
    for method in methods:
        of = [row for row in rows if row["method"] == method]
        for name in (key for key in of[0] if key != "method" and of[0][key] is not None):
            values = [v for row in of for v in (row[name] if isinstance(row[name], list) else [row[name]])]
            summary.setdefault(name, {})[method] = {
                "median": float(np.median(values)), "least": min(values), "most": max(values)
            }  # fmt: skip
    for values in summary.values():
        for method in [name for name in values if name != "lora" and "lora" in values]:
            values[method]["times_lora"] = values[method]["median"] / values["lora"]["median"]
    return summary
