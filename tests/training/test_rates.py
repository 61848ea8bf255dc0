"""The rates of method "full", and the note on a fit that has diverged."""

from __future__ import annotations

import pytest
from PIL import Image

from lora_unitune import Recipe, fit
from lora_unitune.families import Base, default_recipe
from lora_unitune.settings import FitSettings

QUICK = ["fit.steps=1", "fit.batch_size=1"]


def rates(base: Base, photo: Image.Image, recipe: Recipe | None, *overrides: str) -> dict[str, float]:
    adapter = fit(photo, base=base, recipe=recipe, overrides=[*QUICK, *overrides])
    return {part: each.learning_rate for part, each in adapter.recipe.lora.items()}


def test_all_weights_have_a_twentieth_of_a_recipes_rate_for_lora(
    base15: Base, photo_image: Image.Image
) -> None:
    lora = rates(base15, photo_image, None)
    assert lora == {
        part: each.learning_rate for part, each in default_recipe("x", base15.family).lora.items()
    }
    full = rates(base15, photo_image, None, "fit.method=full")
    assert full == {part: pytest.approx(rate / 20) for part, rate in lora.items()}


def test_a_rate_that_is_set_for_all_weights_is_kept(base15: Base, photo_image: Image.Image) -> None:
    chosen = "lora.unet.learning_rate=0.003"
    assert rates(base15, photo_image, None, "fit.method=full", chosen)["unet"] == 0.003
    recipe = Recipe(lora=default_recipe("x", base15.family).lora, fit=FitSettings(method="full"))
    assert rates(base15, photo_image, recipe)["unet"] == recipe.lora["unet"].learning_rate


@pytest.mark.parametrize("rate", ["1", "2e-2"])
def test_a_fit_that_diverges_says_what_to_lower(
    basepocket: Base, photo_image: Image.Image, rate: str
) -> None:
    notes: list[str] = []
    overrides = ["fit.steps=8", *(f"lora.{part}.learning_rate={rate}" for part in basepocket.parts)]
    losses = fit(photo_image, base=basepocket, overrides=overrides, on_note=notes.append).history
    diverged = [note for note in notes if "has probably diverged; lower lora.unet.learning_rate (1)" in note]
    assert bool(diverged) == (losses[-1] > losses[0]) == (rate == "1")
