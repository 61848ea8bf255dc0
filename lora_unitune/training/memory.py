"""What a fit does about a device's memory: it keeps out what isn't needed, and makes do with less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_unitune.errors import SettingError
from lora_unitune.families import Base
from lora_unitune.recipe import FitSettings


@contextlib.contextmanager
def on_the_cpu(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the `with` block, modules that a phase doesn't need are out of the device's memory."""
    try:
        for module in modules:
            module.to("cpu")
        yield
    finally:
        for module in modules:
            module.to(device)


@contextlib.contextmanager
def checkpointing(base: Base, wanted: bool) -> Iterator[Callable[[bool], None]]:
    """Recomputes activations in the backward pass instead of keeping them (arXiv 1604.06174), if wanted.

    Gives the `with` block a function that switches it.
    """
    unet: Any = base.parts["unet"]

    def switch(on: bool) -> None:
        if on:
            unet.enable_gradient_checkpointing()
        else:
            unet.disable_gradient_checkpointing()

    switch(wanted)
    try:
        yield switch
    finally:
        switch(False)


def unless_out_of_memory(work: Callable[[], float]) -> float | None:
    """Returns what some work returns, or None if memory runs out; what the work held is free by then."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None


def with_less_memory(settings: FitSettings, step: int) -> tuple[FitSettings, str]:
    """Returns settings that need less memory for the same result, and what to tell about them.

    Raises:
        SettingError: there are none.
    """
    said = f"memory ran out at step {step + 1}"
    if not settings.gradient_checkpointing:
        changed = replace(settings, gradient_checkpointing=True)
        return changed, f"{said}: the fit goes on, slower, with activations recomputed"
    if settings.batch_size == 1:
        raise SettingError(
            f"{said} with one noised copy at a time and activations recomputed; lower photo.resolution or "
            "lora.unet_rank, close other programs, or use --device cpu"
        )
    size = next(n for n in range(settings.batch_size - 1, 0, -1) if settings.batch_size % n == 0)
    parts = settings.gradient_accumulation * settings.batch_size // size
    changed = replace(settings, batch_size=size, gradient_accumulation=parts)
    return changed, f"{said}: the fit goes on with {size} noised copies at a time, {parts} times a step"
