"""The same methods on real photos with prompts, in the layout of TEdBench or PIE-Bench."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lora_unitune.photo.framing import frame
from lora_unitune.photo.reading import load_photo

from .measures import psnr, ssim

Rows = list[dict[str, float]]
Score = Callable[[np.ndarray, np.ndarray, str], float]
"""(photo, edited), each (h, w, 3) uint8, and the prompt -> a number."""
PIE_SIDE = 512  # pixels; PIE-Bench's masks are run-length encoded over images of this side


@dataclass(frozen=True)
class FolderPair:
    """One edit of one photo out of a folder.

    Attributes:
        photo: Number of its photo; pairs of one photo share a fit.
        file: Path of the photo.
        prompt: Description of the edited image.
        runs: Runs of pixels that may change, (start, length, start, length, ...); empty if unknown.
    """

    photo: int
    file: Path
    prompt: str
    runs: tuple[int, ...] = ()

    @property
    def image(self) -> Path:
        """The photo."""
        return self.file

    def mask(self, side: int) -> np.ndarray | None:
        """(side, side) bool, the pixels that may change; None if unknown."""
        if not self.runs:
            return None
        flat = np.zeros(PIE_SIDE * PIE_SIDE, dtype=np.uint8)
        for start, length in zip(self.runs[::2], self.runs[1::2], strict=True):
            flat[start : start + length] = 255
        picture = Image.fromarray(flat.reshape(PIE_SIDE, PIE_SIDE)).resize((side, side))
        mask: np.ndarray = np.asarray(picture) > 127
        return mask


def read_folder(folder: Path, count: int) -> list[FolderPair]:
    """Reads the first `count` pairs of a folder, or all if it has fewer.

    PIE-Bench: `mapping_file.json` and the photos in `annotation_images/`. TEdBench: `input_list.json`, a list
    of objects with `img_name` and `target_text`, and the photos in `originals/`.

    Raises:
        click.UsageError: The folder has neither layout, or names a photo that doesn't exist.
    """
    pie, ted = folder / "mapping_file.json", folder / "input_list.json"
    edits: list[tuple[Path, str, tuple[int, ...]]]
    if pie.exists():
        entries = json.loads(pie.read_text()).values()
        edits = [
            (
                folder / "annotation_images" / e["image_path"],
                _plain(e["editing_prompt"]),
                tuple(e.get("mask", ())),
            )
            for e in entries
        ]
    elif ted.exists():
        edits = [
            (folder / "originals" / e["img_name"], e["target_text"], ()) for e in json.loads(ted.read_text())
        ]
    else:
        raise click.UsageError(
            f"{folder} has neither mapping_file.json (PIE-Bench) nor input_list.json (TEdBench)"
        )
    for file, _, _ in edits:
        if not file.is_file():
            raise click.UsageError(f"{folder} names {file.name}, which isn't in {file.parent}")
    numbers = {file: number for number, file in enumerate(dict.fromkeys(file for file, _, _ in edits))}
    pairs = [FolderPair(numbers[file], file, prompt, runs) for file, prompt, runs in edits]
    return sorted(pairs, key=lambda pair: pair.photo)[:count]


def _plain(prompt: str) -> str:
    """The prompt without the square brackets that mark PIE-Bench's changed words."""
    return prompt.replace("[", "").replace("]", "")


def load_scores(clip: str, dino: str) -> tuple[dict[str, Score], list[str]]:
    """The scores whose weights are available, and a sentence for each that isn't."""
    scores: dict[str, Score] = {}
    missing = []
    for name, load in {
        "clip_text": lambda: _clip(clip),
        "dino_photo": lambda: _dino(dino),
        "lpips_photo": _lpips,
    }.items():
        try:
            scores[name] = load()
        except Exception as error:  # each library raises its own errors for unavailable weights
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            missing.append(f"{name} is left out: {reason[:200]}")
    return scores, missing


def _clip(name: str) -> Score:
    """Cosine similarity between image and prompt (arXiv 2104.08718, without its factor)."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(name, use_safetensors=True).eval()
    processor = CLIPProcessor.from_pretrained(name)

    @torch.no_grad()
    def score(photo: np.ndarray, edited: np.ndarray, prompt: str) -> float:
        inputs = processor(
            text=[prompt], images=Image.fromarray(edited), return_tensors="pt", truncation=True
        )
        made = model(**inputs)
        return float(F.cosine_similarity(made.image_embeds, made.text_embeds)[0])

    return score


def _dino(name: str) -> Score:
    """Cosine similarity between photo and edited image in DINO's features (arXiv 2208.12242, section 4.2)."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(name, use_safetensors=True).eval()
    processor = AutoImageProcessor.from_pretrained(name)

    @torch.no_grad()
    def score(photo: np.ndarray, edited: np.ndarray, prompt: str) -> float:
        images = [Image.fromarray(picture) for picture in (photo, edited)]
        first, second = model(**processor(images=images, return_tensors="pt")).last_hidden_state[:, 0]
        return float(F.cosine_similarity(first, second, dim=0))

    return score


def _lpips() -> Score:
    """Perceptual distance between photo and edited image (arXiv 1801.03924)."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()

    @torch.no_grad()
    def score(photo: np.ndarray, edited: np.ndarray, prompt: str) -> float:
        first, second = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 255 for p in (photo, edited))
        return float(network(first, second))

    return score


def measure_folder(pairs: Sequence[FolderPair], pictures: np.ndarray, scores: dict[str, Score]) -> Rows:
    """Scores of edited images (n, h, w, 3) uint8; PSNR and SSIM to the photo outside of the mask."""
    rows = []
    for pair, edited in zip(pairs, pictures, strict=True):
        photo = np.asarray(frame(load_photo(pair.file), edited.shape[1::-1]).image)
        row = {name: score(photo, edited, pair.prompt) for name, score in scores.items()}
        mask = pair.mask(len(edited))
        keep = ~mask if mask is not None else np.ones(edited.shape[:2], dtype=bool)
        inside = np.where(keep[..., None], edited, photo) / 255.0
        row["psnr_outside"] = (
            psnr(((inside - photo / 255.0) ** 2)[keep].mean()) if keep.any() else float("nan")
        )
        row["ssim_outside"] = float(ssim(inside, photo / 255.0)[keep].mean()) if keep.any() else float("nan")
        rows.append(row)
    return rows
