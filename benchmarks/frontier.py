"""Duration of a fit against the success of its edits, for several settings of the fit.

    python -m benchmarks.frontier --photos 8 -o benchmarks/results/frontier.json

Photos of the counterfactual benchmark's tuning list are fitted with the default recipe and changes of it; each
is edited at several adapter scales, of which the best counts, so that a short fit isn't judged at a scale tuned
for a long one. Writes a plot next to the JSON, and resumes interrupted runs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from lora_unitune import Editor, fit
from lora_unitune.editing.score import psnr

from .counterfactual.measures import measure
from .counterfactual.methods import FULL, METHODS
from .counterfactual.pairs import EDITS_OF_PHOTO, draw_pairs
from .counterfactual.run import noise_seeds, photos
from .origin import origin

SCALES = (0.1, 0.15, 0.25)
SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "120 steps": ("fit.steps=120",),
    "60 steps": ("fit.steps=60",),
    "30 steps": ("fit.steps=30",),
    "60 steps, rate 3e-2": ("fit.steps=60", "lora.unet.learning_rate=3e-2"),
    "60 steps, batch 8": ("fit.steps=60", "fit.batch_size=8"),
    "rank 1": ("lora.unet.rank=1",),
    "rank 8": ("lora.unet.rank=8",),
    "no convolutions": ("lora.unet.targets=to_q,to_k,to_v,to_out.0,ff.net.2",),
    "no text encoder": ("lora.text_encoder.rank=0",),
    "full, 120 steps": (*FULL, "fit.steps=120"),
    "full, 60 steps": (*FULL, "fit.steps=60"),
}


def run_photo(editor: Editor, number: int, group: list[Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """One fit: its seconds, its reconstruction, and its edits at each scale."""
    method = METHODS["lora"]
    editor.release()
    started = time.perf_counter()
    adapter = fit(group[0].image, base=editor.base, overrides=overrides)
    row: dict[str, Any] = {"photo": number, "fit_seconds": round(time.perf_counter() - started, 3)}
    target = editor.photo_round_trip(adapter)
    row["reconstruction"] = round(psnr(target, editor.reconstruct(adapter).image), 3)
    for scale in SCALES:
        seeds = noise_seeds(number, 0, len(group))
        rows = measure(group, method.edit(editor, adapter, group, seeds, {"adapter_scale": scale}))
        row[str(scale)] = {
            key: [round(float(one[key]), 4) for one in rows]
            for key in ("aligned", "preserved", "success", "psnr_truth")
        }
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over photos, at the scale with the highest success (then PSNR to the truth)."""
    of_scale = {
        scale: {key: float(np.mean([row[str(scale)][key] for row in rows])) for key in rows[0][str(scale)]}
        for scale in SCALES
    }
    best = max(SCALES, key=lambda scale: (of_scale[scale]["success"], of_scale[scale]["psnr_truth"]))
    means = {key: float(np.mean([row[key] for row in rows])) for key in ("fit_seconds", "reconstruction")}
    return {key: round(value, 4) for key, value in {**means, "scale": best, **of_scale[best]}.items()}


def plot(summary: dict[str, Any], file: Path) -> None:
    """Plots edit and reconstruction quality against the seconds of a fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "success": "share of successful edits",
        "psnr_truth": "PSNR of edits to the truth, dB",
        "reconstruction": "PSNR of the photo redrawn from noise, dB",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5))
    for (key, title), axis in zip(titles.items(), axes, strict=True):
        for name, row in summary.items():
            axis.plot(row["fit_seconds"], row[key], "s" if name == "default" else "o")
            axis.annotate(
                name, (row["fit_seconds"], row[key]), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
        axis.set(xlabel="seconds of a fit", ylabel=title)
        axis.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


@click.command(help=__doc__)
@click.option("--photos", "count", default=8, show_default=True, type=click.IntRange(1))
@click.option("--only", default=";".join(SETTINGS), metavar="NAME;NAME", help="Some of the settings.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
def main(count: int, only: str, output: Path) -> None:
    editor = Editor("pocket", "cpu")
    made = origin(editor.base.device) | {"base": editor.base.fingerprint, "photos": count}
    kept = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    if kept.get("base", made["base"]) != made["base"]:
        raise click.UsageError(f"{output} was made on other weights; give another file")
    names = only.split(";")
    for number, group in photos(draw_pairs("tuning", EDITS_OF_PHOTO * count)):
        for name in names:
            rows = kept["rows"].setdefault(name, [])
            if number < len(rows):
                continue
            rows.append(run_photo(editor, number, group, SETTINGS[name]))
            output.write_text(json.dumps({**made, "rows": kept["rows"]}) + "\n")
            click.echo(f"photo {number}, {name}: {rows[-1]['fit_seconds']:.1f} s", err=True)
    summary = {name: summarise(rows) for name, rows in kept["rows"].items()}
    output.write_text(json.dumps({**made, "table": summary, "rows": kept["rows"]}) + "\n")
    plot(summary, output.with_suffix(".png"))
    for name, row in summary.items():
        click.echo(f"{name:<28}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
