"""Photo and base -> everything the fit needs of them, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_unitune.errors import PromptError
from lora_unitune.families import Base
from lora_unitune.photo.reading import Photo, photo_to_tensor
from lora_unitune.recipe import Recipe
from lora_unitune.training.rare_tokens import check_rare_tokens, find_rare_tokens


@dataclass(frozen=True)
class Prepared:
    """A photo and its rare tokens as the base sees them; tensors are on the CPU.

    Attributes:
        latent_mean: mean of the photo's scaled latents, (1, c, h, w) float32.
        latent_std: their standard deviation, same shape.
        rare_tokens: the words that stand for the photo, separated by spaces.
        prompt_ids: their padded token ids, (1, L) int64.
        resolution: side of the photo in pixels.
    """

    latent_mean: Tensor
    latent_std: Tensor
    rare_tokens: str
    prompt_ids: Tensor
    resolution: int


def prepare(photo: Photo, recipe: Recipe, base: Base) -> Prepared:
    """Encodes the photo and settles the rare tokens.

    Args:
        photo: square, at a resolution the base can work at.
        recipe: `prompt` says which rare tokens to use, or how many to find.
        base: the base to fit.

    Raises:
        PromptError: the rare tokens aren't usable with the base's tokenizer.
        RecipeError: the base can't work at the photo's resolution.
    """
    resolution = photo.image.width
    base.latent_shape(resolution)
    rare_tokens = choose_rare_tokens(recipe, base)
    ids, cut = base.tokenize(rare_tokens)
    if cut:
        raise PromptError(f"prompt.rare_tokens: '{cut}' doesn't fit into the base's prompt; use fewer tokens")
    mean, std = base.encode_photo(photo_to_tensor(photo))
    return Prepared(mean.cpu(), std.cpu(), rare_tokens, ids.cpu(), resolution)


def choose_rare_tokens(recipe: Recipe, base: Base) -> str:
    """Returns the recipe's rare tokens after a check, or finds some in the base's own tokenizer.

    Raises:
        PromptError: the recipe's tokens aren't usable with the base's tokenizer.
    """
    wanted = recipe.prompt.rare_tokens
    if wanted:
        return check_rare_tokens(base.tokenizer, wanted)
    text_encoder: Any = base.parts["text_encoder"]
    embeddings = text_encoder.get_input_embeddings().weight
    return find_rare_tokens(base.tokenizer, embeddings, recipe.prompt.rare_token_count)
