"""A device's memory during a fit: offloading of unused modules, and smaller steps when memory runs out."""

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
    """Inside the `with` block, unused modules are offloaded to the CPU."""
    try:
        for module in modules:
            module.to("cpu")
        yield
    finally:
        for module in modules:
            module.to(device)


@contextlib.contextmanager
def checkpointing(base: Base, wanted: bool) -> Iterator[Callable[[bool], None]]:
    """Gradient checkpointing: recomputes activations in the backward pass (arXiv 1604.06174).

    Yields a function that switches it on or off; it is switched off at the end.
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
    """Calls a function and returns its result, or None if memory runs out; its memory is freed by then."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None


def with_less_memory(settings: FitSettings, step: int) -> tuple[FitSettings, str]:
    """Returns settings that need less memory for the same result, and a note for the user.

    Raises:
        FitError: Memory can't be reduced any further.
    """
    reason = f"memory ran out at step {step + 1}"
    if not settings.gradient_checkpointing:
        changed = replace(settings, gradient_checkpointing=True)
        return changed, f"{reason}: the fit continues, slower, with activations recomputed"
    if settings.batch_size == 1:
        raise FitError(
            f"{reason} with one noised copy at a time and activations recomputed; lower photo.size or the "
            "ranks, close other programs, or pass device='cpu'"
        )
    size = next(n for n in range(settings.batch_size - 1, 0, -1) if settings.batch_size % n == 0)
    parts = settings.gradient_accumulation * settings.batch_size // size
    changed = replace(settings, batch_size=size, gradient_accumulation=parts)
    return changed, f"{reason}: the fit continues with {size} noised copies at a time, {parts} times a step"
