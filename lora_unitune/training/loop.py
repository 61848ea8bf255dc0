"""The training loop, on pairs (noised photo, rare tokens)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from lora_unitune.adapter import layers
from lora_unitune.errors import FitError, SettingError
from lora_unitune.families import Base, Condition, expanded
from lora_unitune.families.schedule import NoiseSchedule
from lora_unitune.recipe import Recipe
from lora_unitune.settings import FitSettings
from lora_unitune.training.memory import checkpointing, offloaded, unless_out_of_memory, with_less_memory
from lora_unitune.training.optimizers import make_optimizer
from lora_unitune.training.prepare import Prepared

OnStep = Callable[[int, int, float], None]
"""Callback after each optimizer step, with the step (from 1), the number of steps, and the step's loss."""

OnNote = Callable[[str], None]
"""Callback for notes to the user, one sentence each."""


@dataclass(frozen=True)
class History:
    """The result of a training run.

    Attributes:
        losses: Loss of each step.
        seconds: Total duration in seconds.
    """

    losses: tuple[float, ...]
    seconds: float


def train(
    prepared: Prepared,
    base: Base,
    recipe: Recipe,
    generator: torch.Generator,
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> History:
    """Trains all parameters of the base that require gradients on pairs (noised photo, rare tokens).

    A step draws all random numbers for its whole batch at once, so gradient accumulation changes only memory use.
    When memory runs out, the step is repeated with less: first with gradient checkpointing, then with smaller
    micro-batches.

    Args:
        prepared: The photo's posterior, its size and the rare tokens.
        base: The base, with adapters attached or with its own weights made trainable.
        recipe: The recipe, whose `fit` and learning rates of `lora` are used.
        generator: Generator of the posterior samples, the noise and the noise levels, on the CPU.
        on_step: Callback after each step.
        on_note: Callback when memory runs out and the fit continues with less.

    Raises:
        FitError: The loss is no longer finite, or there isn't enough memory for one noised copy.
        SettingError: The device doesn't support the precision.
    """
    settings, parameters = recipe.fit, layers.trainable_parameters(base)
    accelerator = _accelerator(settings, base.device)
    groups: list[dict[str, Any]] = [
        {"params": trained, "lr": recipe.lora[part].learning_rate} for part, trained in parameters.items()
    ]
    optimizer = make_optimizer(settings.optimizer, groups, settings.weight_decay)
    optimizer = accelerator.prepare_optimizer(optimizer)
    weights = [parameter for group in groups for parameter in group["params"]]
    trains_encoder = bool(parameters.keys() - {base.family.denoiser})
    condition = _prompt_condition(prepared, base, recipe.edit.clip_skip, accelerator, trained=trains_encoder)
    schedule = base.schedule(prepared.size)
    others = [part for name, part in base.parts.items() if name != base.family.denoiser]
    idle = [*base.frozen.values(), *([] if trains_encoder else others)]

    def take_step() -> float:
        loss = 0.0
        for clean, noise, index in _micro_batches(prepared, schedule, settings, generator, base.device):
            with accelerator.accumulate(*base.parts.values()):
                with accelerator.autocast():
                    error = denoising_error(base, schedule, clean, noise, index, condition())
                accelerator.backward(error)
                if accelerator.sync_gradients and settings.max_gradient_norm > 0:
                    accelerator.clip_grad_norm_(weights, settings.max_gradient_norm)
                optimizer.step()
                optimizer.zero_grad()
                loss += error.item() / settings.gradient_accumulation
        return loss

    losses: list[float] = []
    started = time.perf_counter()
    with offloaded(idle, base.device), checkpointing(base, settings.gradient_checkpointing) as recompute:
        while len(losses) < settings.steps:
            _set_rates(optimizer, groups, len(losses), settings)
            before = generator.get_state()
            loss = unless_out_of_memory(take_step)
            if loss is None:
                settings, note = with_less_memory(settings, len(losses))
                recompute(settings.gradient_checkpointing)
                for parameter in weights:
                    parameter.grad = None
                generator.set_state(before)
                accelerator.step, accelerator.gradient_accumulation_steps = 0, settings.gradient_accumulation
                torch.cuda.empty_cache()
                if on_note is not None:
                    on_note(note)
                continue
            _check_loss(loss, len(losses), recipe)
            losses.append(loss)
            if on_step is not None:
                on_step(len(losses), settings.steps, loss)
    optimizer.state.clear()  # accelerate's reference cycle would keep it, twice the size of the weights, in memory
    return History(tuple(losses), time.perf_counter() - started)


def denoising_error(
    base: Base, schedule: NoiseSchedule, clean: Tensor, noise: Tensor, index: Tensor, condition: Condition
) -> Tensor:
    """Returns the mean squared error of the base's prediction (arXiv 2006.11239, equation 14), a scalar.

    Args:
        base: The base.
        schedule: The base's noise levels.
        clean: x0, (b, c, h, w).
        noise: Standard normal noise, same shape.
        index: Indices of the noise levels, (b,) int64 on the CPU.
        condition: Condition of the prompt, with a batch of 1.
    """
    noisy, count = schedule.add_noise(clean, noise, index), len(clean)
    prediction = base.predict(noisy, schedule.timesteps[index].to(base.device), expanded(condition, count))
    target = schedule.target(clean, noise, index)
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def precision_for(name: str, device: torch.device) -> str:
    """Returns accelerate's name of a precision; "auto" is bf16 or fp16 on CUDA, fp32 elsewhere.

    Raises:
        SettingError: The device doesn't support it.
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


def _micro_batches(
    prepared: Prepared,
    schedule: NoiseSchedule,
    settings: FitSettings,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draws x0, noise and levels of one optimizer step, and yields them in micro-batches.

    x0 are new samples of the photo's posterior (arXiv 2112.10752, section 3.1).
    """
    batch = settings.batch_size * settings.gradient_accumulation
    shape = (batch, *prepared.mean.shape[1:])
    clean = prepared.mean + prepared.std * torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    index = schedule.draw(batch, generator)
    size = settings.batch_size
    drawn = (clean.to(device), noise.to(device), index)
    yield from zip(*(torch.split(tensor, size) for tensor in drawn), strict=True)


def _prompt_condition(
    prepared: Prepared, base: Base, clip_skip: int, accelerator: Accelerator, trained: bool
) -> Callable[[], Condition]:
    """Returns a function that computes the rare tokens' condition; cached if training doesn't change it."""
    if trained:
        return lambda: base.condition(prepared.rare_tokens, clip_skip)
    with torch.no_grad(), accelerator.autocast():
        condition = base.condition(prepared.rare_tokens, clip_skip)
    return lambda: condition


def _set_rates(optimizer: Any, groups: list[dict[str, Any]], step: int, settings: FitSettings) -> None:
    """Sets the learning rates of a step, counted from 0: linear warm-up and linear decay."""
    factor = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.decay_share > 0:
        factor = min(factor, (settings.steps - step) / (settings.decay_share * settings.steps))
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["lr"] = group["lr"] * factor


def _check_loss(loss: float, step: int, recipe: Recipe) -> None:
    if not math.isfinite(loss):
        rates = ", ".join(f"lora.{p}.learning_rate ({s.learning_rate:g})" for p, s in recipe.lora.items())
        raise FitError(
            f"the loss is no longer finite at step {step + 1}; lower {rates}, or use fit.precision=fp32"
        )


def _accelerator(settings: FitSettings, device: torch.device) -> Accelerator:
    """Returns a new Accelerator for this fit's precision and accumulation.

    accelerate keeps one global state and refuses to change it, so it is reset for each fit.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision_for(settings.precision, device),
        gradient_accumulation_steps=settings.gradient_accumulation,
    )
