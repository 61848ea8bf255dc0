"""Smaller adapter files: each layer keeps only as many ranks as earn their bytes.

A layer's change of its weights, B A, is a sum of singular vectors (Eckart and Young, 1936). Over all layers
together, those that change the base's predictions least for their bytes go first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.adapter.int8 import pack, unpack
from lora_unitune.adapter.layers import slots
from lora_unitune.errors import SettingError
from lora_unitune.families import Base
from lora_unitune.families.schedule import add_noise


@dataclass(frozen=True)
class Compressed:
    """An adapter with lower ranks.

    Attributes:
        adapter: its layers' ranks differ, and layers that earn no rank are gone.
        kept: share of the worth of all ranks that is left.
        ranks: how many there were, and how many are left, over all layers.
    """

    adapter: Adapter
    kept: float
    ranks: tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer's change, taken apart: B A = left diag(values) right.

    Attributes:
        part: "unet" or a text encoder.
        module: its path in the part.
        left: (out, ranks).
        values: singular values times alpha / rank, (ranks,), the largest first.
        right: (ranks, in).
        shapes: of A and B.
        worths: of each rank, (ranks,): its squared effect on the predictions, or its squared value.
    """

    part: str
    module: str
    left: Tensor
    values: Tensor
    right: Tensor
    shapes: tuple[torch.Size, torch.Size]
    worths: Tensor

    @property
    def numbers(self) -> int:
        """How many numbers a rank takes."""
        return len(self.left) + self.right.shape[1]


def take_apart(adapter: Adapter, base: Base | None = None) -> list[Layer]:
    """Returns every layer's change by its singular values, and what each of them is worth.

    A rank's worth is its squared effect on the base's predictions of the photo; without a base, its squared
    singular value.

    Args:
        adapter: of method "lora".
        base: that the adapter was made for; left as it was.

    Raises:
        SettingError: the method is "full".
        AdapterFileError: the adapter doesn't suit the base.
    """
    if adapter.recipe.fit.method != "lora":
        raise SettingError("only adapters of method 'lora' can be compressed; fit the photo with 'lora'")
    layers = _by_singular_values(adapter)
    if base is None:
        return layers
    everything = [list(range(len(layer.values))) for layer in layers]
    effects = _effects(base, _put_together(adapter, layers, everything), layers)
    return [replace(layer, worths=worths) for layer, worths in zip(layers, effects, strict=True)]


def compress(
    adapter: Adapter,
    keep: float | None = None,
    to_bytes: int | None = None,
    base: Base | None = None,
    eight_bit: bool = False,
    layers: list[Layer] | None = None,
) -> Compressed:
    """Cuts ranks that add little.

    Args:
        adapter: of method "lora".
        keep: share of the worth of all ranks to keep at least, above 0 to 1.
        to_bytes: size that the file's tensors may have at most; its header comes on top.
        base: that the adapter was made for; without it, ranks are weighed by their own size.
        eight_bit: round to what 8 bits hold; save the result with dtype=torch.int8.
        layers: what `take_apart` returned, to cut one adapter to several sizes.

    Returns:
        The adapter with lower ranks, and what was lost.

    Raises:
        SettingError: no limit is given, or two, one is impossible, or the method is "full".
        AdapterFileError: the adapter doesn't suit the base.
    """
    if keep is None and to_bytes is None and eight_bit:
        keep = 1.0
    if (keep is None) == (to_bytes is None):
        raise SettingError("give one limit: --keep SHARE or --to-bytes N")
    if keep is not None and not 0 < keep <= 1:
        raise SettingError(f"keep = {keep:g} isn't allowed; give a share above 0 and up to 1, such as 0.99")
    layers = take_apart(adapter, base) if layers is None else layers
    sizes = [layer.numbers + 4 if eight_bit else 2 * layer.numbers for layer in layers]  # bytes of a rank
    order = sorted(
        ((worth.item() / sizes[number], number, rank)
         for number, layer in enumerate(layers) for rank, worth in enumerate(layer.worths)),
        reverse=True,
    )  # fmt: skip
    total = sum(layer.worths.sum().item() for layer in layers)
    room = None if to_bytes is None else to_bytes - 2 * _photo_numbers(adapter)
    chosen: list[list[int]] = [[] for _ in layers]
    kept, used = 0.0, 0
    for worth, number, rank in order:
        if (keep is not None and keep < 1 and kept >= keep * total) or (
            room is not None and used + sizes[number] > room
        ):
            break
        chosen[number].append(rank)
        kept, used = kept + worth * sizes[number], used + sizes[number]
    if not any(ranks for ranks, layer in zip(chosen, layers, strict=True) if layer.part == "unet"):
        raise SettingError(f"{to_bytes} bytes leave no rank of any layer of the UNet; give more")
    small = _put_together(adapter, layers, [sorted(ranks) for ranks in chosen])
    if eight_bit:
        small = replace(small, tensors=unpack(pack(small.tensors)))
    count = sum(len(layer.values) for layer in layers)
    return Compressed(small, kept / total if total else 1.0, (count, sum(map(len, chosen))))


