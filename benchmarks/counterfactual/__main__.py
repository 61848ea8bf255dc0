"""Comparison of text-guided image editing methods, on edits with ground truth.

    python -m benchmarks.counterfactual --methods lora,full,sdedit --pairs 240 --seeds 3 --out FOLDER
    python -m benchmarks.counterfactual tune --methods lora,full,sdedit --pairs 24 --trials 12

The first runs the methods on the same photos, prompts and noise (resuming an interrupted run) and writes every
pair's metrics, results.json, table.md, plots and a contact sheet of the first 16 pairs into FOLDER. The second
tunes each method's hyperparameters ("dials"), with the same number of trials for each, on separate photos.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from lora_unitune import Editor

from ..origin import origin
from .folders import load_scores, measure_folder, read_folder
from .measures import measure
from .methods import METHODS
from .pairs import draw_pairs
from .report import contact_sheet, plot, summarise, summarise_folder, table
from .run import DIALS, run, split_name, tune

TRIALS = DIALS.with_name("trials.json")


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        split_name(name)
    return names


_methods = click.option(
    "--methods",
    default=",".join(METHODS),
    callback=_names,
    show_default=True,
    metavar="NAME,NAME",
    help="Also lora@40 and full@40: as tuned, but with 40 steps of the fit.",
)
_base = click.option("--base", default="pocket", show_default=True)
_device = click.option("--device", default="auto", show_default=True)


@click.group(help=__doc__, invoke_without_command=True)
@_methods
@click.option(
    "--pairs", "count", default=240, show_default=True, type=click.IntRange(1), help="Six for each photo."
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for images and results."
)
@_base
@_device
@click.pass_context
def main(
    context: click.Context,
    methods: list[str],
    count: int,
    seeds: int,
    out: Path | None,
    base: str,
    device: str,
) -> None:
    if context.invoked_subcommand:
        return
    if out is None:
        raise click.UsageError("give a folder for the results: --out FOLDER")
    pairs, editor = draw_pairs("test", count), Editor(base, device)
    run(out, methods, pairs, seeds, editor, "test", measure)
    summary = summarise(out, methods, pairs, seeds)
    made = origin(editor.base.device) | {"pairs": count, "seeds": seeds, "base": base}
    (out / "results.json").write_text(json.dumps({**made, "methods": summary}, indent=1) + "\n")
    (out / "table.md").write_text(table(summary))
    plot(summary, json.loads(TRIALS.read_text()) if TRIALS.exists() else {}, out)
    contact_sheet(out, methods, pairs).save(out / "contact-sheet.png", optimize=True)
    click.echo(table(summary))


@main.command("tune")
@_methods
@click.option("--pairs", "count", default=24, show_default=True, type=click.IntRange(1))
@click.option("--trials", default=12, show_default=True, type=click.IntRange(1))
@_base
@_device
def run_tune(methods: list[str], count: int, trials: int, base: str, device: str) -> None:
    """Tunes each method's hyperparameters on the tuning list."""
    for name in methods:
        if name not in METHODS:
            raise click.UsageError(
                f"{name} is tuned as {name.partition('@')[0]}; only names without @ have dials"
            )
        if not METHODS[name].grid:
            continue
        rows = tune(name, count, trials, base, device)
        for file, value in ((DIALS, rows[0]["dials"]), (TRIALS, rows)):
            kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(kept | {name: value}, indent=1) + "\n")


@main.command("folder")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--methods", default="lora,sdedit", callback=_names, show_default=True, metavar="NAME,NAME")
@click.option("--pairs", "count", default=100_000, type=click.IntRange(1), help="Maximum number of pairs.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--base", required=True, help="Folder or hub id of a Stable Diffusion model.")
@click.option("--clip", default="openai/clip-vit-large-patch14", show_default=True)
@click.option("--dino", default="facebook/dinov2-base", show_default=True)
@_device
def run_folder(
    folder: Path,
    methods: list[str],
    count: int,
    seeds: int,
    out: Path,
    base: str,
    clip: str,
    dino: str,
    device: str,
) -> None:
    """Real photos: a FOLDER laid out like TEdBench or PIE-Bench, scored by CLIP, DINO and LPIPS."""
    methods = [name for name in methods if not name.startswith("truth")]
    pairs, editor = read_folder(folder, count), Editor(base, device)
    scores, missing = load_scores(clip, dino)
    run(out, methods, pairs, seeds, editor, folder.resolve().name, partial(measure_folder, scores=scores))
    summary = {name: summarise_folder(out, name, pairs, seeds) for name in methods}
    made = origin(editor.base.device) | {"pairs": len(pairs), "seeds": seeds, "base": editor.base.name}
    text = json.dumps({**made, "left_out": missing, "methods": summary}, indent=1)
    (out / "results.json").write_text(text + "\n")
    for line in missing:
        click.echo(line, err=True)
    click.echo(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
