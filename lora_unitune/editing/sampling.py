"""Sampling of x0, from noise or from the noised photo."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_unitune.adapter.layers import adapters_for_last
from lora_unitune.editing.guidance import classifier_free_guidance, rescale_guidance
from lora_unitune.families import Base, Condition, expanded, joined
from lora_unitune.families.sampler import Sampler
from lora_unitune.settings import EditSettings


@torch.no_grad()
def sample(
    base: Base,
    size: tuple[int, int],
    conditional: Condition,
    unconditional: Condition,
    photo: Tensor | None,
    seeds: Sequence[int],
    settings: EditSettings,
) -> Tensor:
    """Samples with the base's own sampler, from noise or from the noised photo (SDEdit, arXiv 2108.01073).

    Equivalent to diffusers' text-to-image pipelines (strength 1) and image-to-image pipelines (below 1).

    Args:
        base: The base, with its adapter attached.
        size: (width, height) in pixels.
        conditional: Condition of the prompts, with one batch row for each seed.
        unconditional: Condition of the negative or empty prompt, with a batch of 1.
        photo: x0 of the photo, (1, c, h, w); needed if strength is below 1.
        seeds: Seeds of the noise, drawn on the CPU.
        settings: Sampling settings.

    Returns:
        x0, (b, c, h, w) float32.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise = _noise(base.sample_shape(size), generators).to(base.device)
    unconditional = expanded(unconditional, len(seeds))
    sampler = base.sampler(settings.steps, size, 0 if photo is None else _skipped(settings))
    noisy = sampler.start(noise, None if photo is None else photo.expand_as(noise))
    for step in range(len(sampler.timesteps)):
        scaled = sampler.model_input(noisy, step)
        prediction = _guided_prediction(base, scaled, sampler, step, conditional, unconditional, settings)
        noisy = sampler.step(prediction, step, noisy, generators)
    return noisy


@torch.no_grad()
def sample_edit(
    base: Base,
    size: tuple[int, int],
    conditional: Condition,
    rare: Condition | None,
    unconditional: Condition,
    photo: Tensor | None,
    seeds: Sequence[int],
    settings: EditSettings,
) -> Tensor:
    """Samples as `sample` does, or adds to the photo only what the prompt changes (setting `residual`).

    The change d, 0 at first, follows FlowEdit (arXiv 2412.08629, algorithm 1), written for noise levels
    s = sigma / alpha so that it holds for diffusion and flow models alike. At each level, the photo z and z + d get
    the same new noise; from one level to the next, lower by the factor r,
    d <- r d + (1 - r) (x(z + d, whole prompt) - x(z, rare tokens alone)), where x is the clean image that
    the base predicts. Errors in the reconstruction of the photo cancel.

    Args:
        base: As for `sample`.
        size: As for `sample`.
        conditional: As for `sample`.
        rare: Condition of the rare tokens alone (of the empty prompt for the plain base), with a batch of 1;
            None for no residual.
        unconditional: As for `sample`.
        photo: As for `sample`; without it (strength 1) there is no residual.
        seeds: As for `sample`.
        settings: Sampling settings; with a residual, only the sampler's noise levels are used.

    Returns:
        x0, (b, c, h, w) float32.
    """
    if photo is None or rare is None:
        return sample(base, size, conditional, unconditional, photo, seeds, settings)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shape, count = base.sample_shape(size), len(seeds)
    sampler = base.sampler(settings.steps, size, _skipped(settings))
    both, empty = joined(conditional, expanded(rare, count)), expanded(unconditional, 2 * count)
    photo, levels = photo.expand(count, *shape), sampler.levels
    ratios = [*levels.noise_to_signal().tolist(), 0.0]
    change = torch.zeros_like(photo)
    for step, (ratio, next_ratio) in enumerate(zip(ratios, ratios[1:], strict=False)):
        noise, index = _noise(shape, generators).to(base.device), torch.full((2 * count,), step)
        noisy = levels.add_noise(torch.cat([photo + change, photo]), torch.cat([noise, noise]), index)
        first = sampler.first_step[step]
        prediction = _guided_prediction(base, noisy, sampler, first, both, empty, settings)
        edited, redrawn = levels.clean(prediction, noisy, index).chunk(2)
        change = torch.lerp(edited - redrawn, change, next_ratio / ratio)
    return photo + change


def _noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draws standard normal noise (len(generators), c, h, w), each sample with its own generator."""
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def _skipped(settings: EditSettings) -> int:
    """Returns the number of first steps of a full run that a strength below 1 skips."""
    return settings.steps - min(int(settings.steps * settings.strength), settings.steps)


def _guided_prediction(
    base: Base,
    noisy: Tensor,
    sampler: Sampler,
    step: int,
    conditional: Condition,
    unconditional: Condition,
    settings: EditSettings,
) -> Tensor:
    """Returns the prediction (b, c, h, w) for one step, with guidance where its weight isn't 1."""
    count, timestep, share = len(noisy), sampler.timesteps[step], sampler.shares[step]
    timesteps = timestep.expand(count)
    if settings.guidance == 1 or not settings.guidance_start <= share < settings.guidance_stop:
        return base.predict(noisy, timesteps, conditional)
    is_base = settings.unconditional == "base"
    with adapters_for_last(base, count) if is_base else contextlib.nullcontext():
        both = joined(unconditional, conditional)
        without, prompted = base.predict(torch.cat([noisy] * 2), timesteps.repeat(2), both).chunk(2)
    guided = classifier_free_guidance(without, prompted, settings.guidance)
    if settings.guidance_rescale > 0:
        guided = rescale_guidance(guided, prompted, settings.guidance_rescale)
    return guided
