"""Trains the pocket base from scratch: scenes, then VAE, then text encoder and UNet.

    python -m lora_unitune.pocket.pretraining.pretrain all WORK_FOLDER
    python -m lora_unitune.pocket.pretraining.pretrain export WORK_FOLDER lora_unitune/pocket/weights

Every stage saves checkpoints in the work folder, and resumes from them when it is run again. Its learning rate
follows the share of its minutes that is used up. `export` may run at any time. The defaults train a base from
scratch, on drawn scenes; the shipped weights were trained further from it, see their PROVENANCE.md. On photographs
too, in a folder made by `collect`:

    python -m lora_unitune.pocket.pretraining.pretrain all WORK_FOLDER --photos FOLDER --start WEIGHTS_FOLDER
"""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextModel

from ...families.schedule import NoiseSchedule
from .. import world
from ..world.pictures import to_pixels
from . import evaluate
from .assembly import (
    assemble,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save_pipeline,
)
from .dataset import (
    CaptionBatches,
    Photographs,
    crops,
    latents,
    load_vae,
    photos_of_skimage,
    round_trips,
    scale_of,
    scenes,
)
from .lessons import Observer, pose_and_sun_loss, poses_and_suns, teach_words, tokens
from .muon import Muon
from .provenance import commit, copy_logs, write_provenance
from .stage import Average, Stage

READ = {"torch_dtype": torch.float32, "use_safetensors": True}
HELD_OUT = 256  # scenes for the losses in the log, and photographs; fewer if fewer are trained on
LOG_EVERY = 50_000  # pictures between two rows of the UNet's log; each second has the examiner's scores
WORKERS = 8  # processes that write captions for a GPU


def _half(device: str) -> torch.autocast:
    """bf16 where the device computes in it, else plain float32 (a CPU without it is 30 × slower)."""
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=fast)


def train_vae(
    work: Path, count: int, minutes: float, device: str, start: Path | None, photos: Photographs | None
) -> None:
    """The autoencoder: absolute and squared error, and a small KL penalty of the latents to a unit Gaussian."""
    torch.manual_seed(0)
    train, tested = scenes(work, "train", count), min(HELD_OUT, count)
    held_out = {"psnr": scenes(work, "held-out", tested)}
    others, share, rng = photos_of_skimage(), 0.25, random.Random(0)
    if photos:
        others, share = list(photos.pictures(work, "train", photos.count(count))), photos.share
        held_out["photo_psnr"] = photos.unedited(tested)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    stage = Stage(work, "vae", minutes, 1e-3 if start else 2e-3, 0.6)
    if start and not stage.file.exists():
        vae.load_state_dict(AutoencoderKL.from_pretrained(start / "vae", **READ).state_dict())
        stage.continue_counting()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = Average({"vae": vae}, 0.999)
    things = {"vae": vae, "optimizer": optimizer, "average": average}
    stage.resume(things)
    losses: list[float] = []
    while stage.tick([optimizer], 16):
        true = to_pixels(crops(train, others, share, 16, rng), device)
        with _half(device):
            posterior = vae.encode(true).latent_dist
            again = vae.decode(posterior.sample()).sample
        error = again.float() - true
        gaussian = 0.5 * (
            posterior.mean.float().square() + posterior.var.float() - 1.0 - posterior.logvar.float()
        )
        loss = error.abs().mean() + 4.0 * error.square().mean() + 1e-4 * gaussian.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        losses.append(loss.item())
        if stage.step % 1000 == 0:
            stage.log(loss=float(np.mean(losses)), **round_trips(average.kept["vae"], held_out, device))
            losses.clear()
        stage.save(things, every=60)
    stage.log(**round_trips(average.kept["vae"], held_out, device))
    stage.save(things)


