"""Utilization of the device: floating-point operations of a step against the measured peak rate."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in a function."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product: the best of five runs."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def wait(device: torch.device) -> None:
    """Waits until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
