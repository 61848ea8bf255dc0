"""Adapters used together: the sum of their changes of the weights, B1 A1 + w B2 A2, is a LoRA of higher rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.checks import layers_of
from lora_unitune.adapter.foreign import remade
from lora_unitune.errors import AdapterFileError, SettingError
from lora_unitune.settings import LARGEST_RANK, LoraSettings

_A, _B = "lora_A.weight", "lora_B.weight"


def stacked(adapter: Adapter, other: Adapter, scale: float = 1.0) -> Adapter:
    """Returns an adapter that changes the weights as two together do; its photo, words and recipe are the first's.

    Args:
        adapter: Adapter of a photo.
        other: Another LoRA for the same base, such as one of a style. Its trigger words have to be in the prompts.
        scale: Factor of its change of the weights.

    Raises:
        SettingError: One of them isn't a plain LoRA, or their ranks are too high together.
        AdapterFileError: They are for different bases.
    """
    if not (adapter.is_low_rank and other.is_low_rank):
        raise SettingError(
            "only adapters of method 'lora' that aren't a DoRA can be used together; give others"
        )
    prints = {each.fingerprint for each in (adapter, other) if each.fingerprint}
    if adapter.family != other.family or len(prints) > 1:
        raise AdapterFileError(
            f"one adapter is for {adapter.kind.title}, base {adapter.base!r}, and the other for {other.kind.title}, "
            f"base {other.base!r}; give two for the same base"
        )
    tensors: dict[str, Tensor] = {}
    lora: dict[str, LoraSettings] = {}
    for part in adapter.parts:
        common = adapter.scale_of(part) or other.scale_of(part)
        factors = [(adapter, 1.0), (other, scale * other.scale_of(part) / common if common else 0.0)]
        ranks = dict[str, int]()
        for layer in dict.fromkeys(layer for each, _ in factors for layer in layers_of(each.tensors, part)):
            pairs = [
                (each.tensors[f"{layer}.{_A}"], each.tensors[f"{layer}.{_B}"] * factor)
                for each, factor in factors
                if f"{layer}.{_A}" in each.tensors
            ]
            axes = max(a.ndim for a, _ in pairs)  # a 1 x 1 convolution may be stored as a matrix
            downs, ups = zip(*[[_with_axes(each, axes) for each in pair] for pair in pairs], strict=True)
            tensors |= {f"{layer}.{_A}": torch.cat(downs), f"{layer}.{_B}": torch.cat(ups, 1)}
            ranks[layer.removeprefix(f"{part}.")] = len(tensors[f"{layer}.{_A}"])
        rank = max(ranks.values(), default=0)
        if rank > LARGEST_RANK:
            raise SettingError(
                f"the two have rank {rank} together, and ranks up to {LARGEST_RANK} are supported; compress one"
            )
        lora[part] = LoraSettings(rank, alpha=rank * common, targets=tuple(sorted(ranks)))
    return replace(adapter, tensors=tensors, recipe=remade(adapter.recipe, lora))


def _with_axes(tensor: Tensor, count: int) -> Tensor:
    """Returns a tensor with more dimensions, of 1."""
    return tensor.reshape(*tensor.shape, *[1] * (count - tensor.ndim))
