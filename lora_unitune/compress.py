"""Smaller adapter files: each layer keeps only as many ranks as earn their bytes.

A layer's change of its weights is B A. Its singular values say how much each further rank adds; over all
layers together, those that add least for their bytes go first (Eckart and Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_unitune.adapter_file import Adapter
from lora_unitune.errors import SettingError
from lora_unitune.families import Base
from lora_unitune.mount import Mount
from lora_unitune.objective import add_noise


@dataclass(frozen=True)
class Compressed:
    """An adapter with lower ranks.

    Attributes:
        adapter: its layers' ranks differ, and layers that earn no rank are gone.
        kept: share of the change's energy, the sum of its squared singular values, that is left.
        ranks: how many there were, and how many are left, over all layers.
    """

    adapter: Adapter
    kept: float
    ranks: tuple[int, int]


@dataclass(frozen=True)
class _Layer:
    """One layer's change, taken apart: B A = left diag(values) right."""

    part: str
    module: str
    left: Tensor
    values: Tensor
    right: Tensor
    shapes: tuple[torch.Size, torch.Size]

    @property
    def numbers(self) -> int:
        """How many numbers a rank takes."""
        return len(self.left) + self.right.shape[1]


def compress(adapter: Adapter, keep: float | None = None, to_bytes: int | None = None) -> Compressed:
    """Cuts ranks that add little.

    Args:
        adapter: of method "lora".
        keep: share of the change's energy to keep at least, above 0 to 1.
        to_bytes: size that the tensors of a float16 file may have at most; its header comes on top.

    Returns:
        The adapter with lower ranks, and what was lost.

    Raises:
        SettingError: not exactly one of the limits is given, one is impossible, or the method is "full".
    """
    if (keep is None) == (to_bytes is None):
        raise SettingError("give one limit: --keep SHARE or --to-bytes N")
    if keep is not None and not 0 < keep <= 1:
        raise SettingError(f"keep = {keep:g} isn't allowed; give a share above 0 and up to 1, such as 0.99")
    if adapter.recipe.fit.method != "lora":
        raise SettingError("only adapters of method 'lora' can be compressed; fit the photo with 'lora'")
    layers = _taken_apart(adapter)
    order = sorted(
        ((layer.values[rank].item() ** 2 / layer.numbers, number, rank)
         for number, layer in enumerate(layers) for rank in range(len(layer.values))),
        reverse=True,
    )  # fmt: skip
    energy = sum(layer.values.square().sum().item() for layer in layers)
    room = None if to_bytes is None else to_bytes // 2 - _photo_numbers(adapter)
    ranks, kept, used = [0] * len(layers), 0.0, 0
    for worth, number, _ in order:
        size = layers[number].numbers
        if (keep is not None and kept >= keep * energy) or (room is not None and used + size > room):
            break
        ranks[number] += 1
        kept, used = kept + worth * size, used + size
    if not any(ranks[number] for number, layer in enumerate(layers) if layer.part == "unet"):
        raise SettingError(f"{to_bytes} bytes leave no rank of any layer of the UNet; give more")
    share = kept / energy if energy else 1.0
    total = sum(len(layer.values) for layer in layers)
    return Compressed(_put_together(adapter, layers, ranks), share, (total, sum(ranks)))


@torch.no_grad()
def effect_lost(base: Base, before: Adapter, after: Adapter) -> float:
    """Returns which share of an adapter's effect another, made from it, lacks.

    The effect is the difference that the adapter makes to the UNet's predictions: root mean square, over
    its noised photo (noise alone, if the file doesn't hold the photo) at ten timesteps.

    Args:
        base: that both were made for; left as it was.
        before: the adapter.
        after: made from it.

    Raises:
        AdapterFileError: one doesn't suit the base.
    """
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.arange(10) * (len(base.alphas_cumprod) // 10) + len(base.alphas_cumprod) // 20
    shape = (10, *base.latent_shape(before.resolution))
    clean = torch.zeros(shape) if before.photo_latents is None else before.photo_latents.expand(shape)
    noised = add_noise(clean, torch.randn(shape, generator=generator), timesteps, base.alphas_cumprod)
    mount, predictions = Mount(base), list[Tensor]()
    ids, _ = base.tokenize(before.rare_tokens)
    for adapter in (None, before, after):
        mount.use(adapter, 1.0)
        predictions.append(base.predict(noised, timesteps, base.embed(ids).expand(10, -1, -1)))
    mount.release()
    plain, whole, cut = predictions
    return float(
        (cut - whole).square().mean().sqrt() / (whole - plain).square().mean().sqrt().clamp(min=1e-12)
    )


def _photo_numbers(adapter: Adapter) -> int:
    return 0 if adapter.photo_latents is None else adapter.photo_latents.numel()


def _taken_apart(adapter: Adapter) -> list[_Layer]:
    """Returns every layer's change by its singular values, the largest first, without the zeros."""
    layers = []
    for key in sorted(key for key in adapter.tensors if key.endswith(".lora_A.weight")):
        path = key.removesuffix(".lora_A.weight")
        part, _, module = path.partition(".")
        a, b = adapter.tensors[key].double(), adapter.tensors[f"{path}.lora_B.weight"].double()
        shapes = (a.shape, b.shape)
        outer, upper = torch.linalg.qr(b.flatten(1))
        inner, lower = torch.linalg.qr(a.flatten(1).T)
        left, values, right = torch.linalg.svd(upper @ lower.T)
        rank = len(values)
        scaled = values * adapter.scale_of(part)
        found = int((scaled > 1e-9 * scaled.max().clamp(min=1e-30)).sum())
        layers.append(
            _Layer(
                part,
                module,
                (outer @ left)[:, :found],
                scaled[:found],
                (right @ inner.T)[:rank][:found],
                shapes,
            )
        )
    return layers


def _put_together(adapter: Adapter, layers: list[_Layer], ranks: list[int]) -> Adapter:
    """Returns an adapter of the layers that kept a rank, with alpha = rank throughout."""
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, int]] = {part: {} for part in adapter.parts}
    for layer, rank in zip(layers, ranks, strict=True):
        if not rank:
            continue
        root = layer.values[:rank].sqrt()
        a, b = root[:, None] * layer.right[:rank], layer.left[:, :rank] * root
        path = f"{layer.part}.{layer.module}"
        tensors[f"{path}.lora_A.weight"] = a.reshape(rank, *layer.shapes[0][1:]).half().float()
        tensors[f"{path}.lora_B.weight"] = (
            b.reshape(layer.shapes[1][0], rank, *layer.shapes[1][2:]).half().float()
        )
        modules[layer.part][layer.module] = rank
    lora = adapter.recipe.lora
    for part, found in modules.items():
        most = max(found.values(), default=0)
        changes: dict[str, Any] = {f"{part}_rank": most, f"{part}_alpha": float(max(most, 1))}
        every = {layer.module for layer in layers if layer.part == part}
        if found and set(found) != every:
            changes[f"{part}_targets"] = tuple(sorted(found))
        lora = replace(lora, **changes)
    return replace(adapter, tensors=tensors, recipe=replace(adapter.recipe, lora=lora))
