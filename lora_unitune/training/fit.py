"""The fit: a photo and rare tokens -> a trained adapter (UniTune, arXiv 2210.09477, section 3)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from lora_unitune.adapter import layers
from lora_unitune.adapter.adapter import Adapter, check_fits
from lora_unitune.adapter.checks import lora_settings
from lora_unitune.errors import SettingError
from lora_unitune.families import Base, detect_family, load_base, resolve_device
from lora_unitune.families.schedule import add_noise, mean_squared_loss, stratified_timesteps, training_target
from lora_unitune.photo.reading import load_photo
from lora_unitune.recipe import FitSettings, LoraSettings, Recipe, default_recipe
from lora_unitune.training.memory import checkpointing, on_the_cpu, unless_out_of_memory, with_less_memory
from lora_unitune.training.optimizers import make_optimizer
from lora_unitune.training.prepare import Prepared, prepare

OnStep = Callable[[int, int, float], None]
"""Called after each optimizer step with the step (from 1), the number of steps, and the step's loss."""

OnNote = Callable[[str], None]
"""Called with a sentence that a person may want to know."""

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class History:
    """What a training did: the loss of each step, and the seconds it took in all."""

    losses: tuple[float, ...]
    seconds: float


def fit(
    photo: str | Path | Image.Image,
    *,
    base: str | Base = "pocket",
    recipe: Recipe | str | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    embed_photo: bool = True,
    start: Adapter | None = None,
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> Adapter:
    """Fits a photo: teaches a base to draw it for a few rare tokens.

    Args:
        photo: an image file, or a PIL image.
        base: "pocket", a folder, a hub id, or a base in memory, which is left as it was, to the bit.
        recipe: a recipe, its name or its file; None takes the base's default.
        overrides: single settings, such as "fit.steps=50".
        seed: of everything that is drawn; the same seed gives the same tensors.
        device: where a base given by name is loaded: "auto", "cpu", "cuda" or "mps".
        embed_photo: keep the photo's latents in the adapter, so that edits can start from them.
        start: an adapter to go on from, instead of one that changes nothing; its ranks, alphas, targets and
            rare tokens are used.
        on_step: called after each step.
        on_note: called when memory runs out and the fit goes on with less.

    Returns:
        The adapter, in memory; `Adapter.save` writes it.

    Raises:
        UnituneError: a kind of it for each thing that can be wrong with what was given.
    """
    if not 0 <= seed < 2**63:
        raise SettingError(f"seed = {seed} isn't allowed; give a whole number from 0 to 2**63 - 1")
    settings = _going_on(_settings(recipe, base, overrides), start)
    loaded = _load_for_fit(base, settings.fit, device) if isinstance(base, str) else base
    if settings.fit.quantize not in ("none", loaded.quantized):
        raise SettingError(
            f"fit.quantize = '{settings.fit.quantize}' is for a base that the fit loads; give its name, or "
            "load it with load_base(..., quantize=...)"
        )
    resolution = settings.photo.resolution or loaded.resolution
    loaded.latent_shape(resolution)
    prepared = prepare(load_photo(photo, resolution), settings, loaded)
    generator = torch.Generator().manual_seed(seed)
    if start is not None:
        check_fits(start, loaded)
    with _adapted(loaded, settings, generator):
        if start is not None:
            layers.load_in_place(layers.slots(loaded), start.tensors, settings.lora)
        history = train(prepared, loaded, settings, generator, on_step, on_note)
        tensors = _full_tensors(loaded) if settings.fit.method == "full" else layers.collect(loaded)
    return Adapter(
        tensors={key: _as_saved(tensor) for key, tensor in tensors.items()},
        rare_tokens=prepared.rare_tokens,
        recipe=settings,
        base=loaded.name,
        fingerprint=loaded.fingerprint,
        photo_latents=_as_saved(prepared.latent_mean) if embed_photo else None,
        resolution=resolution,
        family=loaded.family,
        seed=seed,
        seconds=history.seconds,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )


def train(
    prepared: Prepared,
    base: Base,
    recipe: Recipe,
    generator: torch.Generator,
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> History:
    """Trains whatever requires gradients in the base on pairs (noised photo, rare tokens).

    A step draws everything for its whole batch at once, so gradient accumulation changes nothing but memory.
    Where memory runs out, the step is done again with less of it: activations are recomputed, then fewer
    noised copies go through at a time.

    Args:
        prepared: the photo's latent moments and the prompt.
        base: with adapters attached, or with its own weights made trainable.
        recipe: `fit` is used.
        generator: on the CPU; draws the posterior samples, the noise and the timesteps.
        on_step: called after each step.
        on_note: called when memory runs out and the fit goes on with less.

    Raises:
        SettingError: the loss is no longer finite, the device can't do the precision asked for, or its memory
            doesn't suffice for one noised copy.
    """
    settings = recipe.fit
    parameters = layers.trainable_parameters(base)
    accelerator = _accelerator(settings, base.device)
    groups: list[dict[str, Any]] = [
        {
            "params": found,
            "lr": settings.unet_learning_rate if part == "unet" else settings.text_encoder_learning_rate,
        }
        for part, found in parameters.items()
    ]
    optimizer = make_optimizer(settings.optimizer, groups, settings.weight_decay)
    optimizer = accelerator.prepare_optimizer(optimizer)
    trained = [parameter for group in groups for parameter in group["params"]]
    learns_words = parameters.keys() > {"unet"}
    embed = _prompt_encoder(prepared, base, accelerator, trained=learns_words)
    idle = [base.vae, *(part for name, part in base.parts.items() if name != "unet" and not learns_words)]

    def take_step() -> float:
        loss = 0.0
        for latents, noise, timesteps in _micro_batches(prepared, base, settings, generator):
            with accelerator.accumulate(*base.parts.values()):
                with accelerator.autocast():
                    error = _error(base, latents, noise, timesteps, embed())
                accelerator.backward(error)
                if accelerator.sync_gradients and settings.max_gradient_norm > 0:
                    accelerator.clip_grad_norm_(trained, settings.max_gradient_norm)
                optimizer.step()
                optimizer.zero_grad()
                loss += error.item() / settings.gradient_accumulation
        return loss

    losses: list[float] = []
    started = time.perf_counter()
    with on_the_cpu(idle, base.device), checkpointing(base, settings.gradient_checkpointing) as recompute:
        while len(losses) < settings.steps:
            _set_rates(optimizer, groups, len(losses), settings)
            before = generator.get_state()
            loss = unless_out_of_memory(take_step)
            if loss is None:
                settings, note = with_less_memory(settings, len(losses))
                recompute(settings.gradient_checkpointing)
                for parameter in trained:
                    parameter.grad = None
                generator.set_state(before)
                accelerator.step, accelerator.gradient_accumulation_steps = 0, settings.gradient_accumulation
                torch.cuda.empty_cache()
                if on_note is not None:
                    on_note(note)
                continue
            _check_loss(loss, len(losses), settings)
            losses.append(loss)
            if on_step is not None:
                on_step(len(losses), settings.steps, loss)
    optimizer.state.clear()  # accelerate's references to it form a cycle, which keeps twice the model alive
    return History(tuple(losses), time.perf_counter() - started)


def _as_saved(tensor: Tensor) -> Tensor:
    """Rounds to the half precision of an adapter file, so that saving and loading changes nothing."""
    return tensor.half().float()


def _error(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    """Returns the loss of noised copies of the photo, a scalar; embeddings are (1, L, width)."""
    alphas = base.alphas_cumprod
    noised = add_noise(latents, noise, timesteps, alphas)
    prediction = base.predict(noised, timesteps, embeddings.expand(len(latents), -1, -1))
    return mean_squared_loss(
        prediction, training_target(latents, noise, timesteps, alphas, base.prediction_type)
    )


def _micro_batches(
    prepared: Prepared, base: Base, settings: FitSettings, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draws one optimizer step's latents, noise and timesteps, and hands them out a forward pass at a time.

    The latents are fresh samples of the VAE's posterior (arXiv 2112.10752, section 3.1).
    """
    batch = settings.batch_size * settings.gradient_accumulation
    shape = (batch, *prepared.latent_mean.shape[1:])
    latents = prepared.latent_mean + prepared.latent_std * torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    timesteps = stratified_timesteps(batch, len(base.alphas_cumprod), generator)
    size = settings.batch_size
    drawn = [torch.split(tensor.to(base.device), size) for tensor in (latents, noise, timesteps)]
    yield from zip(*drawn, strict=True)


def _prompt_encoder(
    prepared: Prepared, base: Base, accelerator: Accelerator, trained: bool
) -> Callable[[], Tensor]:
    """Returns a function that gives the prompt's embeddings (1, L, width), cached if nothing changes them."""
    if trained:
        return lambda: base.embed(prepared.prompt_ids)
    with torch.no_grad(), accelerator.autocast():
        embeddings = base.embed(prepared.prompt_ids)
    return lambda: embeddings


def _set_rates(optimizer: Any, groups: list[dict[str, Any]], step: int, settings: FitSettings) -> None:
    """Sets the learning rates of a step, from 0: a linear rise at first, a linear fall at the end."""
    factor = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.decay_share > 0:
        factor = min(factor, (settings.steps - step) / (settings.decay_share * settings.steps))
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["lr"] = group["lr"] * factor


def _check_loss(loss: float, step: int, settings: FitSettings) -> None:
    if not math.isfinite(loss):
        raise SettingError(
            f"the loss is no longer finite at step {step + 1}; lower fit.unet_learning_rate "
            f"({settings.unet_learning_rate:g}) and fit.text_encoder_learning_rate "
            f"({settings.text_encoder_learning_rate:g}), or use fit.precision=fp32"
        )


def _precision(name: str, device: torch.device) -> str:
    """Returns accelerate's name of a precision; "auto" is bf16 or fp16 on CUDA, fp32 elsewhere.

    Raises:
        SettingError: the device can't do it.
    """
    has_bf16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    if name == "auto":
        name = ("bf16" if has_bf16 else "fp16") if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise SettingError(f"fit.precision = 'fp16' needs a CUDA GPU, not '{device.type}'; use fp32 or auto")
    if name == "bf16" and not has_bf16:
        raise SettingError(
            f"fit.precision = 'bf16' doesn't run on this '{device.type}' device; use fp32 or auto"
        )
    return "no" if name == "fp32" else name


def _accelerator(settings: FitSettings, device: torch.device) -> Accelerator:
    """Returns a fresh Accelerator for this fit's precision and accumulation.

    accelerate keeps one global state and refuses to change it, while each fit may differ: so it starts over.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=_precision(settings.precision, device),
        gradient_accumulation_steps=settings.gradient_accumulation,
    )


@contextlib.contextmanager
def _adapted(base: Base, recipe: Recipe, generator: torch.Generator) -> Iterator[None]:
    """Makes the base trainable as the recipe says, and restores it to the bit, whatever happens."""
    layers.detach(base)
    if recipe.fit.method == "full":
        with _full_weights(base, recipe.lora):
            yield
        return
    try:
        layers.attach(base, recipe.lora, generator)
        yield
    finally:
        layers.detach(base)


@contextlib.contextmanager
def _full_weights(base: Base, lora: LoraSettings) -> Iterator[None]:
    """Makes all weights of the parts whose rank isn't 0 trainable; restores them afterwards.

    Raises:
        SettingError: the base's weights are in half precision, in which small updates are lost.
    """
    if base.dtype != torch.float32:
        raise SettingError("fit.method = 'full' needs a base in float32; load it with dtype=torch.float32")
    parts = [module for part, module in base.parts.items() if lora_settings(lora, part).rank]
    weights = [weight for part in parts for weight in part.parameters()]
    originals = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights]
    try:
        for weight, _ in originals:
            weight.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.requires_grad_(False).copy_(original)
                weight.grad = None


def _full_tensors(base: Base) -> dict[str, Tensor]:
    """Returns copies of all trained weights, float32 on the CPU, by "<part>.<parameter name>"."""
    return {
        f"{part}.{name}": weight.detach().to("cpu", torch.float32, copy=True)
        for part, module in base.parts.items()
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def _settings(recipe: Recipe | str | None, base: str | Base, overrides: Sequence[str]) -> Recipe:
    """Returns the recipe of a fit, with the overrides applied."""
    if isinstance(recipe, str):
        recipe = Recipe.load(recipe)
    elif recipe is None:
        name, family = (base, detect_family(base)[0]) if isinstance(base, str) else (base.name, base.family)
        recipe = default_recipe(name, family)
    return recipe.override(list(overrides))


def _going_on(recipe: Recipe, start: Adapter | None) -> Recipe:
    """Returns the recipe of a fit that goes on from an adapter: its layers, and its rare tokens."""
    if start is None:
        return recipe
    if "full" in (recipe.fit.method, start.recipe.fit.method):
        raise SettingError("a fit can go on from an adapter of method 'lora' only, and with that method")
    tokens = recipe.prompt.rare_tokens or start.rare_tokens
    return replace(recipe, lora=start.recipe.lora, prompt=replace(recipe.prompt, rare_tokens=tokens))


def _load_for_fit(name: str, settings: FitSettings, device: str) -> Base:
    """Loads a base in the precision its frozen weights need: the fit's own on a GPU, float32 elsewhere."""
    if settings.method == "full" and settings.quantize != "none":
        raise SettingError("fit.quantize is for method 'lora': rounded weights can't be trained; use none")
    target = resolve_device(device)
    dtype = _DTYPES[_precision(settings.precision, target)]
    if settings.method == "full" or target.type == "cpu":
        dtype = torch.float32
    return load_base(name, device, dtype, settings.quantize)
