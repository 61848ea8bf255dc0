"""Trains the examiner on rendered scenes, and tests it on held-out ones.

    python -m lora_unitune.pocket.pretraining.train_examiner WORK_FOLDER --minutes 10

A quarter of the scenes go through pocket's VAE first (samples of pocket can't be sharper); generated
pictures are never among them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from ...families import POCKET_FOLDER
from .. import world
from ..world.examiner import CHOICES, FILE, Network, has_colour, load, read, run
from ..world.pictures import renders, to_pixels
from .dataset import round_trip, scenes
from .muon import Muon

IGNORED = -100
HELD_OUT = 1500
RATE = 3e-3


def labels(drawn: list[world.Scene]) -> tuple[Tensor, Tensor]:
    """Class index of each attribute, (n, 5) int64, and (x, size), (n, 2) float32."""
    columns = [[values.index(getattr(scene, field)) if field != "colour" or has_colour(scene) else IGNORED
                for scene in drawn] for field, values in CHOICES.items()]  # fmt: skip
    return torch.tensor(columns).T, torch.tensor([[scene.x, scene.size] for scene in drawn])


def _augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Augmentation: blurs half of the batches, and changes brightness and noise slightly, as a decoder might."""
    blur, light, noise = torch.rand(3, generator=generator).tolist()
    if blur < 0.5:
        small = F.interpolate(pictures, size=round(64 * (0.5 + blur)), mode="bilinear", antialias=True)
        pictures = F.interpolate(small, size=64, mode="bicubic")
    pictures = pictures * (0.9 + 0.2 * light)
    augmented: Tensor = pictures + 0.08 * noise * torch.randn(pictures.shape, generator=generator)
    return augmented


def score(network: Network, pictures: np.ndarray, drawn: list[world.Scene]) -> dict[str, float]:
    """Accuracy and expected calibration error of each attribute, and mean absolute errors of x and size."""
    reading, (numbers, places) = read(pictures, network), labels(drawn)
    scores: dict[str, float] = {}
    for column, (field, probabilities) in enumerate(reading.probabilities.items()):
        true = numbers[:, column].numpy()
        probabilities, true = probabilities[true != IGNORED], true[true != IGNORED]
        right, sure = probabilities.argmax(1) == true, probabilities.max(1)
        bins = np.minimum((sure * 10).astype(int), 9)
        gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean()
                for b in np.unique(bins)]  # fmt: skip
        scores |= {field: float(right.mean()), f"{field}_calibration": float(sum(gaps))}
    scores["x_error"] = float(np.abs(reading.x - places[:, 0].numpy()).mean())
    scores["size_error"] = float(np.abs(reading.size - places[:, 1].numpy()).mean())
    return {name: round(value, 4) for name, value in scores.items()}


def _fit_temperatures(network: Network, pictures: np.ndarray, drawn: list[world.Scene]) -> None:
    """Fits one temperature for each attribute, by maximum likelihood on held-out scenes (arXiv 1706.04599)."""
    numbers, _ = labels(drawn)
    for column, logits in enumerate(run(network, pictures)[0]):
        losses = {t: F.cross_entropy(logits / t, numbers[:, column], ignore_index=IGNORED).item()
                  for t in np.geomspace(0.3, 5.0, 60)}  # fmt: skip
        network.temperatures[column] = min(losses, key=lambda t: losses[t])


def _vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(
        POCKET_FOLDER / "vae", torch_dtype=torch.float32, use_safetensors=True
    )


def train(work: Path, count: int, minutes: float, batch: int = 64) -> Network:
    """Trains an examiner on the first `count` training scenes for some minutes, and calibrates it."""
    torch.manual_seed(0)
    pictures, drawn = scenes(work, "train", count), [world.draw_scene(seed) for seed in range(count)]
    numbers, places = labels(drawn)
    network = Network()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kernels = [p for p in network.parameters() if p.ndim == 4]
    others = [p for p in network.parameters() if p.ndim != 4]
    optimizers = Muon(kernels, lr=RATE, weight_decay=0.02), torch.optim.AdamW(others, lr=RATE)
    through_vae = round_trip(_vae(), pictures[: count // 4], "cpu")
    generator, started, used, step = torch.Generator().manual_seed(0), time.monotonic(), 0.0, 0
    while used < 1.0:
        for chosen in torch.randperm(count, generator=generator).split(batch):
            used, step = (time.monotonic() - started) / (60.0 * minutes), step + 1
            shown = [through_vae[i] if i < len(through_vae) else pictures[i] for i in chosen.tolist()]
            true = to_pixels(np.stack(shown), "cpu").to(memory_format=torch.channels_last)
            logits, place = network(_augmented(true, generator))
            losses = [F.cross_entropy(a, b, ignore_index=IGNORED, reduction="sum") / batch
                      for a, b in zip(logits, numbers[chosen].T, strict=True)]  # fmt: skip
            loss = torch.stack(losses).sum() + F.smooth_l1_loss(16.0 * place, 16.0 * places[chosen], beta=0.3)
            network.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = RATE * max(0.0, min(1.0, step / 200, (1.0 - used) / 0.6))
                optimizer.step()
            if step % 200 == 0:
                click.echo(f"step {step} loss {loss.item():.3f} used {used:.0%}", err=True)
            if used >= 1.0:
                break
    network.eval()
    network.requires_grad_(False)
    seeds = range(2 * HELD_OUT, 3 * HELD_OUT)
    held_out = [world.draw_scene(seed, "held-out") for seed in seeds]
    _fit_temperatures(network, renders(held_out), held_out)
    return network


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--scenes", "count", default=40000, show_default=True, help="Training scenes.")
@click.option("--minutes", default=10.0, show_default=True)
def main(work: Path, count: int, minutes: float) -> None:
    network = train(work, count, minutes)
    save_file({name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
               for name, tensor in network.state_dict().items()}, FILE)  # fmt: skip
    drawn = [world.draw_scene(seed, "held-out") for seed in range(HELD_OUT)]
    rendered = renders(drawn)
    summary = {"held_out": score(load(), rendered, drawn)}
    summary["after_vae"] = score(load(), round_trip(_vae(), rendered, "cpu"), drawn)
    click.echo(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
