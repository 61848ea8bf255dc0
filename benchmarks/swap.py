"""Latency of hot-swapping an adapter, here and in plain diffusers, in one run.

    python -m benchmarks.swap --base pocket -o benchmarks/results/swap-pocket.json
    python -m benchmarks.swap --base sd15 --swaps 20

Adapters are random; both sides read them from files in the page cache. "here" swaps to an adapter in memory,
"here_with_file" reads its file too, as `load_lora_weights` does.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from lora_unitune import Adapter, Recipe
from lora_unitune.adapter import layers
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.families import Base, default_recipe
from lora_unitune.output import write_atomically

from .cost.bases import NAMES, make_base
from .origin import origin


def random_adapters(base: Base, recipe: Recipe, count: int) -> list[Adapter]:
    """Adapters of equal shapes with random tensors."""
    layers.attach(base, recipe.lora)
    shapes = {key: tensor.shape for key, tensor in layers.collect(base).items()}
    layers.detach(base)
    generator = torch.Generator().manual_seed(0)
    made = Adapter(
        tensors={},
        rare_tokens="zqrt",
        recipe=recipe,
        base=base.name,
        fingerprint=base.fingerprint,
        photo_latents=None,
        size=base.size,
        seed=0,
        seconds=0.0,
    )
    return [
        replace(
            made,
            tensors={key: 0.01 * torch.randn(shape, generator=generator) for key, shape in shapes.items()},
        )
        for _ in range(count)
    ]


def seconds_of(work: Callable[[int], object], count: int) -> dict[str, float]:
    """Median and range of a swap's seconds, without the first one, which includes the preparation."""
    durations = []
    for number in range(count + 1):
        started = time.perf_counter()
        work(number)
        durations.append(time.perf_counter() - started)
    return {
        "median": float(np.median(durations[1:])),
        "least": min(durations[1:]),
        "most": max(durations[1:]),
    }


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def exact(base: Base, before: dict[str, torch.Tensor]) -> bool:
    """Whether the base's weights are unchanged, bit for bit."""
    return all(
        torch.equal(before[f"{part}.{name}"], tensor)
        for part, module in base.parts.items()
        for name, tensor in module.state_dict().items()
    )


@click.command(help=__doc__)
@click.option("--base", "name", default="pocket", show_default=True, type=click.Choice(NAMES[:2]))
@click.option("--swaps", default=200, show_default=True, type=click.IntRange(2))
@click.option(
    "--many", default=1000, show_default=True, help="Swaps over which the growth of memory is measured."
)
@click.option("-o", "--output", metavar="FILE", help="Write the result as JSON too.")
def main(name: str, swaps: int, many: int, output: str | None) -> None:
    base = make_base(name, "cpu")
    recipe = base.family.complete(Recipe()) if name == "sd15" else default_recipe(base.name, base.family)
    before = {f"{part}.{key}": tensor.clone() for part, module in base.parts.items()
              for key, tensor in module.state_dict().items()}  # fmt: skip
    made, mount = random_adapters(base, recipe, 2), Mount(base)
    row: dict[str, Any] = {"base": name, "tensors": len(made[0].tensors)}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.safetensors" for number in range(2)]
        for adapter, file in zip(made, files, strict=True):
            adapter.save(file)
        row["here"] = seconds_of(lambda number: mount.use(made[number % 2], 1.0), swaps)
        row["here_with_file"] = seconds_of(lambda n: mount.use(Adapter.load(files[n % 2]), 1.0), swaps)
        start = resident()
        for number in range(many):
            mount.use(made[number % 2], 1.0)
        row["grown_bytes"] = {"swaps": many, "bytes": resident() - start}
        mount.release()
        row["exact"] = exact(base, before)
        parts: dict[str, Any] = {**base.parts, "vae": base.frozen["vae"], "tokenizer": base.tokenizer}  # type: ignore[attr-defined]
        pipeline = StableDiffusionPipeline(
            **parts, scheduler=base.make_scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip

        def plain(number: int) -> None:
            pipeline.unload_lora_weights()
            pipeline.load_lora_weights(files[number % 2])

        row["diffusers"] = seconds_of(plain, max(3, swaps // 20))
    for way in ("here", "here_with_file"):
        row[f"{way}_ratio"] = row[way]["median"] / row["diffusers"]["median"]
    text = json.dumps({**origin(base.device), **row}, indent=1)
    click.echo(text)
    if output:
        write_atomically(output, lambda file: file.write_text(text + "\n"), overwrite=True)


if __name__ == "__main__":
    main()
