"""The diffusion objective as pure functions: timesteps, noise, target, loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_unitune.errors import BaseModelError


def stratified_timesteps(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws one timestep from each of `batch` equal strata of [0, count), in random order.

    Each timestep on its own is uniform, yet a batch always covers the whole schedule, which lowers the
    variance of the gradient (Kingma et al., "Variational Diffusion Models", arXiv 2107.00630, appendix I.1,
    spread their timesteps to the same end).

    Args:
        batch: how many to draw.
        count: timesteps in the schedule, T.
        generator: on the CPU.

    Returns:
        Timesteps (batch,) int64 on the CPU.
    """
    offsets = torch.rand(batch, generator=generator, dtype=torch.float64)
    order = torch.randperm(batch, generator=generator)
    positions = (order + offsets) / batch
    return (positions * count).long().clamp_(max=count - 1)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Diffuses latents: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e (DDPM, arXiv 2006.11239, equation 4).

    Args:
        latents: x_0, (b, c, h, w).
        noise: e, standard normal, (b, c, h, w).
        timesteps: t, (b,) int64.
        alphas_cumprod: a, the share of signal (T,), in (0, 1] or down to 0 with zero terminal SNR.

    Returns:
        x_t, (b, c, h, w).
    """
    signal, spread = _coefficients(timesteps, alphas_cumprod, latents)
    return signal * latents + spread * noise


def training_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """Returns what the denoiser should answer for x_t.

    Args:
        latents: x_0, (b, c, h, w).
        noise: e, (b, c, h, w).
        timesteps: t, (b,) int64.
        alphas_cumprod: a, (T,).
        prediction_type: "epsilon" for e (arXiv 2006.11239, equation 14), "v_prediction" for
            v = sqrt(a_t) e - sqrt(1 - a_t) x_0 (arXiv 2202.00512, appendix D), "sample" for x_0.

    Raises:
        BaseModelError: the base predicts something else.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        signal, spread = _coefficients(timesteps, alphas_cumprod, latents)
        return signal * noise - spread * latents
    raise _unknown(prediction_type)


def clean_latents(
    prediction: Tensor, noisy: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """Returns the x_0 that a denoiser's answer for x_t stands for: the inverse of `training_target`.

    Args:
        prediction: what the denoiser answered, (b, c, h, w).
        noisy: x_t, (b, c, h, w).
        timesteps: t, (b,) int64.
        alphas_cumprod: a, (T,).
        prediction_type: "epsilon" (arXiv 2006.11239, equation 15), "v_prediction" (arXiv 2202.00512,
            appendix D) or "sample".

    Raises:
        BaseModelError: the base predicts something else.
    """
    signal, spread = _coefficients(timesteps, alphas_cumprod, noisy)
    if prediction_type == "epsilon":
        return (noisy - spread * prediction) / signal
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return signal * noisy - spread * prediction
    raise _unknown(prediction_type)


def snr(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Returns the signal-to-noise ratio a_t / (1 - a_t) per timestep, (b,) (arXiv 2107.00630, equation 3)."""
    signal = alphas_cumprod.to(timesteps.device)[timesteps]
    return signal / (1 - signal)


def mean_squared_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error over all elements, a float32 scalar (arXiv 2006.11239, equation 14)."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def _coefficients(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sqrt(a_t) and sqrt(1 - a_t), each (b, 1, 1, 1)."""
    signal = alphas_cumprod.to(like.device)[timesteps.to(like.device)].view(-1, 1, 1, 1)
    return signal.sqrt().to(like.dtype), (1 - signal).sqrt().to(like.dtype)


def _unknown(prediction_type: str) -> BaseModelError:
    return BaseModelError(
        f"the base predicts '{prediction_type}'; it has to be epsilon, v_prediction or sample"
    )
