"""What a fit and an edit cost, LoRA against full fine-tuning, on one machine in one run.

    python -m benchmarks.cost --base pocket -o benchmarks/results/cost-pocket.json
    python -m benchmarks.cost --base sd15 --resolution 256 --steps 3 -o benchmarks/results/cost-sd15.json

Every method runs in a process of its own, so that none inherits another's memory, and the methods take turns.
sd15 has the layout of Stable Diffusion 1.5 and random weights: cost doesn't depend on their values.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_unitune import Editor, Recipe, fit
from lora_unitune.families import POCKET_FOLDER, Base, load_base, resolve_device
from lora_unitune.families.sd import StableDiffusionBase
from lora_unitune.recipe import default_recipe

from .memory import Peak, of_adapter
from .origin import origin

METHODS = ("lora", "full")


def random_sd15(device: str) -> Base:
    """A base with the shapes of Stable Diffusion 1.5 (its UNet has 860 million weights), drawn at random."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(POCKET_FOLDER / "tokenizer", model_max_length=77)
    end = tokenizer.eos_token_id
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    target = resolve_device(device)
    return StableDiffusionBase(
        "sd15", unet, CLIPTextModel(text), vae, tokenizer, scheduler, target, torch.float32
    )


def measure(
    base_name: str, method: str, resolution: int, steps: int, batch: int, device: str
) -> dict[str, Any]:
    """Fits and edits once; seconds and bytes of each phase."""
    started = time.perf_counter()
    base = random_sd15(device) if base_name == "sd15" else load_base(base_name, device)
    row: dict[str, Any] = {"method": method, "load_base_seconds": time.perf_counter() - started}
    recipe = Recipe() if base_name == "sd15" else default_recipe(base.name, base.family)
    recipe = recipe.override([f"fit.method={method}", f"fit.steps={steps}", f"fit.batch_size={batch}",
                              f"photo.resolution={resolution}", "edit.steps=2"])  # fmt: skip
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    moments = [time.perf_counter()]
    peak = Peak()
    adapter = fit(photo, base=base, recipe=recipe, on_step=lambda *_: moments.append(time.perf_counter()))
    row |= {"fit_peak_bytes": peak.bytes(), "fit_seconds": time.perf_counter() - moments[0]}
    row["step_seconds"] = np.diff(moments)[1:].tolist()  # the first one has the preparation in it
    row |= of_adapter(adapter)
    peak = Peak()
    row["edit_step_seconds"] = Editor(base).edit(adapter, "a dog at night").seconds / 2
    return row | {"edit_peak_bytes": peak.bytes()}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of every number, by method; and the ratio of the medians, LoRA to full."""
    found: dict[str, Any] = {}
    for method in METHODS:
        of = [row for row in rows if row["method"] == method]
        for name in (key for key in of[0] if key != "method") if of else ():
            values = [v for row in of for v in (row[name] if isinstance(row[name], list) else [row[name]])]
            found.setdefault(name, {})[method] = {
                "median": float(np.median(values)), "least": min(values), "most": max(values)
            }  # fmt: skip
    for values in found.values():
        if len(values) == len(METHODS):
            values["ratio"] = values["lora"]["median"] / values["full"]["median"]
    return found


@click.command(help=__doc__)
@click.option("--base", default="pocket", show_default=True, type=click.Choice(["pocket", "sd15"]))
@click.option("--resolution", default=0, show_default=True, help="Of the photo; 0 is the base's own.")
@click.option("--steps", default=10, show_default=True, type=click.IntRange(2))
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1))
@click.option("--device", default="auto", show_default=True)
@click.option("--method", type=click.Choice(METHODS), help="Only this one, once, in this process.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False))
def main(
    base: str,
    resolution: int,
    steps: int,
    batch: int,
    rounds: int,
    device: str,
    method: str | None,
    output: Path | None,
) -> None:
    if method:
        click.echo(json.dumps(measure(base, method, resolution, steps, batch, device)))
        return
    command = [sys.executable, "-m", "benchmarks.cost", *sys.argv[1:], "--method"]
    rows = []
    for _ in range(rounds):
        for name in METHODS:
            done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
            if done.returncode:
                raise click.ClickException(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            click.echo(f"{name} done", err=True)
    settings = {"base": base, "resolution": resolution, "steps": steps, "batch": batch, "rounds": rounds}
    text = json.dumps({**origin(resolve_device(device)), **settings, "costs": summarise(rows)}, indent=1)
    click.echo(text)
    if output:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
