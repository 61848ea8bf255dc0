"""Guidance: how the predictions for several prompts become one; pure functions."""

from __future__ import annotations

from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, weight: float) -> Tensor:
    """Moves a prediction away from the empty prompt's (arXiv 2205.11487, equation 2).

    Args:
        unconditional: (batch, channels, h, w), prediction for the empty or the negative prompt.
        conditional: (batch, channels, h, w), prediction for the prompt.
        weight: w; 0 returns `unconditional`, 1 returns `conditional`, more follows the prompt harder.

    Returns:
        (batch, channels, h, w), the guided prediction.
    """
    return unconditional + weight * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """Takes back the overexposure that strong guidance brings (arXiv 2305.08891, equations 15 and 16).

    Args:
        guided: (batch, channels, h, w), a guided prediction.
        conditional: (batch, channels, h, w), the prediction for the prompt alone.
        amount: phi; 0 returns `guided`, 1 gives each image of it the standard deviation of `conditional`.

    Returns:
        (batch, channels, h, w), the rescaled prediction.
    """
    dimensions = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dimensions, keepdim=True) / guided.std(dim=dimensions, keepdim=True)
    return amount * (guided * ratio) + (1 - amount) * guided
