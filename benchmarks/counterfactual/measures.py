"""Metrics of edited images against the ground truth, and confidence intervals over pairs and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from skimage.metrics import structural_similarity

from lora_unitune.pocket import world
from lora_unitune.pocket.world import examiner, object_mask, render
from lora_unitune.pocket.world.sprites import OBJECTS

from .pairs import Pair

MEASURES = (
    "aligned", "preserved", "success", "same_thing", "psnr_outside", "ssim_outside", "psnr_truth", "ssim_truth"
)  # fmt: skip
LAYOUT_WORDS = {"x": "side", "size": "scale"}
LAYOUT_ERROR = 0.08  # of the width; objects stand 0.19 apart and their sizes differ by 0.125
SAME_THING = (
    0.8  # correlation; pocket's autoencoder alone loses it for three edits in ten, of finely drawn things
)
LARGEST_PSNR = 50.0  # dB; 8-bit pictures that differ by less than one step in most pixels


def psnr(error: float) -> float:
    return min(LARGEST_PSNR, float(-10 * np.log10(max(error, 1e-10))))


def ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Structural similarity at each pixel and channel (Wang et al., 2004)."""
    similarity: np.ndarray = structural_similarity(first, second, channel_axis=-1, data_range=1.0, full=True)[
        1
    ]
    return similarity


LUMINANCE = np.array([0.299, 0.587, 0.114])


def is_same_thing(edited: np.ndarray, true: np.ndarray, mask: np.ndarray) -> bool:
    """Whether an edit, (h, w, 3), shows the ground truth's object inside the object's pixels, (h, w) bool."""
    ours, theirs = edited[mask], true[mask]
    pairs = (ours @ LUMINANCE, theirs @ LUMINANCE), (ours.ravel(), theirs.ravel())
    return all(one.std() > 0 and np.corrcoef(one, other)[0, 1] > SAME_THING for one, other in pairs)


def shown(scene: world.Scene) -> dict[str, str]:
    """The attributes that are visible in a scene's image and read by the examiner."""
    hidden = {"object": scene.object not in OBJECTS, "colour": not examiner.has_colour(scene)}
    fields = [field for field in examiner.CHOICES if not hidden.get(field)]
    return {field: getattr(scene, field) for field in fields}


def measure(pairs: Sequence[Pair], pictures: np.ndarray) -> list[dict[str, float]]:
    """Measures each edited image, (n, 64, 64, 3) uint8, against its pair.

    aligned: the examiner reads the requested value; for a second object, which it can't read, the pixels inside
        the true mask are nearer to the ground truth than to the photo.
    preserved: every attribute that photo and ground truth share is read correctly, and so are the object's centre
        and size, to within `LAYOUT_ERROR` of the width.
        Of an unknown object, which the examiner can't read, `same_thing` is required instead.
    success: both.
    same_thing: inside the object's pixels the edit correlates above `SAME_THING` with the ground truth, in
        luminance (its shape and pattern) and in all color values together (its colors); NaN where the edit changes
        the object.
    psnr_outside, ssim_outside: to the photo, outside of the true mask; NaN if it covers everything.
    psnr_truth, ssim_truth: to the ground truth, everywhere.
    """
    reading, rows = examiner.read(pictures), []
    words = {field: reading.likeliest(field) for field in examiner.CHOICES}
    for i, (pair, picture) in enumerate(zip(pairs, pictures, strict=True)):
        photo, true = (np.asarray(render(s)) / 255.0 for s in (pair.before, pair.truth.scene))
        edited, mask = picture / 255.0, pair.truth.mask
        to_truth, to_photo = ((edited - other) ** 2 for other in (true, photo))
        before, after = shown(pair.before), shown(pair.truth.scene)
        seen = replace(pair.truth.scene, x=float(reading.x[i]), size=float(reading.size[i]))
        if pair.kind in after:
            aligned = words[pair.kind][i] == after[pair.kind]
        elif pair.kind == "companion":
            aligned = bool(to_truth[mask].mean() < to_photo[mask].mean())
        else:
            aligned = getattr(seen, LAYOUT_WORDS[pair.kind]) == getattr(
                pair.truth.scene, LAYOUT_WORDS[pair.kind]
            )
        preserved = all(
            words[field][i] == value for field, value in after.items() if before.get(field) == value
        )
        same_thing = float("nan")
        if pair.kind not in ("object", "colour", "x", "size"):
            same_thing = float(is_same_thing(edited, true, object_mask(pair.before)))
        if pair.before.object in OBJECTS:
            for field in {"x", "size"} - {pair.kind}:
                preserved &= abs(getattr(seen, field) - getattr(pair.before, field)) < LAYOUT_ERROR
        else:
            preserved &= bool(same_thing)
        outside = np.where(
            mask[..., None], photo, edited
        )  # so that pixels inside don't affect SSIM windows outside
        rows.append({
            "aligned": float(aligned),
            "preserved": float(preserved),
            "success": float(aligned and preserved),
            "same_thing": same_thing,
            "psnr_outside": psnr(to_photo[~mask].mean()) if (~mask).any() else float("nan"),
            "ssim_outside": float(ssim(outside, photo)[~mask].mean()) if (~mask).any() else float("nan"),
            "psnr_truth": psnr(to_truth.mean()),
            "ssim_truth": float(ssim(edited, true).mean()),
        })  # fmt: skip
    return rows


def interval(values: np.ndarray, rounds: int = 1000) -> tuple[float, float, float]:
    """Mean of (pairs, seeds) values without NaN, and its 95 % bootstrap interval over pairs and seeds."""
    if not np.isfinite(values).any():
        return (float("nan"),) * 3
    rng = np.random.default_rng(0)
    pairs, seeds = (rng.integers(size, size=(rounds, size, 1)) for size in values.shape)
    drawn = values[pairs, seeds.transpose(0, 2, 1)]
    kept = np.isfinite(drawn)
    counts = kept.sum((1, 2))
    means = np.where(kept, drawn, 0.0).sum((1, 2))[counts > 0] / counts[counts > 0]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.nanmean(values)), float(low), float(high)
