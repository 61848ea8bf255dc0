"""Runs methods over photos and seeds, and keeps each photo's pictures, to go on where a run stopped."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np

from lora_unitune import Editor
from lora_unitune.adapter_file import Adapter

from ..memory import Peak, of_adapter
from .measures import measure
from .methods import METHODS, Dials, Method
from .pairs import draw_pairs

DIALS = Path(__file__).with_name("dials.json")
"""The dials of each method as `tune` chose them on the tuning list."""


def split_name(name: str, base: str = "pocket") -> tuple[Method, Dials]:
    """A method and its dials: "lora" as tuned, "lora@40" with fits of 40 steps.

    Dials are tuned for pocket; on another base UniTune takes its recipe's own, and the others their defaults.

    Raises:
        click.BadParameter: there is no such method.
    """
    method, _, steps = name.partition("@")
    if method not in METHODS or (steps and not (steps.isdecimal() and method.startswith(("lora", "full")))):
        raise click.BadParameter(
            f"no method {name!r}; there are {', '.join(METHODS)}, and lora@40 for 40 steps"
        )
    grid = METHODS[method].grid
    dials = {
        dial: values[0] for dial, values in grid.items() if base == "pocket" or "adapter_scale" not in grid
    }
    if base == "pocket" and DIALS.exists():
        dials |= json.loads(DIALS.read_text()).get(method, {})
    return METHODS[method], dials | ({"fit.steps": int(steps)} if steps else {})


def photos(pairs: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    """The pairs of each photo."""
    for number, group in groupby(pairs, key=lambda pair: pair.photo):
        yield number, list(group)


def noise_seeds(number: int, seed: int, count: int) -> list[int]:
    """Seeds of a photo's pairs: the same for every method."""
    return [1_000_000 * (seed + 1) + 100 * number + i for i in range(count)]


def run_photo(
    editor: Editor, method: Method, number: int, pairs: list[Any], seed: int, dials: Dials
) -> tuple[np.ndarray, dict[str, Any]]:
    """Edits of one photo, (n, h, w, 3) uint8, and what they cost."""
    peak, started = Peak(), time.perf_counter()
    fitted = method.fit(editor, pairs[0].image, seed, dials)
    between = time.perf_counter()
    fit_peak = peak.bytes()
    pictures = method.edit(editor, fitted, pairs, noise_seeds(number, seed, len(pairs)), dials)
    row = {
        "fit_seconds": between - started,
        "edit_seconds": (time.perf_counter() - between) / len(pairs),
        "fit_peak_bytes": fit_peak,
        "peak_bytes": peak.bytes(),
    }
    return pictures, row | (of_adapter(fitted) if isinstance(fitted, Adapter) else {})


def run(
    folder: Path, names: Sequence[str], pairs: Sequence[Any], seeds: int, editor: Editor, label: str
) -> None:
    """Runs what isn't on disk yet. A photo's file holds its pictures and costs.

    Args:
        folder: for the pictures, a folder of each method in it.
        names: of methods.
        pairs: those of one photo beside each other.
        seeds: how many.
        editor: with the base.
        label: of the list that the pairs are from.

    Raises:
        click.UsageError: the folder holds a run with other pairs, dials or another base.
    """
    base = editor.base
    for name in names:
        dials = split_name(name, base.name)[1]
        keep_settings(folder / name, {"dials": dials, "base": base.fingerprint, "pairs": label})
    todo = [
        (seed, name, number, group)
        for seed in range(seeds)
        for number, group in photos(pairs)
        for name in names
    ]
    for seed, name, number, group in todo:
        file = folder / name / f"{seed}-{number:03}.npz"
        if file.exists() and len(np.load(file)["pictures"]) >= len(group):
            continue
        method, dials = split_name(name, base.name)
        pictures, row = run_photo(editor, method, number, group, seed, dials)
        partial = file.with_name("partial.npz")
        np.savez_compressed(partial, pictures=pictures, cost=json.dumps(row))
        partial.replace(file)
        click.echo(
            f"{name} seed {seed} photo {number}: {row['fit_seconds']:.1f} s + {row['edit_seconds']:.2f} s",
            err=True,
        )
    editor.release()


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes a method's settings beside its pictures, once.

    Raises:
        click.UsageError: the pictures there were made with others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n")
    elif json.loads(file.read_text()) != json.loads(json.dumps(settings)):
        raise click.UsageError(
            f"{folder} was made with other pairs, dials or another base; give another --out"
        )


def read(
    folder: Path, name: str, pairs: Sequence[Any], seeds: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Pictures of a method, (pairs, seeds, h, w, 3) uint8, and the costs of each photo and seed."""
    pictures, costs = [], []
    for seed in range(seeds):
        parts = []
        for number, group in photos(pairs):
            kept = np.load(folder / name / f"{seed}-{number:03}.npz")
            parts.append(kept["pictures"][: len(group)])
            costs.append(json.loads(str(kept["cost"])))
        pictures.append(np.concatenate(parts))
    return np.stack(pictures, axis=1), costs


def settings_to_try(method: Method, trials: int) -> list[Dials]:
    """The defaults, then settings drawn at random from the grid: the same number for every method."""
    rng, found = random.Random(0), [{dial: values[0] for dial, values in method.grid.items()}]
    for _ in range(100 * trials):
        dials = {dial: rng.choice(values) for dial, values in method.grid.items()}
        if len(found) < trials and dials not in found:
            found.append(dials)
    return found


def tune(name: str, pair_count: int, trials: int, base: str, device: str) -> list[dict[str, Any]]:
    """Tries settings on the tuning list, best first: most successes, then nearest to the true pictures."""
    editor, method = Editor(base, device), METHODS[name]
    rows, fits = [], dict[str, Any]()
    for dials in settings_to_try(method, trials):
        measured = []
        for number, group in photos(draw_pairs("tuning", pair_count)):
            key = json.dumps([number, {dial: value for dial, value in dials.items() if "." in dial}])
            if key not in fits:
                fits[key] = method.fit(editor, group[0].image, 0, dials)
            pictures = method.edit(editor, fits[key], group, noise_seeds(number, 0, len(group)), dials)
            measured += measure(group, pictures)
        means = {field: float(np.nanmean([row[field] for row in measured])) for field in measured[0]}
        rows.append({"dials": dials, **{field: round(value, 4) for field, value in means.items()}})
        click.echo(f"{name} {json.dumps(rows[-1])}", err=True)
    editor.release()
    return sorted(rows, key=lambda row: (-row["success"], -row["psnr_truth"]))
