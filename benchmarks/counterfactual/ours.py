"""This project's method, with and without the fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_unitune import Adapter, Editor, fit
from lora_unitune.families import Condition, default_recipe
from lora_unitune.recipe import Recipe
from lora_unitune.settings import EditSettings

from .method import STEPS, Dials, photo_latents, sampling_grid, to_bytes

SCALES = (1.0, 0.5, 0.75, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Scales of the adapter to try, relative to the recipe's, which depends on the weight in the file."""


@dataclass
class UniTune:
    """This project's fit and edit; hyperparameters with a dot in their name are settings of the fit's recipe.

    Attributes:
        overrides: Changes of the default recipe, as for `--set`.
        grid: See `Method`. Every edit setting of pocket's recipe is in it; those with one value aren't tuned.
    """

    overrides: tuple[str, ...] = ()
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        edit = Recipe.load("pocket/default").edit
        fixed = {name: (value,) for name, value in dataclasses.asdict(edit).items() if name != "steps"}
        window = edit.guidance_start, edit.guidance_stop
        tuned = sampling_grid(edit.strength, edit.guidance, *window)
        scales = tuple(round(edit.adapter_scale * scale, 3) for scale in SCALES)
        self.grid = fixed | {"adapter_scale": scales} | tuned | self.grid

    def recipe(self, editor: Editor, dials: Dials) -> Recipe:
        """The recipe of the editor's base with the method's changes, at the size of all other methods."""
        settings = [f"{name}={value}" for name, value in dials.items() if "." in name]
        settings.append("photo.size={}x{}".format(*editor.base.size))
        return default_recipe(editor.base.name, editor.base.family).override([*self.overrides, *settings])

    def fit(self, editor: Editor, photo: Any, seed: int, dials: Dials) -> Any:
        editor.release()
        return fit(photo, base=editor.base, recipe=self.recipe(editor, dials), seed=seed)

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        recipe = fitted.recipe if fitted else self.recipe(editor, dials)
        chosen = {name: value for name, value in dials.items() if "." not in name}
        settings = dataclasses.replace(recipe.edit, steps=STEPS, **chosen)
        texts = [f"{fitted.rare_tokens} {pair.prompt}" if fitted else pair.prompt for pair in pairs]
        start = None
        if settings.strength < 1 or settings.residual:
            start = fitted.photo_latents if fitted else photo_latents(editor, pairs)
        if fitted and recipe.fit.method == "full" and settings.unconditional == "base":
            return to_bytes(guided_by_plain_weights(editor, fitted, texts, start, seeds, settings))
        return to_bytes(editor.pixels(fitted, texts, "", start, seeds, settings))


class NoFit(UniTune):
    """This project's edit by the plain base: what the fit is worth is the difference to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        del self.grid["adapter_scale"]

    def fit(self, editor: Editor, photo: Any, seed: int, dials: Dials) -> Any:
        return None


class WithPlain:
    """A fine-tuned base whose unconditional predictions, those of the empty prompt, come from the plain one."""

    def __init__(self, tuned: Any, plain: Any) -> None:
        self.tuned, self.plain, self.empty = tuned, plain, plain.condition("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tuned, name)

    def condition(self, text: str) -> Condition:
        return self.tuned.condition(text) if text else self.empty

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        name, empty = next(iter(self.empty.items()))
        is_empty = (condition[name] == empty).flatten(1).all(1)
        predicted = torch.empty_like(noisy)
        for base, rows in ((self.plain, is_empty), (self.tuned, ~is_empty)):
            if rows.any():
                own = {name: tensor[rows] for name, tensor in condition.items()}
                predicted[rows] = base.predict(noisy[rows], timesteps[rows], own)
        return predicted


@torch.no_grad()
def guided_by_plain_weights(
    editor: Editor,
    fitted: Adapter,
    texts: Sequence[str],
    start: Tensor | None,
    seeds: Sequence[int],
    settings: EditSettings,
) -> Tensor:
    """The equivalent of unconditional = "base" for full fine-tuning; needs a second model in memory."""
    editor.release()
    plain, both = copy.copy(editor.base), copy.copy(editor)
    plain.parts = copy.deepcopy(editor.base.parts)
    both.base = WithPlain(editor.base, plain)
    try:
        settings = dataclasses.replace(settings, unconditional="adapter")
        return both.pixels(fitted, texts, "", start, seeds, settings)
    finally:
        editor.release()
