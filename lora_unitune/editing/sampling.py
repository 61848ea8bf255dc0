"""Sampling: from noise, or from the noised photo, to the latents of an image."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_unitune.adapter.layers import adapters_for_last
from lora_unitune.editing.guidance import classifier_free_guidance, rescale_guidance
from lora_unitune.families import Base
from lora_unitune.families.schedule import add_noise, clean_latents, snr
from lora_unitune.recipe import EditSettings


@torch.no_grad()
def sample(
    base: Base,
    shape: tuple[int, int, int],
    conditional: Tensor,
    unconditional: Tensor,
    photo_latents: Tensor | None,
    seeds: Sequence[int],
    settings: EditSettings,
) -> Tensor:
    """Samples latents with the base's own sampler, from noise or from the noised photo (SDEdit, 2108.01073).

    It does what diffusers' StableDiffusionPipeline (strength 1) and StableDiffusionImg2ImgPipeline (less) do.

    Args:
        base: with its adapter in place.
        shape: (channels, h, w) of the latents.
        conditional: (b, L, width), the prompts' embeddings.
        unconditional: (1, L, width), those of the negative or empty prompt.
        photo_latents: (1, channels, h, w), scaled; used when strength is below 1.
        seeds: one for each prompt, of the generator that draws its noise, on the CPU.
        settings: the sampler's.

    Returns:
        (b, channels, h, w) float32, scaled latents.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    noise, unconditional = _noise(shape, generators).to(base.device), unconditional.expand_as(conditional)
    scheduler = base.make_scheduler()
    scheduler.set_timesteps(settings.steps, device=base.device)
    timesteps = scheduler.timesteps
    latents: Tensor
    if photo_latents is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        first = _skipped(settings) * scheduler.order
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(photo_latents.expand_as(noise), noise, timesteps[:1])
    draws = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if draws else {}
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = _guided_prediction(base, scaled, timestep, conditional, unconditional, settings)
        latents = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
    return latents


@torch.no_grad()
def sample_edit(
    base: Base,
    shape: tuple[int, int, int],
    conditional: Tensor,
    rare: Tensor | None,
    unconditional: Tensor,
    photo_latents: Tensor | None,
    seeds: Sequence[int],
    settings: EditSettings,
) -> Tensor:
    """Samples latents as `sample` does, or the photo and what the prompt changes in it (setting `residual`).

    The change d, 0 at first, follows FlowEdit (arXiv 2412.08629, algorithm 1) on a diffusion model's noise
    levels s = sqrt((1 - a_t) / a_t). At each, the photo z and z + d get the same fresh noise; from one to the
    next, lower by the factor r, d <- r d + (1 - r) (x(z + d, whole prompt) - x(z, rare tokens alone)), where
    x is the clean picture that the base predicts. What it draws wrong of the photo drops out.

    Args:
        base: as for `sample`, and so are the others but one.
        shape: of the latents.
        conditional: (b, L, width).
        rare: (1, L, width), of the rare tokens alone (for the plain base, of nothing); None: no residual.
        unconditional: (1, L, width).
        photo_latents: without them (strength 1) there is no residual.
        seeds: one for each prompt.
        settings: the sampler's; with a residual, of its scheduler only the timesteps are used.

    Returns:
        (b, channels, h, w) float32, scaled latents.
    """
    if photo_latents is None or rare is None:
        return sample(base, shape, conditional, unconditional, photo_latents, seeds, settings)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    scheduler = base.make_scheduler()
    scheduler.set_timesteps(settings.steps, device=base.device)
    timesteps = scheduler.timesteps[_skipped(settings) * scheduler.order :].long().unique_consecutive()
    both = torch.cat([conditional, rare.expand_as(conditional)])
    nothing, photo = unconditional.expand_as(both), photo_latents.expand(len(seeds), *shape)
    levels = [*snr(timesteps, base.alphas_cumprod).rsqrt().tolist(), 0.0]
    change = torch.zeros_like(photo)
    for timestep, level, next_level in zip(timesteps, levels, levels[1:], strict=False):
        noise, steps = _noise(shape, generators).to(base.device), timestep.expand(2 * len(seeds))
        pictures, alphas = torch.cat([photo + change, photo]), base.alphas_cumprod
        noised = add_noise(pictures, torch.cat([noise, noise]), steps, alphas)
        prediction = _guided_prediction(base, noised, timestep, both, nothing, settings)
        clean = clean_latents(prediction, noised, steps, alphas, base.prediction_type)
        edited, redrawn = clean.chunk(2)
        change = torch.lerp(edited - redrawn, change, next_level / level)
    return photo + change


def _noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draws standard normal noise (generators, channels, h, w), for each image by its own generator."""
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def _skipped(settings: EditSettings) -> int:
    """Returns how many steps of a full run, the noisiest ones, a strength below 1 leaves out."""
    return settings.steps - min(int(settings.steps * settings.strength), settings.steps)


def _guided_prediction(
    base: Base,
    latents: Tensor,
    timestep: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    settings: EditSettings,
) -> Tensor:
    """Returns the prediction (b, c, h, w) for one step, with guidance where its weight isn't 1."""
    count, timesteps = len(latents), timestep.expand(len(latents))
    share = 1 - (float(timestep) + 1) / len(base.alphas_cumprod)
    if settings.guidance == 1 or not settings.guidance_start <= share < settings.guidance_stop:
        return base.predict(latents, timesteps, conditional)
    is_base = settings.unconditional == "base"
    with adapters_for_last(base, count) if is_base else contextlib.nullcontext():
        both = torch.cat([unconditional, conditional])
        without, prompted = base.predict(torch.cat([latents] * 2), timesteps.repeat(2), both).chunk(2)
    guided = classifier_free_guidance(without, prompted, settings.guidance)
    if settings.guidance_rescale > 0:
        guided = rescale_guidance(guided, prompted, settings.guidance_rescale)
    return guided
