"""Runs methods over photos and seeds; resumes interrupted runs.

Each method writes its own JSON Lines file: first its settings, then one line for each photo and seed with the
metrics and costs of its pairs. The images of the first photos are saved too, as strips.
"""

from __future__ import annotations

import json
import math
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
from ..origin import origin
from .method import Dials, Method
from .methods import METHODS
from .ours import UniTune

TUNED = Path(__file__).with_name("tuned")
"""Folder of what `tune` chose on the tuning lists, a file for each method."""
SHOWN_PHOTOS = 4  # number of photos whose images are saved: at least the first 16 pairs
Judge = Callable[[Sequence[Any], np.ndarray], list[dict[str, float]]]
"""Function from pairs and their edited images, (n, h, w, 3) uint8, to the metrics of each."""


def split_name(name: str, base: str = "pocket") -> tuple[Method, Dials]:
    """A method and its hyperparameters: "lora" as tuned, "lora@40" with 40 steps of the fit.

    They are tuned for pocket; on another base UniTune takes those of its recipe, and the others their defaults.

    Raises:
        click.BadParameter: The method is unknown.
    """
    method, _, steps = name.partition("@")
    if method not in METHODS or (steps and not (steps.isdecimal() and method in ("lora", "full"))):
        raise click.BadParameter(
            f"no method {name!r}; there are {', '.join(METHODS)}, and lora@40 for 40 steps"
        )
    chosen, file = METHODS[method], TUNED / f"{method}.json"
    has_recipe = isinstance(chosen, UniTune) and base != "pocket"
    dials = {} if has_recipe else {dial: values[0] for dial, values in chosen.grid.items()}
    if base == "pocket" and file.exists():
        dials |= json.loads(file.read_text())["dials"]
    return chosen, dials | ({"fit.steps": int(steps)} if steps else {})


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
    base, done, made = editor.base, {}, origin(editor.base.device)
    for name in names:
        dials = split_name(name, base.name)[1]
        settings = {"dials": dials, "base": base.fingerprint, "pairs": label}
        done[name] = keep_settings(folder / f"{name}.jsonl", settings, made)
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
    """Reads a file's lines, without a last one that isn't complete."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def keep_settings(file: Path, settings: dict[str, Any], made: dict[str, Any]) -> dict[tuple[int, int], int]:
    """Writes a method's settings as the first line of a new file; returns its number of pairs by seed and photo.

    Args:
        file: File of a method, without its last line if an interrupted run left that incomplete.
        settings: Settings that all lines of the file share.
        made: Commit, versions and device, written along with them.

    Raises:
        click.UsageError: The file was made with other settings.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    before = file.read_text() if file.exists() else ""
    lines = (_lines(file) if before else []) or [{**settings, "made": made}]
    first = {name: value for name, value in lines[0].items() if name != "made"}
    if first != json.loads(json.dumps(settings)):
        raise click.UsageError(f"{file} was made with other pairs, dials or another base; give another --out")
    if not before.endswith("\n"):  # new, or interrupted
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pairs_done(lines)


def pairs_done(lines: Sequence[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """A method's number of pairs by seed and photo."""
    return {(line["seed"], line["photo"]): len(line["rows"]) for line in lines[1:]}


def complete(folder: Path, pairs: Sequence[Any], seeds: int) -> list[str]:
    """The methods whose files in a folder have all pairs and seeds, in the order of `METHODS`."""
    wanted = {(seed, number): len(group) for seed in range(seeds) for number, group in photos(pairs)}
    found = []
    for file in folder.glob("*.jsonl"):
        done = pairs_done(_lines(file))
        if all(done.get(key, 0) >= count for key, count in wanted.items()):
            found.append(file.stem)
    order = list(METHODS)
    return sorted(found, key=lambda name: (order.index(name.partition("@")[0]), len(name), name))


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
