"""Adapter tensors in 8 bits: int8 values, and a scale for each rank of each matrix (arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

INT8_SUFFIX = ".int8"
"""Suffix of the key of an int8 matrix in a file, instead of ".weight", so that no other tool misreads it."""

SCALES_KEY = "lora_unitune.scales"


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Quantizes matrices to int8, with all scales in one tensor; packing an unpacked result again is exact.

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
    """Dequantizes the result of `pack` to float32."""
    wholes = {key: tensor for key, tensor in sorted(packed.items()) if key != SCALES_KEY}
    ranks = [tensor.shape[rank_axis(key)] for key, tensor in wholes.items()]
    scales = packed[SCALES_KEY].split(ranks)
    return {
        key: tensor.float() * _along(scale, tensor, key)
        for (key, tensor), scale in zip(wholes.items(), scales, strict=True)
    }


def rank_axis(key: str) -> int:
    """Returns the dimension of a tensor that indexes its ranks: 0 for A, 1 for B."""
    return 0 if ".lora_A." in key else 1


def _along(scale: Tensor, tensor: Tensor, key: str) -> Tensor:
    """Returns scales (rank,) as float32, shaped to broadcast along a tensor's ranks."""
    shape = [1] * tensor.ndim
    shape[rank_axis(key)] = -1
    return scale.float().view(shape)
