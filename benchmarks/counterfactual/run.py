"""Runs methods over photos and seeds; resumes interrupted runs.

Each method writes its own JSON Lines file: first its settings, then one line for each photo and seed with the
metrics and costs of its pairs. The images of the first photos are saved too, as strips.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from lora_unitune import Editor
from lora_unitune.adapter.adapter import Adapter

from ..memory import Peak, of_adapter
from .imagic import Imagic
from .measures import measure
from .method import Dials, Method
from .methods import METHODS
from .pairs import EDITS_OF_PHOTO, draw_pairs

DIALS = Path(__file__).with_name("dials.json")
"""The hyperparameters of each method as chosen by `tune` on the tuning list."""
SHOWN_PHOTOS = 3  # number of photos whose images are saved: the first 16 pairs and two more
Judge = Callable[[Sequence[Any], np.ndarray], list[dict[str, float]]]
"""Function from pairs and their edited images, (n, h, w, 3) uint8, to the metrics of each."""


def split_name(name: str, base: str = "pocket") -> tuple[Method, Dials]:
    """A method and its hyperparameters: "lora" as tuned, "lora@40" with 40 steps of the fit.

    They are tuned for pocket; on another base UniTune takes those of its recipe, and the others their defaults.

    Raises:
        click.BadParameter: The method is unknown.
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
    """Yields the number and the pairs of each photo."""
    for number, group in groupby(pairs, key=lambda pair: pair.photo):
        yield number, list(group)


def noise_seeds(number: int, seed: int, count: int) -> list[int]:
    """Noise seeds of a photo's pairs, the same for every method."""
    return [1_000_000 * (seed + 1) + 100 * number + i for i in range(count)]


def run_photo(
    editor: Editor, method: Method, number: int, pairs: list[Any], seed: int, dials: Dials
) -> tuple[np.ndarray, dict[str, Any]]:
    """Edits of one photo, (n, h, w, 3) uint8, and their costs."""
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
    folder: Path,
    names: Sequence[str],
    pairs: Sequence[Any],
    seeds: int,
    editor: Editor,
    label: str,
    judge: Judge,
) -> None:
    """Runs what isn't in the folder yet.

    Args:
        folder: Folder of the results.
        names: Names of the methods.
        pairs: The pairs, those of one photo adjacent.
        seeds: Number of seeds.
        editor: An editor with the base.
        label: Name of the list of pairs.
        judge: Function that measures the edited images of some pairs.

    Raises:
        click.UsageError: The folder holds a run with other pairs, dials or another base.
    """
    base = editor.base
    done = {}
    for name in names:
        dials = split_name(name, base.name)[1]
        settings = {"dials": dials, "base": base.fingerprint, "pairs": label}
        done[name] = keep_settings(folder / f"{name}.jsonl", settings)
    for seed, (number, group), name in product(range(seeds), photos(pairs), names):
        if done[name].get((seed, number), 0) >= len(group):
            continue
        method, dials = split_name(name, base.name)
        pictures, costs = run_photo(editor, method, number, group, seed, dials)
        line = {"seed": seed, "photo": number, "cost": costs, "rows": _rounded(judge(group, pictures))}
        with (folder / f"{name}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if seed == 0 and number < SHOWN_PHOTOS:
            Image.fromarray(np.concatenate(pictures, axis=1)).save(folder / strip_name(name, number))
        click.echo(
            f"{name} {seed} photo {number}: {costs['fit_seconds']:.1f} s + {costs['edit_seconds']:.2f} s",
            err=True,
        )
    editor.release()


def _rounded(rows: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """Rounds to five digits, with None for NaN, which JSON doesn't have."""
    return [{name: round(v, 5) if math.isfinite(v) else None for name, v in row.items()} for row in rows]


def strip_name(name: str, number: int) -> str:
    """Name of the PNG with a method's edits of one photo, side by side."""
    return f"{name}-{number}.png"


def _lines(file: Path) -> list[dict[str, Any]]:
    """Reads a file's lines, without a last one that an interrupted run left incomplete."""
    lines = file.read_text().split("\n")
    if lines[-1]:
        file.write_text("".join(f"{line}\n" for line in lines[:-1]))
    return [json.loads(line) for line in lines[:-1]]


def keep_settings(file: Path, settings: dict[str, Any]) -> dict[tuple[int, int], int]:
    """Writes a method's settings as the first line of a new file; returns its number of pairs by seed and photo.

    Raises:
        click.UsageError: The file was made with other settings.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or not _lines(file):
        file.write_text(json.dumps(settings) + "\n")
    first, *others = _lines(file)
    if first != json.loads(json.dumps(settings)):
        raise click.UsageError(f"{file} was made with other pairs, dials or another base; give another --out")
    return {(line["seed"], line["photo"]): len(line["rows"]) for line in others}


def read(
    folder: Path, name: str, pairs: Sequence[Any], seeds: int
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], dict[str, Any]]:
    """A method's metrics, each (pairs, seeds); the costs of each photo and seed; and its settings."""
    settings, *lines = _lines(folder / f"{name}.jsonl")
    kept = {(line["seed"], line["photo"]): line for line in lines}
    chosen = [[(kept[seed, number], len(group)) for number, group in photos(pairs)] for seed in range(seeds)]
    rows = [[row for line, count in one for row in line["rows"][:count]] for one in chosen]
    values = {
        field: np.array([[row[field] for row in one] for one in rows], dtype=float).T for field in rows[0][0]
    }
    return values, [line["cost"] for one in chosen for line, _ in one], settings


def settings_to_try(method: Method, trials: int) -> list[Dials]:
    """The defaults, then random samples of the search space: the same number for every method."""
    rng, chosen = random.Random(0), [{dial: values[0] for dial, values in method.grid.items()}]
    for _ in range(100 * trials):
        dials = {dial: rng.choice(values) for dial, values in method.grid.items()}
        if len(chosen) < trials and dials not in chosen:
            chosen.append(dials)
    return chosen


def tune(name: str, pair_count: int, trials: int, base: str, device: str) -> list[dict[str, Any]]:
    """Random search on the tuning list; returns trials, the best first, by success and then PSNR to the truth."""
    editor, method = Editor(base, device), METHODS[name]
    if isinstance(method, Imagic):
        method.kept = EDITS_OF_PHOTO * len(method.grid["unet_rate"])
    tried = [(dials, list[dict[str, float]]()) for dials in settings_to_try(method, trials)]
    for number, group in photos(draw_pairs("tuning", pair_count)):
        fits = dict[str, Any]()
        for dials, measured in tried:
            key = json.dumps({dial: value for dial, value in dials.items() if "." in dial})
            if key not in fits:
                fits[key] = method.fit(editor, group[0].image, 0, dials)
            pictures = method.edit(editor, fits[key], group, noise_seeds(number, 0, len(group)), dials)
            measured += measure(group, pictures)
        click.echo(f"{name}: {len(tried[0][1])} of {pair_count} pairs", err=True)
    rows = []
    for dials, measured in tried:
        means = {field: float(np.nanmean([row[field] for row in measured])) for field in measured[0]}
        rows.append({"dials": dials, **{field: round(value, 4) for field, value in means.items()}})
    editor.release()
    return sorted(rows, key=lambda row: (-row["success"], -row["psnr_truth"]))