def _effects(base: Base, adapter: Adapter, layers: list[Layer]) -> list[Tensor]:
    """Returns each rank's squared effect on the base's predictions of the photo, to first order.

    Scaling a rank of A by a gate changes the prediction along J, its derivative at 1. Of a random direction p
    with independent signs, (p . J)^2 is |J|^2 on average (Hutchinson, 1990), and one backward pass gives
    p . J for all ranks.

    Args:
        base: left as it was.
        adapter: with singular vectors for ranks, as `layers` have them.
        layers: of it.
    """
    noised, timesteps, ids = _probes(base, adapter)
    generator, mount = torch.Generator().manual_seed(1), Mount(base)
    found = [torch.zeros(len(layer.values), dtype=torch.float64) for layer in layers]
    mount.use(adapter, 1.0)
    weights = slots(base)
    downs = [weights[f"{layer.part}.{layer.module}.lora_A.weight"] for layer in layers]
    try:
        for latents, timestep in zip(noised.split(1), timesteps.split(1), strict=True):
            prediction = base.predict(latents, timestep, base.embed(ids))
            signs = torch.randint(0, 2, prediction.shape, generator=generator).to(prediction) * 2 - 1
            slopes = torch.autograd.grad((prediction * signs).sum(), downs, allow_unused=True)
            for worth, down, slope in zip(found, downs, slopes, strict=True):
                if slope is not None:
                    gate = (down.detach() * slope).flatten(1).sum(1).double().cpu()
                    worth += gate[: len(worth)].square()
    finally:
        mount.release()
    return found


def _probes(base: Base, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the noised photo (noise alone, if the file doesn't hold it) at ten timesteps, them, and ids."""
    timesteps = torch.arange(10) * (len(base.alphas_cumprod) // 10) + len(base.alphas_cumprod) // 20
    shape = (10, *base.latent_shape(adapter.resolution))
    clean = torch.zeros(shape) if adapter.photo_latents is None else adapter.photo_latents.expand(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ids, _ = base.tokenize(adapter.rare_tokens)
    return add_noise(clean, noise, timesteps, base.alphas_cumprod), timesteps, ids


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
    noised, timesteps, ids = _probes(base, before)
    mount, predictions = Mount(base), list[Tensor]()
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


def _by_singular_values(adapter: Adapter) -> list[Layer]:
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
            Layer(
                part,
                module,
                (outer @ left)[:, :found],
                scaled[:found],
                (right @ inner.T)[:rank][:found],
                shapes,
                worths=scaled[:found].square(),
            )
        )
    return layers


def _put_together(adapter: Adapter, layers: list[Layer], ranks: list[list[int]]) -> Adapter:
    """Returns an adapter of the ranks that are kept of each layer, with alpha = rank throughout."""
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, int]] = {part: {} for part in adapter.parts}
    for layer, kept in zip(layers, ranks, strict=True):
        if not kept:
            continue
        root, rank = layer.values[kept].sqrt(), len(kept)
        a, b = root[:, None] * layer.right[kept], layer.left[:, kept] * root
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
