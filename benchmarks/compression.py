"""Edit quality against the size of the adapter file, and the importance of each kind of layer.

    python -m benchmarks.compression --photos 8 -o benchmarks/results/compression.json

Photos of the counterfactual benchmark's tuning list are fitted with the default recipe; each adapter is
compressed to several sizes, and all sample the same edits from the same noise.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from lora_unitune import Editor, fit
from lora_unitune.adapter.compress import Layer, compress, effect_lost, take_apart

from .counterfactual.measures import measure
from .counterfactual.methods import METHODS
from .counterfactual.pairs import EDITS_OF_PHOTO, draw_pairs
from .counterfactual.run import noise_seeds, photos
from .origin import origin

SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "8 bits": {"eight_bit": True},
    **{f"{size} bytes": {"to_bytes": size} for size in (200_000, 150_000, 100_000, 60_000)},
    **{
        f"{size} bytes in 8 bits": {"to_bytes": size, "eight_bit": True}
        for size in (100_000, 60_000, 40_000, 25_000)
    },
}


def importance_by_kind(layers: list[Layer]) -> dict[str, tuple[float, int]]:
    """Share of the total importance, and bytes in float16, by the kind of layer."""
    total = sum(float(layer.importance.sum()) for layer in layers)
    shares: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for layer in layers:
        kind = ".".join(name for name in layer.module.split(".")[-3:] if not name.isdigit())
        name = kind if layer.part == "unet" else layer.part
        share, size = shares[name]
        importance = float(layer.importance.sum()) / total
        shares[name] = share + importance, size + 2 * layer.numbers * len(layer.values)
    return shares


@click.command(help=__doc__)
@click.option("--photos", "count", default=8, show_default=True, type=click.IntRange(1))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False))
def main(count: int, output: Path | None) -> None:
    editor, method = Editor("pocket", "cpu"), METHODS["lora"]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    layers: dict[str, list[tuple[float, int]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number, group in photos(draw_pairs("tuning", EDITS_OF_PHOTO * count)):
            editor.release()
            whole = fit(group[0].image, base=editor.base)
            apart = take_apart(whole, editor.base)
            for kind, share in importance_by_kind(apart).items():
                layers[kind].append(share)
            for name, limits in SETTINGS.items():
                editor.release()
                small = compress(whole, layers=apart, **limits).adapter if limits else whole
                file = Path(folder) / "small.safetensors"
                small.save(file, True, torch.int8 if limits.get("eight_bit") else torch.float16)
                costs = {"bytes": file.stat().st_size, "effect_lost": effect_lost(editor.base, whole, small)}
                pictures = method.edit(editor, small, group, noise_seeds(number, 0, len(group)), {})
                rows[name] += [{**costs, **row} for row in measure(group, pictures)]
            click.echo(f"photo {number} done", err=True)
    table = {
        name: {key: round(float(np.nanmean([row[key] for row in of])), 4) for key in of[0]}
        for name, of in rows.items()
    }
    importance = {
        kind: {"share": round(float(np.mean([share for share, _ in of])), 4), "bytes": of[0][1]}
        for kind, of in sorted(layers.items(), key=lambda item: -np.mean([share for share, _ in item[1]]))
    }
    made = {**origin(editor.base.device), "photos": count, "table": table, "layers": importance}
    for name, row in table.items():
        click.echo(f"{name:<24}{row['bytes']:>9.0f} bytes  effect lost {100 * row['effect_lost']:5.1f} %  "
                   f"success {row['success']:.3f}  to the truth {row['psnr_truth']:.2f} dB")  # fmt: skip
    for kind, of in importance.items():
        click.echo(f"{kind:<28}{100 * of['share']:5.1f} % of the effect, {of['bytes']} bytes")
    if output:
        output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
