"""Noise levels: one formula for diffusion (DDPM) and flow matching.

Every process is x_t = alpha x0 + sigma e, and every denoiser's output a x0 + b e, so one inverse holds for all:
x0 = (b x_t - sigma output) / (b alpha - a sigma).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lora_unitune.errors import BaseModelError

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
"""What a denoiser predicts: e (arXiv 2006.11239, equation 14), x0, v = alpha e - sigma x0 (arXiv 2202.00512,
appendix D), or the velocity e - x0 of a straight path (arXiv 2210.02747, equation 23)."""


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of a base, or of a sampler's steps; all tensors are (T,) float32 on the CPU.

    Attributes:
        timesteps: Timesteps that the denoiser receives.
        alpha: Coefficient of x0: sqrt(a_t) in DDPM, 1 - sigma in flow matching.
        sigma: Coefficient of the noise.
        prediction: What the denoiser predicts.
        span: Timesteps of pure noise and of the clean image, on the same scale.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction: Prediction
    span: tuple[float, float]

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise BaseModelError(
                f"the base predicts {self.prediction!r}; it has to be {', '.join(get_args(Prediction))}"
            )

    @classmethod
    def diffusion(cls, signal: Tensor, prediction: Prediction) -> NoiseSchedule:
        """Makes the schedule of a diffusion model (DDPM, arXiv 2006.11239, equation 4).

        Args:
            signal: a_t, the cumulative product (T,), in (0, 1] or down to 0 with zero terminal SNR.
            prediction: What the denoiser predicts.
        """
        steps, signal = torch.arange(len(signal)), signal.float().cpu()
        return cls(steps, signal.sqrt(), (1 - signal).sqrt(), prediction, (len(signal) - 1, -1))

    @classmethod
    def flow(cls, sigma: Tensor, scale: float = 1000.0) -> NoiseSchedule:
        """Makes the schedule of a flow-matching model: x_t = (1 - sigma) x0 + sigma e (arXiv 2210.02747).

        Args:
            sigma: Noise levels (T,) in (0, 1].
            scale: Factor from sigma to the denoiser's timestep.
        """
        sigma = sigma.float().cpu()
        return cls(sigma * scale, 1 - sigma, sigma, "flow", (scale, 0))

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, index: Tensor) -> NoiseSchedule:
        """Returns the schedule at chosen levels; index (n,) int64."""
        tensors = (self.timesteps, self.alpha, self.sigma)
        timesteps, alpha, sigma = (tensor[index.cpu()] for tensor in tensors)
        return replace(self, timesteps=timesteps, alpha=alpha, sigma=sigma)

    def share(self, timestep: float) -> float:
        """Returns the share of the denoising that is done at a timestep: 0 for pure noise, 1 for a clean image."""
        noise, clean = self.span
        return (noise - timestep) / (noise - clean)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draws one level from each of `batch` equal strata of the schedule, in random order.

        Each level on its own is uniform, yet a batch always covers the whole schedule, which lowers the
        variance of the gradient (Kingma et al., "Variational Diffusion Models", arXiv 2107.00630, appendix
        I.1, spread their timesteps to the same end).

        Args:
            batch: Number of levels to draw.
            generator: Generator on the CPU.

        Returns:
            Indices (batch,) int64 on the CPU.
        """
        offsets = torch.rand(batch, generator=generator, dtype=torch.float64)
        order = torch.randperm(batch, generator=generator)
        positions = (order + offsets) / batch
        return (positions * len(self)).long().clamp_(max=len(self) - 1)

    def add_noise(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Returns x_t = alpha x0 + sigma e.

        Args:
            clean: x0, (b, c, h, w).
            noise: e, standard normal, same shape.
            index: Indices of the levels, (b,) int64.
        """
        alpha, sigma = self._levels(index, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Returns the denoiser's target for x_t: a x0 + b e.

        Args:
            clean: x0, (b, c, h, w).
            noise: e, same shape.
            index: Indices of the levels, (b,) int64.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        a, b = self._output(*self._levels(index, clean))
        return b * noise + a * clean

    def clean(self, output: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """Returns the x0 that a denoiser's output for x_t predicts, the inverse of `target`.

        Args:
            output: Output of the denoiser, (b, c, h, w).
            noisy: x_t, same shape.
            index: Indices of the levels, (b,) int64.
        """
        alpha, sigma = self._levels(index, noisy)
        a, b = self._output(alpha, sigma)
        return (b * noisy - sigma * output) / (b * alpha - a * sigma)

    def noise_to_signal(self) -> Tensor:
        """Returns sigma / alpha of every level, (T,); infinite at pure noise."""
        return self.sigma / self.alpha

    def _levels(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma, each (b, 1, 1, 1), on the device and in the dtype of `like`."""
        levels = (values[index.cpu()].view(-1, 1, 1, 1) for values in (self.alpha, self.sigma))
        alpha, sigma = (values.to(like.device, like.dtype) for values in levels)
        return alpha, sigma

    def _output(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a and b of the output a x0 + b e."""
        if self.prediction == "v_prediction":
            return -sigma, alpha
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        return {"epsilon": (zero, one), "sample": (one, zero), "flow": (-one, one)}[self.prediction]
