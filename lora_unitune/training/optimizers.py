"""Optimizers by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lora_unitune.errors import DeviceError, SettingError

Groups = Sequence[dict[str, Any]]

_FUSED_DEVICES = {"cpu", "cuda", "mps"}


def _adamw(groups: Groups, weight_decay: float) -> Optimizer:
    """AdamW (arXiv 1711.05101), in PyTorch's fused form where the device has one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(list(groups), weight_decay=weight_decay, fused=devices <= _FUSED_DEVICES)


def _sgd(groups: Groups, weight_decay: float) -> Optimizer:
    """Plain stochastic gradient descent: no state at all."""
    return torch.optim.SGD(list(groups), weight_decay=weight_decay)


def _adamw8bit(groups: Groups, weight_decay: float) -> Optimizer:
    """AdamW with 8-bit block-wise state (arXiv 2110.02861)."""
    return _bitsandbytes("adamw8bit", groups).AdamW8bit(list(groups), weight_decay=weight_decay)  # type: ignore[no-any-return]


def _paged_adamw8bit(groups: Groups, weight_decay: float) -> Optimizer:
    """The same with state that moves to the CPU when the GPU is full (arXiv 2305.14314, section 3)."""
    library = _bitsandbytes("paged_adamw8bit", groups)
    return library.PagedAdamW8bit(list(groups), weight_decay=weight_decay)  # type: ignore[no-any-return]


_LARGE = 50_000_000
"""Number of trained parameters from which 8-bit state saves considerable memory (0.3 GB); adapters have far fewer."""


def best_for(devices: set[str], count: int) -> str:
    """Returns the optimizer of "auto": 8-bit state for many parameters on a GPU, if bitsandbytes is installed.

    Args:
        devices: Device types of the parameters.
        count: Number of trained parameters.
    """
    pays = devices == {"cuda"} and count >= _LARGE
    return "adamw8bit" if pays and importlib.util.find_spec("bitsandbytes") else "adamw"


def _auto(groups: Groups, weight_decay: float) -> Optimizer:
    """The optimizer of `best_for`."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    devices = {parameter.device.type for parameter in parameters}
    return _MAKERS[best_for(devices, sum(p.numel() for p in parameters))](groups, weight_decay)


_MAKERS: dict[str, Callable[[Groups, float], Optimizer]] = {
    "auto": _auto,
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "paged_adamw8bit": _paged_adamw8bit,
    "sgd": _sgd,
}

OPTIMIZERS: tuple[str, ...] = tuple(_MAKERS)
"""The names that `make_optimizer` accepts."""


def make_optimizer(name: str, groups: Groups, weight_decay: float = 0.0) -> Optimizer:
    """Builds an optimizer.

    Args:
        name: One of `OPTIMIZERS`.
        groups: Parameter groups with "params" and "lr".
        weight_decay: Decoupled weight decay (for sgd: an L2 penalty).

    Raises:
        SettingError: The name is unknown, or its library isn't installed.
        DeviceError: The library doesn't support the parameters' device.
    """
    if name not in _MAKERS:
        raise SettingError(f"fit.optimizer = '{name}' is unknown; choose one of {', '.join(OPTIMIZERS)}")
    return _MAKERS[name](groups, weight_decay)


def _bitsandbytes(name: str, groups: Groups) -> Any:
    """Imports bitsandbytes' optimizers if they support the device.

    bitsandbytes keeps the state of tensors under 4,096 elements in 32 bits.

    Raises:
        SettingError: bitsandbytes isn't installed or can't be imported.
        DeviceError: bitsandbytes doesn't support the device.
    """
    for device in {parameter.device.type for group in groups for parameter in group["params"]}:
        if device not in ("cpu", "cuda"):
            raise DeviceError(f"fit.optimizer = '{name}' doesn't run on '{device}'; use fit.optimizer=adamw")
    try:
        import bitsandbytes.optim
    except (ImportError, OSError, RuntimeError) as error:
        raise SettingError(
            f"fit.optimizer = '{name}' needs bitsandbytes, which can't be imported ({type(error).__name__}); "
            "install bitsandbytes or use fit.optimizer=adamw"
        ) from error
    return bitsandbytes.optim
