"""The interface of the compared methods, and functions that several of them use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lora_unitune import Editor
from lora_unitune.editing.start import Start
from lora_unitune.families import Condition, joined
from lora_unitune.photo import colors
from lora_unitune.photo.framing import frame
from lora_unitune.photo.reading import Photo, load_photo, photo_to_tensor

Dials = dict[str, Any]
"""Hyperparameters of a method, by name."""
RESCALE = 0.7  # guidance rescaling of every method with guidance (arXiv 2305.08891)
STEPS = 25
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.5, 10.0)
STARTS = (0.0, 0.2, 0.4, 0.6, 0.8)
STOPS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
BOUNDS = {
    "strength": 1.0,
    "guidance": 1.0,
    "least_change": 0.0,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "skip": 0.0,
    "edit_threshold": 0.0,
    "edit_warmup_steps": 0,
    "mix": 1.0,
}
"""Natural bounds of hyperparameters: a value beyond them means nothing."""


class Method(Protocol):
    """A text-guided image editing method. Pairs are a `Pair` or any object with `image` and `prompt`.

    Attributes:
        grid: Search space: values of each hyperparameter; the first is the default.
    """

    grid: dict[str, tuple[Any, ...]]

    def fit(self, editor: Editor, photo: Any, seed: int, dials: Dials) -> Any:
        """Returns what is computed once for a photo (an image or its file), or None; restores the base."""
        ...

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        """Returns edits of one photo, (n, h, w, 3) uint8; `seeds` are those of the noise, one for each pair."""
        ...


class Unfitted:
    """Base class of methods without a fit."""

    grid: dict[str, tuple[Any, ...]] = {}

    def fit(self, editor: Editor, photo: Any, seed: int, dials: Dials) -> Any:
        return None


def led_by(default: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    """The values with the default before all others."""
    return tuple(dict.fromkeys((default, *values)))


def sampling_grid(
    strength: float | None, guidance: float, start: float, stop: float
) -> dict[str, tuple[Any, ...]]:
    """The search space that all sampling methods share, around their own defaults; None: no strength."""
    grid = {
        "guidance": led_by(guidance, GUIDANCES),
        "guidance_start": led_by(start, STARTS),
        "guidance_stop": led_by(stop, STOPS),
    }
    return grid if strength is None else {"strength": led_by(strength, STRENGTHS), **grid}


def edges(grid: dict[str, tuple[Any, ...]], dials: Dials) -> Dials:
    """The hyperparameters at an end of their search space that isn't a natural bound: it may be too narrow.

    Guidance that stops before sampling begins, at one minus the strength, is none: no earlier stop differs.
    """
    found = {}
    begin = 1 - dials.get("strength", 1.0)
    for dial, values in grid.items():
        numbers = [value for value in values if isinstance(value, float | int) and type(value) is not bool]
        ends = {min(numbers), max(numbers)} if len(set(numbers)) > 1 else set()
        never = dial == "guidance_stop" and dials.get(dial, 1.0) <= begin + 1e-9
        if dials.get(dial) in ends - {BOUNDS.get(dial)} and not never:
            found[dial] = dials[dial]
    return found


def to_bytes(pixels: Tensor) -> np.ndarray:
    """(n, 3, h, w) in [0, 1] -> (n, h, w, 3) uint8."""
    return np.stack([colors.to_bytes(each) for each in pixels])


@torch.no_grad()
def conditions(editor: Editor, texts: Sequence[str]) -> Condition:
    """The conditions of prompts by the current base, as one batch."""
    return joined(*(editor.base.condition(text) for text in texts))


def framed(editor: Editor, photo: Any) -> Photo:
    """A photo (an image or its file) at the base's own size."""
    return frame(load_photo(photo), editor.base.size)


def photo_start(editor: Editor, pairs: Sequence[Any]) -> Start:
    """The photo that the pairs share, as an edit starts from it."""
    pixels = photo_to_tensor(framed(editor, pairs[0].image))
    return Start(editor.base.size, editor.base.encode(pixels)[0], pixels / 2 + 0.5)


def photo_latents(editor: Editor, pairs: Sequence[Any]) -> Tensor:
    """x0 of the photo that the pairs share, (1, c, h, w)."""
    latents = photo_start(editor, pairs).photo
    assert latents is not None
    return latents
