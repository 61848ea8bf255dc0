"""Tunes a method's hyperparameters on both tuning lists together, with the same budget for every method.

Successive halving (arXiv 1502.07943): random settings of the search space on the first quarter of the photos, then
the best quarter of the settings on all of them. Once more from there: the settings that differ from the best in one
hyperparameter by one value.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np

from lora_unitune import Editor

from ..origin import origin
from .imagic import Imagic
from .measures import MEASURES, measure
from .method import Dials, Method, edges
from .methods import METHODS
from .pairs import EDITS_OF_PHOTO, TUNING, draw_pairs
from .run import noise_seeds, photos

Groups = list[tuple[int, list[Any]]]


@dataclass
class Trial:
    """One setting and the metrics of its edits, by list."""

    dials: Dials
    rows: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {name: [] for name in TUNING})

    def mean(self, measured: str) -> float:
        """The mean of the lists' means, so that both weigh the same."""
        return float(np.mean([np.nanmean([row[measured] for row in rows]) for rows in self.rows.values()]))

    def rank(self) -> tuple[float, float]:
        """Sorts the best first: by success, then by PSNR to the ground truth."""
        return -self.mean("success"), -self.mean("psnr_truth")

    def record(self) -> dict[str, Any]:
        """What is kept of it: the means over the edits of each list, and their number."""
        lists = {name: {"pairs": len(rows), **_means(rows)} for name, rows in self.rows.items()}
        return {"dials": self.dials, "success": round(self.mean("success"), 4), **lists}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    values = {name: [row[name] for row in rows if math.isfinite(row[name])] for name in MEASURES}
    return {name: round(float(np.mean(of)), 4) for name, of in values.items() if of}


def settings_to_try(method: Method, trials: int) -> list[Dials]:
    """The defaults, then random samples of the search space: the same number for every method."""
    rng, chosen = random.Random(0), [{dial: values[0] for dial, values in method.grid.items()}]
    for _ in range(100 * trials):
        dials = {dial: rng.choice(values) for dial, values in method.grid.items()}
        if len(chosen) < trials and dials not in chosen and _has_window(dials):
            chosen.append(dials)
    return chosen


def neighbors(method: Method, dials: Dials) -> list[Dials]:
    """The settings that differ in one number by one value of the search space."""
    found = []
    for dial, values in method.grid.items():
        ordered = sorted(set(values))
        if dials[dial] in ordered:
            at = ordered.index(dials[dial])
            found += [dials | {dial: value} for i, value in enumerate(ordered) if abs(i - at) == 1]
    return [one for one in found if _has_window(one)]


def _has_window(dials: Dials) -> bool:
    """Whether guidance starts before it stops."""
    return bool(dials.get("guidance_start", 0) < dials.get("guidance_stop", 1))


def tune(name: str, count: int, trials: int, base: str, device: str) -> dict[str, Any]:
    """Searches a method's space; returns its best dials, those at an edge of the space, and all trials.

    Args:
        name: Name of the method.
        count: Number of pairs of each list.
        trials: Number of settings.
        base: Name of the base.
        device: Name of the device.
    """
    editor, method = Editor(base, device), METHODS[name]
    if isinstance(method, Imagic):
        method.kept = EDITS_OF_PHOTO * len(method.grid["unet_rate"])
    lists = {which: list(photos(draw_pairs(split, count))) for which, split in TUNING.items()}
    first = {which: math.ceil(len(groups) / 4) for which, groups in lists.items()}
    finished, dropped = list[Trial](), list[Trial]()
    for _ in range(2):
        seen = [trial.dials for trial in (*finished, *dropped)]
        to_try = neighbors(method, seen[0]) if seen else settings_to_try(method, trials)
        tried = [Trial(dials) for dials in to_try if dials not in seen]
        for which, groups in lists.items():
            _evaluate(editor, name, tried, which, groups[: first[which]])
        tried.sort(key=Trial.rank)
        best = math.ceil(len(tried) / 4)
        for which, groups in lists.items():
            _evaluate(editor, name, tried[:best], which, groups[first[which] :])
        finished = sorted([*finished, *tried[:best]], key=Trial.rank)
        dropped += tried[best:]
    editor.release()
    tried = [*finished, *sorted(dropped, key=Trial.rank)]
    return {
        "made": origin(editor.base.device) | {"base": editor.base.fingerprint, "pairs": count},
        "space": {dial: values for dial, values in method.grid.items() if len(values) > 1},
        "dials": tried[0].dials,
        "edges": edges(method.grid, tried[0].dials),
        "trials": [trial.record() for trial in tried],
    }


def _evaluate(editor: Editor, name: str, tried: Sequence[Trial], which: str, groups: Groups) -> None:
    """Edits some photos of a list with every setting; settings with the same recipe share a photo's fit."""
    method = METHODS[name]
    for number, group in groups:
        fits = dict[str, Any]()
        for trial in tried:
            key = json.dumps({dial: value for dial, value in trial.dials.items() if "." in dial})
            if key not in fits:
                fits[key] = method.fit(editor, group[0].image, 0, trial.dials)
            seeds = noise_seeds(number, 0, len(group))
            trial.rows[which] += measure(group, method.edit(editor, fits[key], group, seeds, trial.dials))
        click.echo(f"{name}: {which} photo {number}, {len(tried)} settings", err=True)
