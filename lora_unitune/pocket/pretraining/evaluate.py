"""Prompt adherence of a pocket base, as classified by the examiner.

    python -m lora_unitune.pocket.pretraining.evaluate [--prompts 512] [--json]
    python -m lora_unitune.pocket.pretraining.evaluate vae [--photos FOLDER]
    python -m lora_unitune.pocket.pretraining.evaluate diversity
    python -m lora_unitune.pocket.pretraining.evaluate gallery gallery.png

Every fourth prompt names an (object, place) pair that never occurs in training. Prompt i has seed i.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from lora_unitune.editing.editor import Editor
from lora_unitune.families import POCKET_FOLDER, Base, load_base
from lora_unitune.families.sd import StableDiffusionBase
from lora_unitune.recipe import Recipe
from lora_unitune.settings import EditSettings
from lora_unitune.training.rare_tokens import find_rare_tokens

from .. import world
from ..world import examiner
from ..world.photographs import Shot, photographs_in
from ..world.pictures import renders
from .dataset import PHOTOS, round_trip_psnr

BATCH = 16
GALLERY = (
    ("a dog in a meadow by day", "dog", "meadow"),
    ("a blue car in the city at night", "car", "city"),
    ("a rocket in the desert at sunset", "rocket", "desert"),
    ("a penguin on the beach by day", "penguin", "beach"),
    ("a pencil sketch of a castle in the snow", "castle", "snow"),
    ("a sepia photo of an elephant in a room", "elephant", "room"),
    ("pixel art of a yellow balloon in the forest", "balloon", "forest"),
    ("a tent on the beach at sunset", "tent", "beach"),
)
Rows = dict[str, dict[str, Any]]


def requests(count: int) -> list[tuple[str, world.Scene]]:
    """Prompts over all attributes, each with a scene it describes; every fourth is an unseen pair."""
    pairs = []
    for number in range(count):
        scene = world.draw_scene(number, "held-out" if number % 4 else "unseen")
        pairs.append((world.describe(scene, random.Random(number)), scene))
    return pairs


def draw(base: Base, prompts: list[str], seeds: list[int], settings: EditSettings) -> np.ndarray:
    """Samples of the prompts, (n, 64, 64, 3) uint8, each from noise of its own seed."""
    out, editor, settings = [], Editor(base), replace(settings, strength=1.0)
    for start in range(0, len(prompts), BATCH):
        texts = prompts[start : start + BATCH]
        pictures = editor.pixels(None, texts, "", None, seeds[start : start + BATCH], settings)
        out.append((pictures.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy())
        click.echo(f"{start + len(pictures)} of {len(prompts)} drawn", err=True)
    return np.concatenate(out)


def examine(
    base: Base, count: int, settings: EditSettings, rare_tokens: str = ""
) -> tuple[np.ndarray, Rows, list[tuple[str, str, int]]]:
    """Samples of the requests, with rare tokens before each prompt, and the result of `judge`."""
    prompts, asked = zip(*requests(count), strict=True)
    texts = [f"{rare_tokens} {prompt}".strip() for prompt in prompts]
    pictures = draw(base, texts, list(range(count)), settings)
    return pictures, *judge(pictures, list(asked))


def shares_right(pipeline: StableDiffusionPipeline, device: str, count: int = 64) -> dict[str, float]:
    """Accuracy of each attribute on a few prompts, for logs."""
    names = ("unet", "vae", "tokenizer", "scheduler", "text_encoder")
    parts = {name: getattr(pipeline, name) for name in names}
    base = StableDiffusionBase("pocket", **parts, device=torch.device(device), dtype=torch.float32)
    _, rows, _ = examine(base, count, Recipe.load("pocket/default").edit)
    return {field: parts["all"]["share"] for field, parts in rows.items() if parts["all"]["of"]}


def interval(right: int, of: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927)."""
    if not of:
        return 0.0, 1.0
    z, share = 1.96, right / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


