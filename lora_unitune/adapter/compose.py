"""Adapters that are exactly a LoRA in other factors: LoCon with a middle tensor, and LoHa (arXiv 2108.06098).

LoCon's three convolutions are two: the middle one, k x k, is merged into the first. LoHa's change is the elementwise
product of two matrices of rank r, (W1a W1b) * (W2a W2b): a LoRA of rank r^2, whose B has the products of their
columns and whose A those of their rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from lora_unitune.adapter.checks import AGAIN, shown
from lora_unitune.errors import AdapterFileError
from lora_unitune.families import Family
from lora_unitune.settings import LARGEST_RANK

if TYPE_CHECKING:
    from torch import Tensor

_A, _B, _MID = "lora_A.weight", "lora_B.weight", "lora_mid.weight"
_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")

Shape = tuple[int, ...]
Value = TypeVar("Value")


def plain_shapes(name: str, shapes: Mapping[str, Shape]) -> tuple[dict[str, Shape], dict[str, int]]:
    """Returns the shapes of A and B of every layer, and the original ranks of the layers that are composed.

    Args:
        name: Name of the file in messages.
        shapes: Shapes of its tensors, by "<part>.<module>.lora_A.weight", "...lora_mid.weight", "...hada_w1_a", ...

    Raises:
        AdapterFileError: A layer's tensors don't belong together, or its rank as a LoRA is too high.
    """
    plain, ranks = dict(shapes), dict[str, int]()
    for layer, group in _groups(shapes).items():
        for what in group:
            del plain[f"{layer}.{what}"]
        try:
            a, b, ranks[layer] = _shapes_of(group)
        except (KeyError, ValueError):
            raise AdapterFileError(
                f"{name}: the tensors of layer {shown(layer)} don't belong together; {AGAIN}"
            ) from None
        if a[0] > LARGEST_RANK:
            raise AdapterFileError(
                f"{name} is a LoHa of rank {ranks[layer]}, which is a LoRA of rank {a[0]}, and ranks up to "
                f"{LARGEST_RANK} are supported; give a LoHa of rank {math.isqrt(LARGEST_RANK)} or lower"
            )
        plain |= {f"{layer}.{_A}": a, f"{layer}.{_B}": b}
    return plain, ranks


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns A and B of every layer, of tensors by the same keys as for `plain_shapes`."""
    result = dict(tensors)
    for layer, group in _groups(tensors).items():
        for what in group:
            del result[f"{layer}.{what}"]
        a, b = _tensors_of(group)
        result |= {f"{layer}.{_A}": a.contiguous(), f"{layer}.{_B}": b.contiguous()}
    return result


def as_convolutions(tensors: Mapping[str, Tensor], family: Family, stated: str) -> dict[str, Tensor]:
    """Returns tensors with a convolution's four dimensions, where they are matrices of a convolution.

    LoHa and some tools store matrices, which diffusers refuses.

    Args:
        tensors: Tensors by "<part>.<module>.lora_A.weight" and "...lora_B.weight"; others are kept.
        family: The base's family.
        stated: The base model that the header names, in kohya's words; "" if it names none.
    """
    kind = family.names.kind_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    result = dict(tensors)
    for key, tensor in tensors.items():
        side = family.names.kernel(
            key.removesuffix(f".{_A}").removesuffix(f".{_B}"), kind[0] if kind else stated
        )
        side = min(side, 1) if key.endswith(f".{_B}") else side
        if side and tensor.ndim == 2 and tensor.shape[1] % side**2 == 0:
            result[key] = tensor.reshape(len(tensor), -1, side, side)
    return result


def _groups(values: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Returns the tensors of each layer that has to be composed, by what they are of it."""
    marks = (f".{_MID}", *(f".{each}" for each in (*_HADAMARD, *_CORES)))
    layers = dict.fromkeys(key.removesuffix(mark) for key in values for mark in marks if key.endswith(mark))
    everything = (_A, _B, _MID, *_HADAMARD, *_CORES)
    return {
        layer: {what: values[f"{layer}.{what}"] for what in everything if f"{layer}.{what}" in values}
        for layer in layers
    }


def _shapes_of(group: Mapping[str, Shape]) -> tuple[Shape, Shape, int]:
    """Returns the shapes of one layer's A and B, and its original rank; a ValueError if they don't fit."""
    if _MID in group:
        (rank, width, *ones), (left, right, *kernel), b = group[_A], group[_MID], group[_B]
        if set(group) != {_A, _B, _MID} or ones != [1, 1] or len(kernel) != 2 or right != rank:
            raise ValueError
        return (left, width, *kernel), b, rank
    if set(group) not in ({*_HADAMARD}, {*_HADAMARD, *_CORES}):
        raise ValueError
    (a1, b1, *o1), (c1, d1, *k1), (a2, b2, *o2), (c2, d2, *k2) = (group[what] for what in _HADAMARD)
    if not set(_CORES) <= set(group):  # OneTrainer keeps a convolution's four dimensions
        if (a1, d1, k1) != (a2, d2, k2) or b1 != c1 or b2 != c2 or {*o1, *o2} - {1} or len(k1) not in (0, 2):
            raise ValueError
        return (c1 * c2, d1, *k1), (a1, b1 * b2), c1
    if o1 or o2 or k1 or k2:
        raise ValueError
    (e1, f1, *k1), (e2, f2, *k2) = (group[what] for what in _CORES)
    if (b1, d1, k1) != (b2, d2, k2) or (e1, f1, e2, f2) != (a1, c1, a2, c2) or len(k1) != 2:
        raise ValueError
    return (e1 * e2, d1, *k1), (b1, e1 * e2), c1


def _tensors_of(group: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns one layer's A and B."""
    import torch

    if _MID in group:
        return torch.einsum("rskl,si->rikl", group[_MID], group[_A].flatten(1)), group[_B]
    left1, right1, left2, right2 = (group[what] for what in _HADAMARD)
    left1, left2 = left1.flatten(1), left2.flatten(1)
    if _CORES[0] in group:
        left1, left2 = left1.T, left2.T
        right1, right2 = (
            torch.einsum("rskl,si->rikl", group[core], right)
            for core, right in zip(_CORES, (right1, right2), strict=True)
        )
    a = (right1[:, None] * right2[None]).flatten(0, 1)
    b = (left1[:, :, None] * left2[:, None, :]).flatten(1)
    return a, b
