"""Comparison of text-guided image editing methods, on edits with ground truth.

    python -m benchmarks.counterfactual --methods lora,no-fit,sdedit --out FOLDER
    python -m benchmarks.counterfactual report FOLDER
    python -m benchmarks.counterfactual tune --methods lora,no-fit,sdedit

The first runs the methods on the same photos, prompts and noise (resuming an interrupted run) and writes every
pair's metrics: "known" photos show objects that the base was trained on, "unknown" ones objects that it wasn't.
The second writes results.json, table.md, plots and a contact sheet of the first 16 pairs of each list, of the
methods that are complete. The third tunes each method's hyperparameters ("dials"), with the same budget for each,
on separate photos of both kinds. Several processes may run or tune different methods at the same time.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click

from lora_unitune import Editor

from .folders import load_scores, measure_folder, read_folder
from .measures import measure
from .methods import METHODS
from .pairs import TEST, draw_pairs
from .report import summarise_folder, write_report
from .run import TUNED, run, split_name
from .tune import tune

USUAL = [name for name in METHODS if name != "imagic"]  # it fits every single pair, for minutes


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        split_name(name)
    return names


_methods = click.option(
    "--methods",
    default=",".join(USUAL),
    callback=_names,
    show_default=True,
    metavar="NAME,NAME",
    help="Also imagic; and lora@40 and full@40: as tuned, but with 40 steps of the fit.",
)
_pairs = click.option(
    "--pairs", "count", default=204, show_default=True, type=click.IntRange(1), help="Of each list."
)
_seeds = click.option("--seeds", default=3, show_default=True, type=click.IntRange(1))
_base = click.option("--base", default="pocket", show_default=True)
_device = click.option("--device", default="auto", show_default=True)


@click.group(help=__doc__, invoke_without_command=True)
@_methods
@click.option("--list", "which", default="both", show_default=True, type=click.Choice([*TEST, "both"]))
@_pairs
@_seeds
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the results.")
@_base
@_device
@click.pass_context
def main(
    context: click.Context,
    methods: list[str],
    which: str,
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
    editor = Editor(base, device)
    for name, split in TEST.items():
        if which in (name, "both"):
            run(out / name, methods, draw_pairs(split, count), seeds, editor, split, measure)


@main.command("report")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_pairs
@_seeds
def run_report(folder: Path, count: int, seeds: int) -> None:
    """Writes results.json, table.md, plots and contact sheets into the FOLDER of a run, of complete methods."""
    click.echo(write_report(folder, count, seeds))


@main.command("tune")
@_methods
@click.option(
    "--pairs",
    "count",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Of each list; all trials see the photos of the first quarter, the best quarter of them all photos.",
)
@click.option("--trials", default=16, show_default=True, type=click.IntRange(1))
@_base
@_device
def run_tune(methods: list[str], count: int, trials: int, base: str, device: str) -> None:
    """Tunes each method's hyperparameters on both tuning lists together.

    "edge" names those whose best value is the first or last of its search space: widen it, and tune again.
    """
    for name in methods:
        if name not in METHODS:
            raise click.UsageError(
                f"{name} is tuned as {name.partition('@')[0]}; only names without @ have dials"
            )
    for name in filter(lambda name: METHODS[name].grid, methods):
        tuned = tune(name, count, trials, base, device)
        TUNED.mkdir(exist_ok=True)
        (TUNED / f"{name}.json").write_text(json.dumps(tuned, indent=1) + "\n")
        best = tuned["trials"][0]["success"]
        click.echo(f"{name}: success {100 * best:.1f} % with {json.dumps(tuned['dials'])}")
        if tuned["edges"]:
            click.echo("edge: " + ", ".join(f"{dial}={value:g}" for dial, value in tuned["edges"].items()))


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
    made = {"pairs": len(pairs), "seeds": seeds, "base": editor.base.name}
    text = json.dumps({**made, "left_out": missing, "methods": summary}, indent=1)
    (out / "results.json").write_text(text + "\n")
    for line in missing:
        click.echo(line, err=True)
    click.echo(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