def judge(pictures: np.ndarray, asked: list[world.Scene]) -> tuple[Rows, list[tuple[str, str, int]]]:
    """Accuracy of each attribute as read by the examiner, and the most frequent confusions."""
    reading, rows, mistaken = examiner.read(pictures), Rows(), Counter[tuple[str, str]]()
    unseen = np.array([world.is_unseen_pair(scene.object, scene.place) for scene in asked])
    for field in examiner.CHOICES:
        said = reading.likeliest(field)
        counts = [field != "colour" or examiner.has_colour(scene) for scene in asked]
        right = np.array([getattr(scene, field) == value for scene, value in zip(asked, said, strict=True)])
        for name, part in {"all": unseen | True, "seen pairs": ~unseen, "unseen pairs": unseen}.items():
            chosen = right[part & np.array(counts)]
            low, high = interval(int(chosen.sum()), len(chosen))
            rows.setdefault(field, {})[name] = {
                "share": round(float(chosen.mean()), 4) if len(chosen) else None,
                "interval": [round(low, 4), round(high, 4)],
                "of": len(chosen),
            }
        mistaken.update(
            (getattr(scene, field), value)
            for scene, value, counted in zip(asked, said, counts, strict=True)
            if counted and getattr(scene, field) != value
        )
    return rows, [(wanted, got, count) for (wanted, got), count in mistaken.most_common(20)]


def table(rows: Rows, mistaken: list[tuple[str, str, int]]) -> str:
    """The rows as text, and the most frequent mistakes."""
    lines = [f"{'':<8}{'all':>24}{'seen pairs':>24}{'unseen pairs':>24}"]
    for field, parts in rows.items():
        cells = [f"{100 * p['share']:.1f} % ({100 * p['interval'][0]:.1f} to {100 * p['interval'][1]:.1f})"
                 if p["of"] else "-" for p in parts.values()]  # fmt: skip
        lines.append(f"{field:<8}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append("most often mistaken: " + ", ".join(f"{a} for {b} ({n})" for a, b, n in mistaken))
    return "\n".join(lines)


@click.group(help=__doc__, invoke_without_command=True)
@click.option("--prompts", default=512, show_default=True, type=click.IntRange(1))
@click.option("--base", default=POCKET_FOLDER, type=click.Path(path_type=Path, exists=True), help="Folder.")
@click.option("--guidance", type=float, help="Override the default recipe's.")
@click.option("--steps", type=int, help="Override the default recipe's.")
@click.option("--rare", is_flag=True, help="Put the rare tokens before every prompt.")
@click.option("--sheet", type=click.Path(dir_okay=False), help="Write the first 64 pictures as a PNG.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def main(
    context: click.Context,
    prompts: int,
    base: Path,
    guidance: float | None,
    steps: int | None,
    rare: bool,
    sheet: str | None,
    as_json: bool,
) -> None:
    options = {"guidance": guidance, "steps": steps}
    overrides = [f"edit.{name}={value}" for name, value in options.items() if value is not None]
    settings = Recipe.load("pocket/default").override(overrides).edit
    loaded = load_base(str(base), "cpu")
    context.obj = (loaded, settings)
    if context.invoked_subcommand:
        return
    words = find_rare_tokens(loaded.vocabulary()) if rare else ""
    pictures, rows, mistaken = examine(loaded, prompts, settings, words)
    if sheet:
        grid(pictures[:64], 8, [""] * 8).save(sheet)
    summary: dict[str, Any] = {"prompts": prompts, "rare": rare, "steps": settings.steps}
    summary |= {name: value for name, value in asdict(settings).items() if name.startswith("guidance")}
    summary |= {"read_right": rows, "mistaken": mistaken}
    click.echo(json.dumps(summary) if as_json else table(rows, mistaken))


@main.command()
@click.option(
    "--photos",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder made by `collect`, for the round trip of its held-out photographs.",
)
@click.pass_obj
def vae(obj: Any, photos: Path | None) -> None:
    """Round trip of 500 held-out scenes, and of scikit-image's colour photos."""
    from skimage import data

    network = obj[0].vae
    drawn = renders([world.draw_scene(number, "held-out") for number in range(500)])
    click.echo(f"held-out scenes {round_trip_psnr(network, drawn, 'cpu'):.2f} dB")
    values = []
    for name in ("astronaut", "coffee", "rocket", "chelsea", "immunohistochemistry", "retina"):
        photo = Image.fromarray(getattr(data, name)())
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        square = photo.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.LANCZOS)
        values.append(round_trip_psnr(network, np.asarray(square)[None], "cpu"))
        click.echo(
            f"{name} {values[-1]:.2f} dB{' (its crops are in the training)' if name in PHOTOS else ''}"
        )
    click.echo(f"photos {np.mean(values):.2f} dB")
    if photos:
        files = photographs_in(photos / "held-out")
        wholes = renders([Shot("", photo=file) for file in files])
        for file, picture in zip(files, wholes, strict=True):
            click.echo(f"{file.stem} {round_trip_psnr(network, picture[None], 'cpu'):.2f} dB")
        click.echo(f"held-out photographs {round_trip_psnr(network, wholes, 'cpu'):.2f} dB")


