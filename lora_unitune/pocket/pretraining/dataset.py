"""Training data of pocket: rendered scenes cached on disk, photos, crops of both, and VAE reconstructions."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .. import world
from ..world.pictures import to_pixels

PHOTOS = ("astronaut", "coffee", "rocket")  # for the VAE only; the photo of the demo is not among them
PHOTO_SIDES = (72, 96, 128, 180, 256)  # pixels


def _draw(job: tuple[int, str]) -> np.ndarray:
    return np.asarray(world.render(world.draw_scene(*job)))


def scenes(work: Path, split: str, count: int) -> np.ndarray:
    """(count, 64, 64, 3) uint8, scene i is drawn with seed i; cached on disk."""
    file = work / f"scenes-{split}-{count}.npy"
    if not file.exists():
        with multiprocessing.Pool() as pool:
            pictures = list(pool.imap(_draw, [(seed, split) for seed in range(count)], chunksize=256))
        np.save(file, np.stack(pictures))
    stored: np.ndarray = np.load(file, mmap_mode="r")
    return stored


def _photo_crop(photos: list[np.ndarray], rng: random.Random, side: int) -> np.ndarray:
    photo = rng.choice(photos)
    y, x = (rng.randrange(length - side + 1) for length in photo.shape[:2])
    crop = photo[y : y + side, x : x + side]
    return crop[..., rng.sample(range(3), 3)] if rng.random() < 0.5 else crop


def crops(pictures: np.ndarray, photos: list[np.ndarray], batch: int, rng: random.Random) -> np.ndarray:
    """A batch of 32 × 32 crops: a quarter from photos, most others around a scene's object."""
    out = [_photo_crop(photos, rng, 32) for _ in range(batch // 4)]
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
