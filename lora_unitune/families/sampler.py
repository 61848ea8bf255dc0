"""A common interface to diffusers' schedulers: the steps of a sampling run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_unitune.errors import SettingError, one_line
from lora_unitune.families.schedule import NoiseSchedule


class Sampler:
    """The steps of one sampling run, from noise or from a noised image.

    Attributes:
        timesteps: (steps,), the timestep that the denoiser receives at each step.
        shares: Share of the denoising that is done when each step begins, in [0, 1].
        levels: The base's noise schedule at the distinct timesteps of the run, the noisiest first.
        first_step: Index of the first step at each of those levels.
    """

    def __init__(
        self, scheduler: Any, schedule: NoiseSchedule, steps: int, skip: int, device: torch.device
    ) -> None:
        """Sets the timesteps of a scheduler.

        Args:
            scheduler: A new scheduler of diffusers.
            schedule: The base's noise levels.
            steps: Steps of a full run.
            skip: Number of first steps to skip.
            device: Device of the samples.

        Raises:
            SettingError: The scheduler can't take that many steps.
        """
        self._scheduler = scheduler
        try:
            scheduler.set_timesteps(steps, device=device)
        except ValueError as error:
            raise SettingError(
                f"edit.steps = {steps} is more than the base's scheduler {type(scheduler).__name__} takes "
                f"({one_line(error, 100)}); give fewer steps"
            ) from error
        self._first = skip * scheduler.order
        self.timesteps: Tensor = scheduler.timesteps[self._first :]
        self.shares = [schedule.share(float(timestep)) for timestep in self.timesteps]
        distinct = self.timesteps.unique().flip(0)
        self.first_step = [int((self.timesteps == each).nonzero()[0]) for each in distinct]
        if schedule.prediction == "flow":
            self.levels = NoiseSchedule.flow(distinct / schedule.span[0], schedule.span[0])
        else:
            if len(distinct) and distinct[0].ceil() >= len(schedule):  # "leading" timesteps with an offset
                raise SettingError(
                    f"edit.steps = {steps} is more than the base's scheduler takes; give fewer steps"
                )
            self.levels = schedule.at(distinct.long())

    def start(self, noise: Tensor, clean: Tensor | None = None) -> Tensor:
        """Returns the initial sample, (b, c, h, w).

        Args:
            noise: Standard normal noise, (b, c, h, w).
            clean: x0 of an image, same shape; None starts from noise alone.
        """
        scheduler = self._scheduler
        if clean is None:
            initial: Tensor = noise * getattr(scheduler, "init_noise_sigma", 1.0)
            return initial
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._first)
        if hasattr(scheduler, "scale_noise"):  # flow matching
            return scheduler.scale_noise(clean, self.timesteps[:1], noise)  # type: ignore[no-any-return]
        return scheduler.add_noise(clean, noise, self.timesteps[:1])  # type: ignore[no-any-return]

    def model_input(self, noisy: Tensor, step: int) -> Tensor:
        """Returns the denoiser's input at a step; some schedulers scale the sample."""
        scale = getattr(self._scheduler, "scale_model_input", None)
        return noisy if scale is None else scale(noisy, self.timesteps[step])

    def step(self, output: Tensor, step: int, noisy: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Returns the sample after one denoising step, (b, c, h, w).

        Args:
            output: Output of the denoiser, (b, c, h, w).
            step: Index of the step, from 0.
            noisy: The current sample, (b, c, h, w).
            generators: Generator of each sample, for stochastic samplers.
        """
        scheduler = self._scheduler
        taken_options = inspect.signature(scheduler.step).parameters
        given = {"generator": list(generators), "eta": 0.0}  # eta as the pipelines' default
        options = {name: value for name, value in given.items() if name in taken_options}
        taken = scheduler.step(output, self.timesteps[step], noisy, **options, return_dict=False)
        return taken[0]  # type: ignore[no-any-return]