def weights_of_timesteps(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """min(SNR + 1, 6) / (SNR + 1): min-SNR (arXiv 2303.09556) for v-prediction, 1 at zero signal."""
    return (6.0 * (1.0 - alphas_cumprod[timesteps])).clamp(max=1.0)


def concentrate(timesteps: Tensor) -> Tensor:
    """Maps uniform timesteps, 0 to 999, so that 15 % lie below 350 and 20 % above 800.

    Between the two, an object's position and facing can be inferred only from all of its few hundred noisy latents
    together, which a small model learns last. Below, they are visible. Above, they follow from the caption, or from
    their frequencies where the caption doesn't mention them.
    """
    shares = np.interp(timesteps.numpy() / 1000, (0.0, 0.15, 0.8, 1.0), (0.0, 0.35, 0.8, 1.0))
    return torch.from_numpy(shares * 1000).long()


def object_weights(drawn: list[world.Scene], side: int) -> Tensor:
    """Weights of the loss over each latent, (n, 1, side, side), mean 1: four times as much around the object.

    Applied only at timesteps at which the object is visible: see `where_seen`.
    """
    weights = torch.ones(len(drawn), 1, side, side)
    for weight, scene in zip(weights, drawn, strict=True):
        if not scene.object:
            continue
        bottom = 0.8 if scene.object == "balloon" else 0.93
        left, right = side * (scene.x - scene.size / 2), side * (scene.x + scene.size / 2)
        top = side * max(0.0, bottom - 0.08 - scene.size)
        weight[:, int(top) : math.ceil(side * bottom), max(0, int(left)) : math.ceil(right)] = 4.0
    return weights / weights.mean((1, 2, 3), keepdim=True)


def where_seen(weights: Tensor, timesteps: Tensor) -> Tensor:
    """Keeps weights (b, 1, h, w) up to timestep 250, and interpolates them to 1 at 450.

    Where the noise hides the object, weights that follow it would count scenes in which it covers a position four
    times, and the others once: the optimal prediction would show it too large, and in several positions.
    """
    share = ((450 - timesteps.float()) / 200).clamp(0, 1).view(-1, 1, 1, 1)
    return 1 + share * (weights - 1)


def earlier_unet(folder: Path, wanted: int) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, which has to have the wanted number of layers per block."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **READ)
    layers = unet.config["layers_per_block"]
    if layers != wanted:
        raise click.ClickException(
            f"the UNet of {folder} has {layers} layers per block, this one {wanted}; "
            "give a folder whose UNet has as many"
        )
    return unet


@torch.no_grad()
def held_out_errors(
    drawn: list[world.Scene], clean: Tensor, average: Average, tokenizer: Any, device: str
) -> dict[str, float]:
    """Mean squared error of the predicted clean latents with the right caption, none, and a wrong one."""
    alphas, count = build_scheduler().alphas_cumprod.to(device), len(drawn)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
    steps = (torch.arange(count) * 1000 // count).to(device)
    schedule = NoiseSchedule.diffusion(alphas, "v_prediction")
    noisy, a = schedule.add_noise(clean, noise, steps), alphas[steps].view(-1, 1, 1, 1)
    texts = [world.caption(scene, random.Random(i + 10**6)) for i, scene in enumerate(drawn)]
    errors = {}
    for name, captions in {"right": texts, "none": [""] * count, "wrong": texts[7:] + texts[:7]}.items():
        embedded = average.kept["text_encoder"](tokens(tokenizer, captions).to(device)).last_hidden_state
        v = average.kept["unet"](noisy, steps, embedded).sample
        errors[name] = (a.sqrt() * noisy - (1 - a).sqrt() * v - clean).square().mean().item()
    return errors


def train_unet(
    work: Path,
    count: int,
    minutes: float,
    device: str,
    batch: int,
    peak: float,
    start: Path | None,
    photos: Photographs | None,
) -> None:
    """UNet and text encoder together (from a start, the UNet alone), on latents from the VAE's posteriors."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    drawn, mean, std = latents(work, "train", count, device)
    scale, tested = scale_of(mean), min(HELD_OUT, count)
    held_out = {"": latents(work, "held-out", tested, device)}
    if photos:
        shots = latents(work, "train", photos.count(count), device, photos)
        drawn, mean, std = drawn + shots[0], torch.cat([mean, shots[1]]), torch.cat([std, shots[2]])
        held_out["photo_"] = latents(work, "held-out", tested, device, photos)
    encoder = build_text_encoder(tokenizer).to(device).train()
    unet = build_unet().to(device, memory_format=torch.channels_last).train()
    if device == "cpu":  # where the fused attention's backward pass takes a quarter of a step
        unet.set_attn_processor(AttnProcessor())
    stage = Stage(work, "unet", minutes, peak, 0.5)
    if start and not stage.file.exists():
        unet.load_state_dict(earlier_unet(start, unet.config["layers_per_block"]).state_dict())
        encoder.load_state_dict(CLIPTextModel.from_pretrained(start / "text_encoder").state_dict())
        stage.continue_counting()
    elif not stage.file.exists():
        stage.log(words_loss=teach_words(encoder, tokenizer, drawn, stage.budget / 67, device))
    encoder.requires_grad_(not start)  # it is trained already; the auxiliary loss below would make it forget
    parameters = [p for p in (*unet.parameters(), *encoder.parameters()) if p.requires_grad]
    average = Average({"unet": unet, "text_encoder": encoder}, 0.999)
    observer = Observer(unet).to(device)
    ends = (*unet.conv_in.parameters(), *unet.conv_out.parameters())
    inner = [p for p in unet.parameters() if p.ndim > 1 and all(p is not end for end in ends)]
    others = [p for p in parameters if all(p is not matrix for matrix in inner)]
    others += observer.head.parameters()
    muon = Muon(inner, lr=peak, weight_decay=1e-2)
    adam = torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    things = {"unet": unet, "text_encoder": encoder, "muon": muon, "adam": adam, "average": average}
    things["head"] = observer.head
    stage.resume(things)
    alphas, around = build_scheduler().alphas_cumprod.to(device), object_weights(drawn, mean.shape[-1])
    schedule = NoiseSchedule.diffusion(alphas, "v_prediction")
    mean, std, around, labels = (t.to(device) for t in (mean, std, around, poses_and_suns(drawn)))
    generator = torch.Generator().manual_seed(stage.step)
    noises = torch.Generator(device).manual_seed(10**6 + stage.step)
    losses, seen = list[float](), list[float]()

    def errors() -> dict[str, float]:
        out = dict[str, float]()
        for prefix, (asked, clean, _) in held_out.items():
            scaled = (clean.float() * scale).to(device)
            found = held_out_errors(asked, scaled, average, tokenizer, device)
            out |= {prefix + name: error for name, error in found.items()}
        return out

    ready = CaptionBatches(drawn, tokenizer, batch, stage.step)
    batches = iter(DataLoader(ready, batch_size=None, num_workers=0 if device == "cpu" else WORKERS))
    while stage.tick([muon, adam], batch):
        chosen, ids = (t.to(device) for t in next(batches))
        noise = torch.randn((2, batch, *mean.shape[1:]), generator=noises, device=device)
        clean = (mean[chosen].float() + std[chosen].float() * noise[0]) * scale
        steps = concentrate(schedule.draw(batch, generator)).to(device)
        noisy = schedule.add_noise(clean, noise[1], steps)
        with _half(device):  # never compiled: with torch 2.13, half of the UNet got no gradient at all
            embedded = encoder(ids).last_hidden_state
            v, names = observer(noisy.to(memory_format=torch.channels_last), steps, embedded)
        target = schedule.target(clean, noise[1], steps)
        error = (v.float() - target).square() * where_seen(around[chosen], steps)
        loss = (error.mean((1, 2, 3)) * weights_of_timesteps(steps, alphas)).mean()
        auxiliary, recognized = pose_and_sun_loss(names.float(), labels[chosen])
        muon.zero_grad()
        adam.zero_grad()
        (loss + 0.3 * auxiliary).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        average.update()
        losses.append(loss.item())
        seen += recognized[(steps >= 500) & (steps < 800) & (labels[chosen, 0] >= 0)].tolist()
        rows = stage.pictures // LOG_EVERY
        if rows > (stage.pictures - batch) // LOG_EVERY:
            row = {"pose": float(np.mean(seen))} | errors()
            if rows % 2 == 0:
                row |= evaluate.shares_right(pipeline_of(work, scale, average.kept, tokenizer), device)
            stage.log(loss=float(np.mean(losses)), **row)
            losses.clear()
            seen.clear()
        stage.save(things, every=120)
    stage.log(**errors())
    stage.save(things)


def pipeline_of(work: Path, scale: float, kept: dict[str, Any], tokenizer: Any) -> StableDiffusionPipeline:
    """A copy of the current weights as a pipeline on the CPU, in float32."""
    vae = load_vae(work)
    vae.register_to_config(scaling_factor=scale)
    parts = {name: copy.deepcopy(part).cpu() for name, part in kept.items()}
    return assemble({"vae": vae, "tokenizer": tokenizer, **parts})


def export(work: Path, folder: Path, count: int) -> None:
    """Writes the averaged weights as a diffusers pipeline folder."""
    made_at, tokenizer = commit(), build_tokenizer()
    kept = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    state = torch.load(work / "unet.pt", map_location="cpu", weights_only=True)["average"]["kept"]
    for name, part in kept.items():
        part.load_state_dict(state[name])
    scale = scale_of(latents(work, "train", count, "cpu")[1])
    save_pipeline(pipeline_of(work, scale, kept, tokenizer), folder)
    copy_logs(work, folder)
    write_provenance(folder, count, made_at)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("all")
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--scenes", "count", default=40000, show_default=True, help="Training scenes to draw.")
@click.option("--vae-minutes", default=25.0, show_default=True)
@click.option("--unet-minutes", default=92.0, show_default=True)
@click.option("--batch", default=64, show_default=True, help="Batch size of the UNet.")
@click.option("--peak", default=1e-3, show_default=True, help="Peak learning rate of the UNet.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--photos",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of photographs, made by `collect`, to train on as well.",
)
@click.option(
    "--share",
    default=0.45,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the pictures that are of --photos.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True),
    help="Folder of earlier weights to train further: the VAE (unless its minutes are 0) and the UNet.",
)
def run_all(
    work: Path,
    count: int,
    vae_minutes: float,
    unet_minutes: float,
    batch: int,
    peak: float,
    device: str,
    folder: Path | None,
    share: float,
    start: Path | None,
) -> None:
    """Renders the scenes and runs every stage, resuming from checkpoints."""
    work.mkdir(parents=True, exist_ok=True)
    scenes(work, "train", count)
    photos = Photographs(folder, share) if folder else None
    if start and not (work / "vae.jsonl").exists():
        copy_logs(start, work)
    train_vae(work, count, vae_minutes, device, start, photos)
    train_unet(work, count, unet_minutes, device, batch, peak, start, photos)


@main.command("export")
@click.argument("work", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scenes", "count", default=40000, show_default=True)
def run_export(work: Path, folder: Path, count: int) -> None:
    """Writes the latest weights as a diffusers pipeline."""
    export(work, folder, count)


if __name__ == "__main__":
    main()
