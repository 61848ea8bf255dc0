"""Summary of a run: JSON, Markdown tables, plots and contact sheets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_unitune.pocket.world import render

from .measures import MEASURES, interval
from .pairs import KINDS, TEST, Pair, draw_pairs
from .run import SHOWN_PHOTOS, TUNED, complete, read, strip_name

RIVAL = "sdedit"
DIFFERENCES = {"success_minus_full": "full", "success_minus_no_fit": "no-fit"}
TITLES = {
    "known": "Known things: photos of objects that the base was trained on",
    "unknown": "Unknown things: photos of objects that the base was never trained on",
}
COSTS = {
    "fit_seconds": "s to fit",
    "edit_seconds": "s an edit",
    "peak_bytes": "peak bytes",
    "trained_parameters": "trained parameters",
    "optimizer_bytes": "optimizer bytes",
    "file_bytes": "file bytes",
    "load_seconds": "s to load",
}
TIMES = ("fit_seconds", "edit_seconds", "load_seconds", "fit_peak_bytes", "peak_bytes")
"""The only fields that vary between two runs with the same seeds."""


def write_report(folder: Path, count: int, seeds: int) -> str:
    """Writes the summary of a run's folder, of the methods that are complete; returns the tables.

    Args:
        folder: The run's folder, with a folder for each list.
        count: Number of pairs of each list.
        seeds: Number of seeds.
    """
    results, tables = {"pairs": count, "seeds": seeds}, []
    for which, split in TEST.items():
        pairs, inner = draw_pairs(split, count), folder / which
        names = complete(inner, pairs, seeds)
        if not names:
            continue
        summary = summarise(inner, names, pairs, seeds)
        results[which] = summary
        tables.append(f"## {TITLES[which]}\n\n{table(summary)}")
        plot(summary, _trials(which), inner)
        contact_sheet(inner, names, pairs).save(inner / "contact-sheet.png", optimize=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.md").write_text("\n".join(tables))
    return "\n".join(tables)


def _trials(which: str) -> dict[str, list[dict[str, Any]]]:
    """The means of every tuning trial of each method on one list."""
    tuned = {file.stem: json.loads(file.read_text())["trials"] for file in TUNED.glob("*.json")}
    return {name: [trial[which] for trial in trials if which in trial] for name, trials in tuned.items()}


def summarise(folder: Path, names: Sequence[str], pairs: Sequence[Pair], seeds: int) -> dict[str, Any]:
    """Every method's metrics with intervals, over all edits and by kind of edit, preferences and costs.

    Differences of success are paired: between edits of the same pair from the same noise.
    """
    kinds = np.array([pair.kind for pair in pairs])
    parts = {"all": kinds != ""} | {kind: kinds == kind for kind in KINDS}

    def spread(values: np.ndarray) -> dict[str, list[float | None]]:
        return {part: _rounded(interval(values[chosen])) for part, chosen in parts.items() if chosen.any()}

    values, summary = {}, {}
    for name in names:
        values[name], costs, settings = read(folder, name, pairs, seeds)
        summary[name] = {
            "settings": settings,
            "measures": {field: spread(values[name][field]) for field in MEASURES},
            "cost": {field: _middle([row[field] for row in costs if row.get(field)]) for field in COSTS},
        }
    for name in names:
        if RIVAL in names:
            summary[name]["nearer_than_sdedit"] = spread(_preferred(values[name], values[RIVAL]))
        for field, other in DIFFERENCES.items():
            if other in names:
                summary[name][field] = spread(values[name]["success"] - values[other]["success"])
    return summary


def summarise_folder(folder: Path, name: str, pairs: Sequence[Any], seeds: int) -> dict[str, Any]:
    """A method's scores on real photos, with intervals."""
    values, _, settings = read(folder, name, pairs, seeds)
    return {"settings": settings, **{field: _rounded(interval(of)) for field, of in values.items()}}


def _preferred(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> np.ndarray:
    """1 where ours is nearer to the ground truth than theirs, 0 where not, one half where equal."""
    preferred: np.ndarray = (np.sign(ours["psnr_truth"] - theirs["psnr_truth"]) + 1) / 2
    return preferred


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values]


def _middle(values: list[float]) -> dict[str, float] | None:
    """Median and range."""
    if not values:
        return None
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def table(summary: dict[str, Any]) -> str:
    """Three Markdown tables: metrics with intervals, success by kind of edit, and costs."""
    columns = {
        "aligned %": ("aligned", 100, 1),
        "preserved %": ("preserved", 100, 1),
        "success %": ("success", 100, 1),
        "success minus no fit": ("success_minus_no_fit", 100, 1),
        "success minus full": ("success_minus_full", 100, 1),
        "same thing %": ("same_thing", 100, 1),
        "nearer than SDEdit %": ("nearer_than_sdedit", 100, 1),
        "PSNR to the truth": ("psnr_truth", 1, 1),
        "PSNR outside the mask": ("psnr_outside", 1, 1),
        "SSIM outside the mask": ("ssim_outside", 1, 3),
    }
    rows = {name: row["measures"] | row for name, row in summary.items()}
    kinds = [kind for kind in next(iter(rows.values()))["success"] if kind != "all"]
    in_all = {
        name: [
            _cell(row.get(field, {}).get("all"), times, digits) for field, times, digits in columns.values()
        ]
        for name, row in rows.items()
    }
    by_kind = {name: [_cell(row["success"][kind], 100, 1) for kind in kinds] for name, row in rows.items()}
    costs = {name: [f"{row['cost'][field]['median']:,.4g}" if row["cost"][field] else "" for field in COSTS]
             for name, row in summary.items()}  # fmt: skip
    heads = [f"success, {kind} %" for kind in kinds]
    tables = (list(columns), in_all), (heads, by_kind), (list(COSTS.values()), costs)
    return "\n\n".join(_markdown(*one) for one in tables) + "\n"


