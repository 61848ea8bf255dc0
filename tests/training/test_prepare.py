"""Photo, recipe and base -> Prepared."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from lora_unitune.errors import PromptError, RecipeError
from lora_unitune.families import Base
from lora_unitune.photo.reading import load_photo, photo_to_tensor
from lora_unitune.recipe import Recipe
from lora_unitune.training.prepare import prepare


def test_the_moments_are_the_photos_and_live_on_the_cpu(base15: Base, photo_image: Image.Image) -> None:
    photo = load_photo(photo_image, 32)
    prepared = prepare(photo, Recipe(), base15)
    mean, std = base15.encode_photo(photo_to_tensor(photo))
    assert torch.equal(prepared.latent_mean, mean) and torch.equal(prepared.latent_std, std)
    assert prepared.latent_mean.dtype == torch.float32 and prepared.latent_mean.device.type == "cpu"
    assert prepared.resolution == 32


def test_found_tokens_are_the_number_asked_for_and_fill_the_prompt(
    base15: Base, photo_image: Image.Image
) -> None:
    photo = load_photo(photo_image, 32)
    for count in (1, 3):
        prepared = prepare(photo, Recipe().override([f"prompt.rare_token_count={count}"]), base15)
        assert len(prepared.rare_tokens.split()) == count
        assert torch.equal(prepared.prompt_ids, base15.tokenize(prepared.rare_tokens)[0])
    assert prepare(photo, Recipe(), base15).rare_tokens == prepare(photo, Recipe(), base15).rare_tokens


def test_chosen_tokens_are_used_and_checked(base15: Base, photo_image: Image.Image) -> None:
    photo = load_photo(photo_image, 32)
    assert (
        prepare(photo, Recipe().override(["prompt.rare_tokens=zqrt ohwx"]), base15).rare_tokens == "zqrt ohwx"
    )
    for wrong in ("beikk " * 20, "<|endoftext|>"):
        with pytest.raises(PromptError):
            prepare(photo, Recipe().override([f"prompt.rare_tokens={wrong.strip()}"]), base15)


def test_another_resolution_works_if_the_base_can(base15: Base, photo_image: Image.Image) -> None:
    assert prepare(load_photo(photo_image, 40), Recipe(), base15).latent_mean.shape == (1, 4, 20, 20)
    with pytest.raises(RecipeError, match="multiple of 4"):
        prepare(load_photo(photo_image, 38), Recipe(), base15)
