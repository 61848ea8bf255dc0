"""A name -> an optimizer."""

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
"""Trained numbers from which 8-bit state saves memory that counts: .3 GB. Adapters stay far below."""


def best_for(devices: set[str], count: int) -> str:
    """Returns what "auto" stands for: 8-bit state for many weights on a GPU, where it is installed.

    Args:
        devices: kinds of device that the parameters are on.
        count: of trained numbers.
    """
    pays = devices == {"cuda"} and count >= _LARGE
    return "adamw8bit" if pays and importlib.util.find_spec("bitsandbytes") else "adamw"


def _auto(groups: Groups, weight_decay: float) -> Optimizer:
    """What suits the device and the number of parameters."""
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
"""The names `make_optimizer` knows."""


def make_optimizer(name: str, groups: Groups, weight_decay: float = 0.0) -> Optimizer:
    """Builds an optimizer.

    Args:
        name: one of `OPTIMIZERS`.
        groups: dictionaries with "params" and their learning rate "lr".
        weight_decay: decoupled, per step and learning rate (for sgd: an L2 penalty).

    Raises:
        SettingError: the name is unknown, or its library isn't installed.
        DeviceError: its library doesn't support the parameters' device.
    """
    if name not in _MAKERS:
        raise SettingError(f"fit.optimizer = '{name}' is unknown; choose one of {', '.join(OPTIMIZERS)}")
    return _MAKERS[name](groups, weight_decay)


def _bitsandbytes(name: str, groups: Groups) -> Any:
    """Imports bitsandbytes' optimizers when the device can use them.

    bitsandbytes keeps the state of tensors under 4,096 elements in 32 bits.

    Raises:
        SettingError: bitsandbytes isn't installed or can't start.
        DeviceError: it has nothing for this device.
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
