"""Reconstruction quality of a fit: held-out scenes, sampled from pure noise and the rare tokens alone.

    python -m benchmarks.reconstruction --scenes 20 -o benchmarks/results/reconstruction.json

Each scene is fitted with its number as seed. PSNR is between the sample and the photo's VAE reconstruction,
an upper bound for the base; "before" is the same sample without the adapter.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from lora_unitune import Editor, fit
from lora_unitune.editing.score import psnr
from lora_unitune.families import default_recipe
from lora_unitune.output import write_atomically
from lora_unitune.pocket.world import draw_scene, render

from .origin import origin


def measure(editor: Editor, number: int, overrides: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Fits and reconstructs one held-out scene; the editor's base is restored."""
    photo = render(draw_scene(number, "held-out"))
    recipe = default_recipe(editor.base.name, editor.base.family).override(overrides)
    editor.release()
    started = time.perf_counter()
    adapter = fit(photo, base=editor.base, recipe=recipe, seed=number)
    seconds = time.perf_counter() - started
    file = folder / f"{number}.safetensors"
    adapter.save(file)
    best = editor.photo_round_trip(adapter)
    return {
        "scene": number,
        "fit_seconds": round(seconds, 2),
        "bytes": file.stat().st_size,
        "psnr_vae": psnr(photo, best),
        "psnr_before": psnr(editor.reconstruct(adapter, seed=number, adapter_scale=0.0).image, best),
        "psnr_after": psnr(editor.reconstruct(adapter, seed=number).image, best),
    }


def _spread(values: list[float]) -> dict[str, float]:
    summary = {
        "mean": np.mean(values),
        "deviation": np.std(values, ddof=1),
        "least": min(values),
        "most": max(values),
    }
    return {name: round(float(value), 3) for name, value in summary.items()}


@click.command(help=__doc__)
@click.option(
    "--scenes", default=20, show_default=True, type=click.IntRange(2), help="Held-out scenes to fit."
)
@click.option("--first", default=0, show_default=True, help="Number of the first one.")
@click.option("--base", default="pocket", show_default=True)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of the recipe."
)
@click.option("-o", "--output", metavar="FILE", help="Write the result as JSON too.")
def main(scenes: int, first: int, base: str, overrides: tuple[str, ...], output: str | None) -> None:
    editor = Editor(base)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + scenes):
            rows.append(measure(editor, number, overrides, Path(folder)))
            click.echo(json.dumps({k: round(v, 2) for k, v in rows[-1].items()}), err=True)
    summary = {name: _spread([row[name] for row in rows]) for name in rows[0] if name != "scene"}
    for name, values in summary.items():
        click.echo(f"{name:<14}" + "  ".join(f"{key} {value:.2f}" for key, value in values.items()))
    if output:
        text = json.dumps(
            {**origin(editor.base.device), "overrides": list(overrides), "summary": summary, "scenes": rows},
            indent=1,
        )
        write_atomically(output, lambda file: file.write_text(text + "\n"), overwrite=True)


if __name__ == "__main__":
    main()
