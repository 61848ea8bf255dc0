"""Training data of pocket: rendered scenes cached on disk, crops, captions, latents and VAE reconstructions."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .. import world
from ..world.photographs import draw_shot, photographs_in, unedited
from ..world.pictures import renders, to_pixels
from .assembly import build_vae, rare_words
from .lessons import tokens

PHOTOS = ("astronaut", "coffee", "rocket")  # for the VAE only; the photo of the demo is not among them
PHOTO_SIDES = (72, 96, 128, 180, 256)  # pixels


def _render(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.render(scene))


def _rendered(file: Path, drawn: Iterable[world.Scene]) -> np.ndarray:
    """(n, 64, 64, 3) uint8; cached on disk."""
    if not file.exists():
        with multiprocessing.Pool() as pool:
            pictures = list(pool.imap(_render, drawn, chunksize=256))
        np.save(file, np.stack(pictures))
    stored: np.ndarray = np.load(file, mmap_mode="r")
    return stored


def scenes(work: Path, split: str, count: int) -> np.ndarray:
    """(count, 64, 64, 3) uint8, scene i is drawn with seed i; cached on disk."""
    drawn = (world.draw_scene(seed, split) for seed in range(count))
    return _rendered(work / f"scenes-{split}-{count}.npy", drawn)


@dataclass(frozen=True)
class Photographs:
    """Photographs beside the scenes.

    Attributes:
        folder: Folder with "train" and "held-out".
        share: Share of the pictures that are photographs.
    """

    folder: Path
    share: float

    def count(self, scenes: int) -> int:
        """The number of pictures of them beside so many scenes."""
        return round(scenes * self.share / (1 - self.share))

    def drawn(self, split: str, count: int) -> list[world.Scene]:
        """Shots of a split, shot i is drawn with seed i."""
        photos = photographs_in(self.folder / split)
        return [draw_shot(seed, photos) for seed in range(count)]

    def pictures(self, work: Path, split: str, count: int) -> np.ndarray:
        """(count, 64, 64, 3) uint8; cached on disk."""
        return _rendered(work / f"photographs-{split}-{count}.npy", self.drawn(split, count))

    def unedited(self, count: int) -> np.ndarray:
        """Held-out crops as they were taken, (count, 64, 64, 3) uint8."""
        photos = photographs_in(self.folder / "held-out")
        return renders([unedited(draw_shot(seed, photos)) for seed in range(count)])


def _photo_crop(photos: Sequence[np.ndarray], rng: random.Random, side: int) -> np.ndarray:
    photo = rng.choice(photos)
    y, x = (rng.randrange(length - side + 1) for length in photo.shape[:2])
    crop = photo[y : y + side, x : x + side]
    return crop[..., rng.sample(range(3), 3)] if rng.random() < 0.5 else crop


def crops(
    pictures: np.ndarray, photos: Sequence[np.ndarray], share: float, batch: int, rng: random.Random
) -> np.ndarray:
    """A batch of 32 × 32 crops: a share of them from photos, most others around a scene's object."""
    out = [_photo_crop(photos, rng, 32) for _ in range(round(batch * share))]
    while len(out) < batch:
        number, x, y = rng.randrange(len(pictures)), rng.randrange(33), rng.randrange(33)
        if rng.random() < 0.65:
            scene = world.draw_scene(number)
            x = min(max(round(64 * scene.x) - 16 + rng.randint(-12, 12), 0), 32)
            y = min(max(round(64 * (0.88 - scene.size / 2)) - 16 + rng.randint(-12, 12), 0), 32)
        out.append(pictures[number, y : y + 32, x : x + 32])
    return np.stack(out)


def photos_of_skimage() -> list[np.ndarray]:
    """The photos at several sizes, each (h, w, 3) uint8."""
    from skimage import data

    whole = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOS]
    sized = [
        ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
        for image in whole
        for side in PHOTO_SIDES
    ]
    return [np.asarray(image) for image in sized]


@torch.no_grad()
def round_trip(vae: Any, pictures: np.ndarray, device: str) -> np.ndarray:
    """decode(encode(picture)) of pictures (n, h, w, 3) uint8, same shape and kind."""
    made = []
    for start in range(0, len(pictures), 32):
        true = to_pixels(pictures[start : start + 32], device)
        again = vae.decode(vae.encode(true).latent_dist.mode()).sample.clamp(-1, 1)
        made.append(((again + 1) * 127.5).round().permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy())
    return np.concatenate(made)


def round_trip_psnr(vae: Any, pictures: np.ndarray, device: str) -> float:
    """Mean PSNR in dB of the round trip over the pictures."""
    errors = (round_trip(vae, pictures, device).astype(np.float32) - pictures) / 255.0
    return float(np.mean(-10.0 * np.log10((errors**2).mean((1, 2, 3)))))


def round_trips(vae: Any, held_out: dict[str, np.ndarray], device: str) -> dict[str, float]:
    """`round_trip_psnr` of each set."""
    return {name: round_trip_psnr(vae, pictures, device) for name, pictures in held_out.items()}


def load_vae(work: Path) -> Any:
    """The averaged weights of the VAE that is trained in a work folder."""
    vae = build_vae().eval().requires_grad_(False)
    vae.load_state_dict(
        torch.load(work / "vae.pt", map_location="cpu", weights_only=True)["average"]["kept"]["vae"]
    )
    return vae


@torch.no_grad()
def latents(
    work: Path, split: str, count: int, device: str, photos: Photographs | None = None
) -> tuple[list[world.Scene], Tensor, Tensor]:
    """The scenes of a split, or shots of photographs, with their latents; these are cached on disk.

    Returns:
        The scenes, and the means and deviations of their posteriors, (count, 4, 16, 16) float16.
    """
    file = work / f"latents-{'photographs-' if photos else ''}{split}-{count}.pt"
    if not file.exists():
        vae, pairs = load_vae(work).to(device), []
        pictures = photos.pictures(work, split, count) if photos else scenes(work, split, count)
        for start in range(0, count, 64):
            posterior = vae.encode(to_pixels(pictures[start : start + 64], device)).latent_dist
            pairs.append(torch.stack([posterior.mean, posterior.std]).half().cpu())
        torch.save(torch.cat(pairs, dim=1), file)
    mean, std = torch.load(file, weights_only=True)
    drawn = photos.drawn(split, count) if photos else [world.draw_scene(i, split) for i in range(count)]
    return drawn, mean, std


def scale_of(mean: Tensor) -> float:
    """The scaling factor: one over the deviation of the training scenes' latents."""
    return 1.0 / mean.float().std().item()


class CaptionBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless epochs of scene numbers (batch,) and tokens (batch, length) of fresh captions for them.

    Some captions have meaningless rare words prepended. Each worker process shuffles on its own.
    """

    def __init__(self, drawn: list[world.Scene], tokenizer: Any, batch: int, seed: int) -> None:
        self.drawn, self.tokenizer, self.batch, self.seed = drawn, tokenizer, batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        rare, order = rare_words(), list(range(len(self.drawn)))
        while True:
            rng.shuffle(order)
            for start in range(0, len(order) - self.batch + 1, self.batch):
                chosen = order[start : start + self.batch]
                texts = [world.caption(self.drawn[i], rng) for i in chosen]
                for i in range(self.batch):
                    if rng.random() < 0.12:
                        texts[i] = " ".join([*rng.sample(rare, rng.randint(1, 3)), texts[i]]).strip()
                yield torch.tensor(chosen), tokens(self.tokenizer, texts)
