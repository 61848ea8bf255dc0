"""Preprocessing of a fit: the encoded photo and the rare tokens, computed once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lora_unitune.errors import PromptError
from lora_unitune.families import Base
from lora_unitune.photo.reading import Photo, photo_to_tensor
from lora_unitune.recipe import Recipe
from lora_unitune.training.rare_tokens import check_rare_tokens, find_rare_tokens


@dataclass(frozen=True)
class Prepared:
    """An encoded photo and its rare tokens; tensors are on the CPU.

    Attributes:
        mean: Mean of the posterior of the photo's x0, (1, c, h, w) float32.
        std: Standard deviation of the posterior, same shape.
        rare_tokens: The words that stand for the photo, separated by spaces.
        size: (width, height) of the photo in pixels.
    """

    mean: Tensor
    std: Tensor
    rare_tokens: str
    size: tuple[int, int]


def prepare(photo: Photo, recipe: Recipe, base: Base) -> Prepared:
    """Encodes the photo and chooses the rare tokens.

    Args:
        photo: The photo, at a size that the base supports.
        recipe: The recipe, whose `prompt` sets the rare tokens or their number.
        base: The base to fit.

    Raises:
        PromptError: The rare tokens aren't usable with the base's tokenizer.
        RecipeError: The base doesn't support the photo's size.
    """
    base.sample_shape(photo.image.size)
    rare_tokens = choose_rare_tokens(recipe, base)
    _, cut = base.tokenize(rare_tokens)
    if cut:
        raise PromptError(f"prompt.rare_tokens: '{cut}' doesn't fit into the base's prompt; use fewer tokens")
    mean, std = base.encode(photo_to_tensor(photo))
    return Prepared(mean.cpu(), std.cpu(), rare_tokens, photo.image.size)


def choose_rare_tokens(recipe: Recipe, base: Base) -> str:
    """Returns the recipe's rare tokens after a check, or chooses some from the base's vocabulary.

    Raises:
        PromptError: The recipe's tokens aren't usable with the base's tokenizer.
    """
    wanted, vocabulary = recipe.prompt.rare_tokens, base.vocabulary()
    if wanted:
        return check_rare_tokens(vocabulary, wanted)
    return find_rare_tokens(vocabulary, recipe.prompt.rare_token_count)