def _markdown(heads: list[str], rows: dict[str, list[str]]) -> str:
    lines = [
        ["method", *heads],
        ["---"] * (len(heads) + 1),
        *([name, *cells] for name, cells in rows.items()),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: Sequence[float | None] | None, times: float, digits: int) -> str:
    if not values or values[0] is None:
        return ""
    mean, low, high = (f"{times * (value or 0.0):.{digits}f}" for value in values)
    return f"{mean} ({low} to {high})"


def plot(summary: dict[str, Any], trials: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Three PNGs: alignment against preservation with every tuning trial, quality against steps, and cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5.5), layout="constrained")
    for number, name in enumerate(summary):
        colour = f"C{number % 10}"
        tried = trials.get(name, [])
        axes.scatter(
            [t["aligned"] for t in tried], [t["preserved"] for t in tried], s=8, color=colour, alpha=0.5
        )
        of = summary[name]["measures"]
        (x, *across), (y, *up) = of["aligned"]["all"], of["preserved"]["all"]
        axes.plot(x, y, "o", color=colour, label=name)
        axes.plot(across, [y, y], color=colour)
        axes.plot([x, x], up, color=colour)
    axes.set(xlabel="aligned (share of edits)", ylabel="preserved (share of edits)",
             title="Large: frozen dials, 95 % intervals. Small: trials on the tuning photos")  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(folder / "frontier.png", dpi=110)
    pyplot.close(figure)
    _plot_steps(summary, folder, pyplot)
    fitted = [name for name in summary if summary[name]["cost"]["trained_parameters"]]
    figure, panels = pyplot.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    for axes, field in zip(
        panels, ("fit_seconds", "peak_bytes", "trained_parameters", "file_bytes"), strict=True
    ):
        axes.bar(fitted, [(summary[name]["cost"][field] or {"median": 0})["median"] for name in fitted])
        axes.set(title=COSTS[field], yscale="log")
        axes.tick_params(axis="x", rotation=60, labelsize=7)
    figure.savefig(folder / "cost.png", dpi=110)
    pyplot.close(figure)


def _plot_steps(summary: dict[str, Any], folder: Path, pyplot: Any) -> None:
    """Success and PSNR to the ground truth against the steps of the fit, for methods such as lora@40."""
    swept = sorted({name.partition("@")[0] for name in summary if "@" in name})
    if not swept:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, field in zip(panels, ("success", "psnr_truth"), strict=True):
        for method in swept:
            steps = sorted(int(name.partition("@")[2]) for name in summary if name.startswith(f"{method}@"))
            values = [summary[f"{method}@{n}"]["measures"][field]["all"] for n in steps]
            axes.plot(steps, [v[0] for v in values], "o-", label=method)
            axes.fill_between(steps, [v[1] for v in values], [v[2] for v in values], alpha=0.2)
        axes.set(xlabel="steps of the fit", ylabel=field, xscale="log")
        axes.legend()
    figure.savefig(folder / "steps.png", dpi=110)
    pyplot.close(figure)


def contact_sheet(folder: Path, names: Sequence[str], pairs: Sequence[Pair]) -> Image.Image:
    """The first 16 pairs, seed 0: photo, ground truth, and every method's edit."""
    pairs, side, gap = pairs[:16], 96, 4
    columns = ["the photo", "the truth", *(name for name in names if name not in ("photo", "truth"))]
    sheet = Image.new("RGB", (180 + len(columns) * (side + gap), 20 + len(pairs) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    shown = {name: _strips(folder, name)[: len(pairs)] for name in names}
    shown["the photo"] = [np.asarray(render(pair.before)) for pair in pairs]
    shown["the truth"] = [np.asarray(render(pair.truth.scene)) for pair in pairs]
    for column, name in enumerate(columns):
        pen.text((180 + column * (side + gap), 3), name, fill="black", font=font)
        for row, picture in enumerate(shown[name]):
            big = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(big, (180 + column * (side + gap), 20 + row * (side + gap)))
    for row, pair in enumerate(pairs):
        pen.multiline_text((4, 24 + row * (side + gap)), _wrapped(pair.truth.prompt), fill="black", font=font)
    return sheet


def _strips(folder: Path, name: str) -> list[np.ndarray]:
    """The images that a method's run saved, in order of the pairs."""
    files = [folder / strip_name(name, number) for number in range(SHOWN_PHOTOS)]
    strips = [np.asarray(Image.open(file)) for file in files if file.exists()]
    return [picture for strip in strips for picture in np.split(strip, strip.shape[1] // len(strip), axis=1)]


def _wrapped(text: str, width: int = 26) -> str:
    lines = [""]
    for word in text.split():
        lines = (
            [*lines[:-1], f"{lines[-1]} {word}".strip()]
            if len(lines[-1]) + len(word) < width
            else [*lines, word]
        )
    return "\n".join(lines)
