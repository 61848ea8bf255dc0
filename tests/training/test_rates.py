"""The rates of method "full", and the note on a fit that has diverged."""

from __future__ import annotations

import pytest
from PIL import Image

from lora_unitune import Recipe, fit
from lora_unitune.families import Base, default_recipe
from lora_unitune.settings import FitSettings
from lora_unitune.training.fit import divergence

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


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([0.8, 0.5, 0.3, 0.2], False),
        ([0.8, 2.0, 0.5, 0.7], False),
        ([0.8, 0.5, 0.7, 0.9], True),
        ([0.8, 0.85], False),  # a fit too short to learn
        ([0.8, *[2.0] * 5, 1.4, 0.4], True),  # the mean of the last quarter
        ([0.1, 0.1, 0.1, 0.4], False),  # the noise of good fits
        ([0.9], False),
    ],
)
def test_a_fit_has_diverged_if_its_loss_rose(losses: list[float], diverged: bool) -> None:
    notes = divergence(losses, Recipe.load("pocket/default"))
    assert bool(notes) == diverged
    assert all("lower lora.unet.learning_rate (0.02), lora.text_encoder" in note for note in notes)


@pytest.mark.parametrize("rate", ["1", "2e-2"])
def test_a_fit_says_whether_it_diverged(basepocket: Base, photo_image: Image.Image, rate: str) -> None:
    """Which of the two a rate of 1 does differs by machine, as rounding decides."""
    notes: list[str] = []
    overrides = ["fit.steps=8", *(f"lora.{part}.learning_rate={rate}" for part in basepocket.parts)]
    adapter = fit(photo_image, base=basepocket, overrides=overrides, on_note=notes.append)
    expected = divergence(adapter.history, adapter.recipe)
    assert [note for note in notes if "diverged" in note] == expected
    assert rate == "1" or not expected
