"""Guidance: pure functions that combine predictions for several prompts."""

from __future__ import annotations

from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, weight: float) -> Tensor:
    """Moves a prediction away from the empty prompt's (arXiv 2205.11487, equation 2).

    Args:
        unconditional: Prediction for the empty or the negative prompt, (batch, channels, h, w).
        conditional: Prediction for the prompt, same shape.
        weight: w; 0 returns `unconditional`, 1 `conditional`; larger weights follow the prompt more closely.

    Returns:
        The guided prediction, (batch, channels, h, w).
    """
    return unconditional + weight * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """Reduces the overexposure caused by strong guidance (arXiv 2305.08891, equations 15 and 16).

    Args:
        guided: The guided prediction, (batch, channels, h, w).
        conditional: The prediction for the prompt alone, same shape.
        amount: phi; 0 returns `guided`, 1 rescales each sample to the standard deviation of `conditional`.

    Returns:
        The rescaled prediction, (batch, channels, h, w).
    """
    dimensions = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dimensions, keepdim=True) / guided.std(dim=dimensions, keepdim=True)
    return amount * (guided * ratio) + (1 - amount) * guided