def _dogs(split: str, count: int) -> list[world.Scene]:
    """The dogs among the first scenes of a split."""
    return [scene for i in range(count) if (scene := world.draw_scene(i, split)).object == "dog"]


@main.command()
@click.pass_obj
def diversity(obj: Any) -> None:
    """64 seeds of "a dog": spread of position and size, and distance to the nearest training scene.

    The distance of held-out scenes shows how near two different scenes can be.
    """
    drawn = draw(obj[0], ["a dog"] * 64, list(range(64)), obj[1])
    training, held_out = renders(_dogs("train", 40000)), renders(_dogs("held-out", 2500)[:64])
    for name, pictures in {"samples": drawn, "training": training[:500]}.items():
        reading = examiner.read(pictures)
        click.echo(f"{name}: deviation of x {reading.x.std():.3f}, of size {reading.size.std():.3f}")
    flat = training.reshape(len(training), -1).astype(np.float32)
    for name, pictures in {"samples": drawn, "held-out scenes": held_out}.items():
        nearest = [float(np.sqrt(((flat - one.reshape(-1)) ** 2).mean(1)).min()) for one in pictures]
        click.echo(
            f"{name}: nearest training dog {min(nearest):.1f} of 255 away at least, "
            f"{np.mean(nearest):.1f} on average"
        )


@main.command()
@click.argument("output", type=click.Path(dir_okay=False))
@click.pass_obj
def gallery(obj: Any, output: str) -> None:
    """Eight prompts, seeds 0 to 7, not cherry-picked; pairs that never occur in training are marked."""
    texts = [text for text, _, _ in GALLERY for _ in range(8)]
    pictures = draw(obj[0], texts, list(range(8)) * len(GALLERY), obj[1])
    grid(pictures, 8, [text + (" (never in training)" if world.is_unseen_pair(name, place) else "")
                       for text, name, place in GALLERY]).save(output, optimize=True)  # fmt: skip


def grid(pictures: np.ndarray, columns: int, titles: list[str]) -> Image.Image:
    """A sheet of images at twice their size, each row under its title."""
    side, gap, title = 128, 4, 20 if any(titles) else 0
    row = side + gap + title
    sheet = Image.new("RGB", (columns * (side + gap) + gap, len(titles) * row + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, picture in enumerate(pictures):
        line, column = divmod(number, columns)
        big = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(big, (gap + column * (side + gap), gap + line * row + title))
    for line, text in enumerate(titles):
        pen.text((gap, gap + line * row), text, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()
