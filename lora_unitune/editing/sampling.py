"""Sampling of x0, from noise or from the noised photo, and how wrong the base is about a photo."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_unitune.adapter.layers import adapters_disabled, adapters_for_last
from lora_unitune.editing.guidance import boost, classifier_free_guidance, rescale_guidance, strongest_change
from lora_unitune.families import Base, Condition, expanded, joined
from lora_unitune.families.sampler import Sampler
from lora_unitune.settings import EditSettings


def conditions(
    base: Base, texts: Sequence[str], rare_tokens: str, negative_prompt: str, settings: EditSettings
) -> tuple[Condition, Condition | None, Condition]:
    """Returns the conditions that `sample_edit` takes: of the prompts, the rare tokens, and without a prompt.

    Args:
        base: The base, with its adapter attached.
        texts: Complete prompts, including rare tokens.
        rare_tokens: The rare tokens alone.
        negative_prompt: Prompt of the unconditional prediction of guidance.
        settings: Sampling settings.
    """
    condition = functools.partial(base.condition, clip_skip=settings.clip_skip)
    once = {text: condition(text) for text in dict.fromkeys(texts)}
    conditional = joined(*(once[text] for text in texts))
    rare = condition(rare_tokens) if settings.residual or settings.unconditional == "rare" else None
    source = rare if settings.residual else None
    if settings.unconditional == "rare" and rare is not None:
        return conditional, source, rare
    with adapters_disabled(base) if settings.unconditional == "base" else contextlib.nullcontext():
        return conditional, source, condition(negative_prompt)


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
    the base predicts. Errors in the reconstruction of the photo cancel. At strength 1 it starts from pure noise.

    With the setting unconditional = "rare", guidance with weight w replaces x(z + d, whole prompt) by
    x(z + d, rare) + w (x(z + d, whole prompt) - x(z + d, rare)), as FlowAlign does (arXiv 2505.23145); `least_change`
    raises w where the difference is too small, see `guidance.boost`.

    Args:
        base: As for `sample`.
        size: As for `sample`.
        conditional: As for `sample`.
        rare: Condition of the rare tokens alone (of the empty prompt for the plain base), with a batch of 1;
            None for no residual.
        unconditional: As for `sample`; the rare tokens' for the setting unconditional = "rare".
        photo: As for `sample`; without it there is no residual.
        seeds: As for `sample`.
        settings: Sampling settings; with a residual, only the sampler's noise levels are used.

    Returns:
        x0, (b, c, h, w) float32.
    """
    if photo is None or rare is None:
        start = photo if settings.strength < 1 else None
        return sample(base, size, conditional, unconditional, start, seeds, settings)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shape, count = base.sample_shape(size), len(seeds)
    sampler = base.sampler(settings.steps, size, _skipped(settings))
    rare, empty = expanded(rare, count), expanded(unconditional, 2 * count)
    photo, levels = photo.expand(count, *shape), sampler.levels
    ratios = [*levels.noise_to_signal().tolist(), 0.0]
    change, strongest = torch.zeros_like(photo), None
    for level, (ratio, next_ratio) in enumerate(zip(ratios, ratios[1:], strict=False)):
        step = sampler.first_step[level]
        noise = _noise(shape, generators).to(base.device)
        if settings.unconditional == "rare" and _is_guided(sampler, step, settings):
            rows, conditions = [photo + change, photo + change, photo], [conditional, rare, rare]
        else:
            rows, conditions = [photo + change, photo], [conditional, rare]
        index = torch.full((len(rows) * count,), level)
        noisy = levels.add_noise(torch.cat(rows), noise.repeat(len(rows), 1, 1, 1), index)
        if len(rows) == 3:
            timesteps = sampler.timesteps[step].expand(len(noisy))
            output = base.predict(noisy, timesteps, joined(*conditions))
            prompted, without, redrawn = levels.clean(output, noisy, index).chunk(3)
            strongest = strongest_change(prompted - without, strongest)
            edited = _guided(without, prompted, settings, boost(strongest, settings.least_change))
        else:
            output = _guided_prediction(base, noisy, sampler, step, joined(*conditions), empty, settings)
            edited, redrawn = levels.clean(output, noisy, index).chunk(2)
        change = torch.lerp(edited - redrawn, change, next_ratio / ratio)
    return photo + change


@torch.no_grad()
def doubt(base: Base, size: tuple[int, int], photo: Tensor, empty: Condition) -> Tensor:
    """Returns how wrong the base is about each place of a photo: what it has never seen, it can't draw.

    The root mean square error of the clean image that the base predicts for the noised photo without adapter
    and prompt, over three noise levels and noise of both signs.

    Args:
        base: The base, without an active adapter.
        size: (width, height) in pixels.
        photo: x0 of the photo, (1, c, h, w).
        empty: Condition of the empty prompt by the plain base, with a batch of 1.

    Returns:
        The error in units of x0, (1, 1, h, w) float32.
    """
    schedule = base.schedule(size)
    shares = torch.tensor([schedule.share(float(timestep)) for timestep in schedule.timesteps])
    index = torch.stack([(shares - share).abs().argmin() for share in _DOUBT_SHARES]).repeat_interleave(2)
    noise = torch.randn((len(_DOUBT_SHARES), *photo.shape[1:]), generator=torch.Generator().manual_seed(0))
    noise = torch.stack([noise, -noise], 1).flatten(0, 1).to(base.device)
    clean = photo.expand_as(noise)
    noisy = schedule.add_noise(clean, noise, index)
    output = base.predict(noisy, schedule.timesteps[index].to(base.device), expanded(empty, len(noisy)))
    error = schedule.clean(output, noisy, index) - clean
    return error.square().mean((0, 1), keepdim=True).sqrt()


_DOUBT_SHARES = (0.45, 0.6, 0.75)  # of the denoising


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
    count, timesteps = len(noisy), sampler.timesteps[step].expand(len(noisy))
    if not _is_guided(sampler, step, settings):
        return base.predict(noisy, timesteps, conditional)
    is_base = settings.unconditional == "base"
    with adapters_for_last(base, count) if is_base else contextlib.nullcontext():
        both = joined(unconditional, conditional)
        without, prompted = base.predict(torch.cat([noisy] * 2), timesteps.repeat(2), both).chunk(2)
    return _guided(without, prompted, settings)


def _is_guided(sampler: Sampler, step: int, settings: EditSettings) -> bool:
    """Returns whether a step is in the guidance interval."""
    return settings.guidance != 1 and settings.guidance_start <= sampler.shares[step] < settings.guidance_stop


def _guided(
    without: Tensor, prompted: Tensor, settings: EditSettings, factor: Tensor | float = 1.0
) -> Tensor:
    """Returns the guided prediction (b, c, h, w), rescaled; the factor multiplies the weight of each sample."""
    guided = classifier_free_guidance(without, prompted, settings.guidance * factor)
    if settings.guidance_rescale > 0:
        guided = rescale_guidance(guided, prompted, settings.guidance_rescale)
    return guided
