"""Preprocessing: photo, recipe and base -> Prepared."""

from __future__ import annotations

import pytest
import torch
from conftest import at
from PIL import Image

from lora_unitune.errors import PromptError, RecipeError
from lora_unitune.families import Base
from lora_unitune.photo.reading import photo_to_tensor
from lora_unitune.recipe import Recipe
from lora_unitune.training.prepare import prepare


def test_the_moments_are_the_photos_and_live_on_the_cpu(base15: Base, photo_image: Image.Image) -> None:
    photo = at(photo_image, 32)
    prepared = prepare(photo, Recipe(), base15)
    mean, std = base15.encode(photo_to_tensor(photo))
    assert torch.equal(prepared.mean, mean) and torch.equal(prepared.std, std)
    assert prepared.mean.dtype == torch.float32 and prepared.mean.device.type == "cpu"
    assert prepared.size == (32, 32)


def test_found_tokens_are_the_number_asked_for_and_fill_the_prompt(
    base15: Base, photo_image: Image.Image
) -> None:
    photo = at(photo_image, 32)
    for count in (1, 3):
        prepared = prepare(photo, Recipe().override([f"prompt.rare_token_count={count}"]), base15)
        assert len(prepared.rare_tokens.split()) == count
    assert prepare(photo, Recipe(), base15).rare_tokens == prepare(photo, Recipe(), base15).rare_tokens


def test_chosen_tokens_are_used_and_checked(base15: Base, photo_image: Image.Image) -> None:
    photo = at(photo_image, 32)
    assert (
        prepare(photo, Recipe().override(["prompt.rare_tokens=zqrt ohwx"]), base15).rare_tokens == "zqrt ohwx"
    )
    for wrong in ("beikk " * 20, "<|endoftext|>"):
        with pytest.raises(PromptError):
            prepare(photo, Recipe().override([f"prompt.rare_tokens={wrong.strip()}"]), base15)


def test_another_size_works_if_the_base_can(base15: Base, photo_image: Image.Image) -> None:
    assert prepare(at(photo_image, 48, 32), Recipe(), base15).mean.shape == (1, 4, 16, 24)
    with pytest.raises(RecipeError, match="photo.size = 40x38 .* multiples of 4"):
        prepare(at(photo_image, 40, 38), Recipe(), base15)
