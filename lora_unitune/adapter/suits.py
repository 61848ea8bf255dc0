"""Whether an adapter suits a base: its fingerprint, or the layers and widths of another tool's file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.checks import shown
from lora_unitune.adapter.foreign import certain_family, stated_base
from lora_unitune.errors import AdapterFileError
from lora_unitune.families import Base


def check_fits(adapter: Adapter, base: Base) -> None:
    """Checks that an adapter was made for a base.

    Raises:
        AdapterFileError: The adapter was made for another base.
    """
    if not adapter.fingerprint:
        _check_layers_fit(adapter, base)
    elif adapter.fingerprint != base.fingerprint:
        raise AdapterFileError(
            f"the adapter was made for base {adapter.base!r} ({adapter.fingerprint}) and this is "
            f"{base.name!r} ({base.fingerprint}); choose that base, or fit the photo again on this one"
        )


def _check_layers_fit(adapter: Adapter, base: Base) -> None:
    """Checks that a base has the layers of another tool's file, each of the right width."""
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    certain, stated = certain_family(shapes, adapter.entries), stated_base(adapter.entries)
    known = f"{certain.title}" + (f" ({stated})" if stated else "") if certain else stated
    made_for = f"the adapter is for {known}" if known else "the adapter is for another base"
    advice = f"{base.name!r} is {base.family.title}; choose a base that the adapter is for"
    if certain is not None and certain is not base.family:
        raise AdapterFileError(f"{made_for}, and {advice}")
    modules: dict[str, Any] = {
        f"{part}.{name}": module for part, root in base.parts.items() for name, module in root.named_modules()
    }
    for key, shape in shapes.items():
        layer, side, _ = key.rsplit(".", 2)
        module = modules.get(layer)
        if module is None:
            raise AdapterFileError(f"{made_for}: this one has no layer {shown(layer)}; {advice}")
        ends = ("in_features", "in_channels") if side == "lora_A" else ("out_features", "out_channels")
        width = next((getattr(module, end) for end in ends if hasattr(module, end)), None)
        actual = shape[1] if side == "lora_A" else shape[0]
        kernel = math.prod(getattr(getattr(module, "base_layer", module), "kernel_size", (1,)))
        if width is not None and actual not in (width, width * kernel if side == "lora_A" else width):
            raise AdapterFileError(
                f"{made_for}: layer {shown(layer)} is of width {actual} there and {width} here; {advice}"
            )


def checked_photo(adapter: Adapter, base: Base) -> Tensor:
    """Returns the photo's x0 of an adapter, (1, c, h, w) float32 on the base's device.

    Raises:
        AdapterFileError: It isn't there, or its shape doesn't match the adapter's size.
    """
    latents = adapter.photo_latents
    shape = (1, *base.sample_shape(adapter.size_on(base)))
    if latents is None or tuple(latents.shape) != shape:
        actual = None if latents is None else tuple(latents.shape)
        raise AdapterFileError(
            f"the photo's latents in the adapter have shape {actual} instead of {shape}; fit it again"
        )
    return latents.to(base.device, torch.float32)
