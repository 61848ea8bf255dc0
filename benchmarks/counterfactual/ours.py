"""This project's method, with and without the fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_unitune import Editor, fit
from lora_unitune.editing.finish import composed
from lora_unitune.families import default_recipe
from lora_unitune.recipe import Recipe

from .method import Dials, led_by, photo_start, sampling_grid, to_bytes

SCALES = (1.0, 0.5, 0.75, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Scales of the adapter to try, relative to the recipe's, which depends on the weight in the file."""
LEAST_CHANGES = (0.0, 0.4, 0.55, 0.7, 1.0, 1.4)


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
        fixed = {name: (value,) for name, value in dataclasses.asdict(edit).items()}
        window = edit.guidance_start, edit.guidance_stop
        tuned = sampling_grid(edit.strength, edit.guidance, *window)
        scales = tuple(round(edit.adapter_scale * scale, 3) for scale in SCALES)
        tuned["least_change"] = led_by(edit.least_change, LEAST_CHANGES)
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
        settings = dataclasses.replace(recipe.edit, **chosen)
        texts = [f"{fitted.rare_tokens} {pair.prompt}" if fitted else pair.prompt for pair in pairs]
        start = photo_start(editor, pairs)
        images = editor.pixels(fitted, texts, "", start, seeds, settings)
        return to_bytes(composed(editor.base, images, texts, start, settings)[0])


class NoFit(UniTune):
    """This project's edit by the plain base: what the fit is worth is the difference to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        del self.grid["adapter_scale"]

    def fit(self, editor: Editor, photo: Any, seed: int, dials: Dials) -> Any:
        return None
