"""Adapter tensors in 8 bits: whole numbers, and a scale for each rank of each matrix (arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = ".int8"
"""What such a matrix's name ends with in a file, instead of ".weight"; so no other tool misreads it."""

SCALES_KEY = "lora_unitune.scales"


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns each matrix as int8, and all scales in one tensor; packing again what was unpacked is exact.

    Args:
        tensors: Matrices by "<part>.<module>.lora_A.weight" (rank, in, ...) and "...lora_B.weight"
            (out, rank, ...).

    Returns:
        The matrices by the same names, and float16 scales (ranks of all matrices,) in the order of the names.
    """
    import torch

    packed: dict[str, Tensor] = {}
    scales: list[Tensor] = []
    for key, tensor in sorted(tensors.items()):
        others = [dimension for dimension in range(tensor.ndim) if dimension != rank_axis(key)]
        scale = (tensor.float().abs().amax(others) / 127).clamp(min=2.0**-24).half()
        whole = (tensor.float() / _along(scale, tensor, key)).round().clamp(-127, 127)
        packed[key] = whole.to(torch.int8)
        scales.append(scale)
    return {**packed, SCALES_KEY: torch.cat(scales)}


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what `pack` was given, in float32, as near as 8 bits come."""
    wholes = {key: tensor for key, tensor in sorted(packed.items()) if key != SCALES_KEY}
    ranks = [tensor.shape[rank_axis(key)] for key, tensor in wholes.items()]
    scales = packed[SCALES_KEY].split(ranks)
    return {
        key: tensor.float() * _along(scale, tensor, key)
        for (key, tensor), scale in zip(wholes.items(), scales, strict=True)
    }


def rank_axis(key: str) -> int:
    """Returns which dimension of a tensor counts its ranks: the first of A, the second of B."""
    return 0 if ".lora_A." in key else 1


def _along(scale: Tensor, tensor: Tensor, key: str) -> Tensor:
    """Returns scales (rank,) as float32 in a shape that multiplies a tensor along its ranks."""
    shape = [1] * tensor.ndim
    shape[rank_axis(key)] = -1
    return scale.float().view(shape)
