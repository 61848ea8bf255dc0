"""A device's memory during a fit: modules that aren't needed are offloaded, and steps take less when it runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_unitune.errors import FitError
from lora_unitune.families import Base
from lora_unitune.settings import FitSettings


@contextlib.contextmanager
def offloaded(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the `with` block, modules that it doesn't need are on the CPU, out of the device's memory."""
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

    The `with` block gets a function that switches it.
    """
    denoiser: Any = base.parts[base.family.denoiser]

    def switch(on: bool) -> None:
        if on:
            denoiser.enable_gradient_checkpointing()
        else:
            denoiser.disable_gradient_checkpointing()

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
    """Returns settings that need less memory for the same result, and a note on them.

    Raises:
        FitError: there are none.
    """
    said = f"memory ran out at step {step + 1}"
    if not settings.gradient_checkpointing:
        changed = replace(settings, gradient_checkpointing=True)
        return changed, f"{said}: the fit goes on, slower, with activations recomputed"
    if settings.batch_size == 1:
        raise FitError(
            f"{said} with one noised copy at a time and activations recomputed; lower photo.size or the "
            "ranks, close other programs, or pass device='cpu'"
        )
    size = next(n for n in range(settings.batch_size - 1, 0, -1) if settings.batch_size % n == 0)
    parts = settings.gradient_accumulation * settings.batch_size // size
    changed = replace(settings, batch_size=size, gradient_accumulation=parts)
    return changed, f"{said}: the fit goes on with {size} noised copies at a time, {parts} times a step"
