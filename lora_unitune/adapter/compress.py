"""Smaller adapter files: each layer keeps only its most important ranks.

A layer's change of its weights, B A, is a sum of singular vectors (Eckart and Young, 1936). Over all layers
together, those with the least effect on the base's predictions per byte are removed first. Effects
are those at the strength in the file, adapter_scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.checks import layers_of
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.adapter.int8 import pack, unpack
from lora_unitune.adapter.layers import slots
from lora_unitune.adapter.suits import checked_photo
from lora_unitune.errors import SettingError
from lora_unitune.families import Base, expanded

_PROBES = 10  # noise levels at which predictions are compared


@dataclass(frozen=True)
class Compressed:
    """An adapter with lower ranks.

    Attributes:
        adapter: The compressed adapter; ranks differ between layers, and layers of rank 0 are removed.
        kept: Share of the total importance that the remaining ranks have.
        ranks: Number of ranks of all layers, before and after.
    """

    adapter: Adapter
    kept: float
    ranks: tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """The singular value decomposition of one layer's change: B A = left diag(values) right.

    Attributes:
        part: Name of the base's part.
        module: The layer's path in the part.
        left: Left singular vectors, (out, ranks).
        values: Singular values times alpha / rank, (ranks,), the largest first.
        right: Right singular vectors, (ranks, in).
        shapes: Shapes of A and B.
        importance: Importance of each rank, (ranks,): its squared effect on the predictions, or its squared value.
    """

    part: str
    module: str
    left: Tensor
    values: Tensor
    right: Tensor
    shapes: tuple[torch.Size, torch.Size]
    importance: Tensor

    @property
    def numbers(self) -> int:
        """Number of elements of one rank."""
        return len(self.left) + self.right.shape[1]


def take_apart(adapter: Adapter, base: Base | None = None) -> list[Layer]:
    """Decomposes every layer's change into its singular values, and returns their importance.

    A rank's importance is its squared effect on the base's predictions of the photo; without a base, its squared
    singular value.

    Args:
        adapter: An adapter of method "lora".
        base: The base that it was made for; restored afterwards.

    Raises:
        SettingError: The method is "full", or the adapter is a DoRA.
        AdapterFileError: The adapter's tensors don't match the base.
    """
    if not adapter.is_low_rank:
        raise SettingError(
            "only adapters of method 'lora' that aren't a DoRA can be compressed; fit the photo with 'lora'"
        )
    layers = _by_singular_values(adapter)
    if base is None:
        return layers
    everything = [list(range(len(layer.values))) for layer in layers]
    effects = _effects(base, _put_together(adapter, layers, everything), layers)
    return [replace(layer, importance=effect) for layer, effect in zip(layers, effects, strict=True)]


def compress(
    adapter: Adapter,
    keep: float | None = None,
    to_bytes: int | None = None,
    base: Base | None = None,
    eight_bit: bool = False,
    layers: list[Layer] | None = None,
) -> Compressed:
    """Removes the ranks with the least importance per byte.

    Args:
        adapter: An adapter of method "lora".
        keep: Minimum share of the total importance to keep, above 0 and up to 1.
        to_bytes: Maximum size of the file's tensors in bytes, without the header.
        base: The base that it was made for; None measures importance by squared singular values.
        eight_bit: Whether to quantize to 8 bits; save the result with dtype=torch.int8.
        layers: Result of `take_apart`, to compress one adapter to several sizes.

    Returns:
        The adapter with lower ranks, and what was lost.

    Raises:
        SettingError: Not exactly one limit is set, a limit is impossible, or the method is "full".
        AdapterFileError: The adapter's tensors don't match the base.
    """
    if keep is None and to_bytes is None and eight_bit:
        keep = 1.0
    if (keep is None) == (to_bytes is None):
        raise SettingError("give one limit, keep=SHARE or to_bytes=N")
    if keep is not None and not 0 < keep <= 1:
        raise SettingError(f"keep = {keep:g} isn't allowed; give a share above 0 and up to 1, such as 0.99")
    layers = take_apart(adapter, base) if layers is None else layers
    sizes = [layer.numbers + 4 if eight_bit else 2 * layer.numbers for layer in layers]  # bytes of a rank
    limit = None if to_bytes is None else to_bytes - 2 * _photo_numbers(adapter)
    chosen, kept = _chosen(layers, sizes, keep, limit)
    denoiser = adapter.kind.denoiser
    if not any(len(layer.values) for layer in layers):
        raise SettingError(
            "all of the adapter's matrices are zero, so there is nothing to compress; fit it again"
        )
    needed = [layer.part == denoiser and len(layer.values) > 0 for layer in layers]
    if not any(ranks for ranks, need in zip(chosen, needed, strict=True) if need or not any(needed)):
        limit_text = f"to_bytes = {to_bytes}" if keep is None else f"keep = {keep:g}"
        of = f" of the {denoiser}" if any(needed) else ""
        raise SettingError(f"{limit_text} would leave no rank of any layer{of}; give more")
    small = _put_together(adapter, layers, chosen)
    if eight_bit:
        small = replace(small, tensors=unpack(pack(small.tensors)))
    count = sum(len(layer.values) for layer in layers)
    return Compressed(small, kept, (count, sum(map(len, chosen))))


def _chosen(
    layers: list[Layer], sizes: list[int], keep: float | None, limit: int | None
) -> tuple[list[list[int]], float]:
    """Chooses ranks by their importance for their size, until a limit is reached.

    Args:
        layers: All layers.
        sizes: Bytes of one rank, by layer.
        keep: Minimum share of the importance to keep.
        limit: Maximum number of bytes.

    Returns:
        Indices of the kept ranks by layer, in order, and their share of the importance.
    """
    order = sorted(
        ((importance.item() / sizes[number], number, rank)
         for number, layer in enumerate(layers) for rank, importance in enumerate(layer.importance)),
        reverse=True,
    )  # fmt: skip
    total = sum(layer.importance.sum().item() for layer in layers)
    chosen: list[list[int]] = [[] for _ in layers]
    kept, used = 0.0, 0
    for importance, number, rank in order:
        enough = keep is not None and keep < 1 and kept >= keep * total
        if enough or (limit is not None and used + sizes[number] > limit):
            break
        chosen[number].append(rank)
        kept, used = kept + importance * sizes[number], used + sizes[number]
    return [sorted(ranks) for ranks in chosen], kept / total if total else 1.0


def _effects(base: Base, adapter: Adapter, layers: list[Layer]) -> list[Tensor]:
    """Returns each rank's squared effect on the base's predictions of the photo, to first order.

    Scaling a rank of A by a gate changes the prediction along J, its derivative at 1. Of a random direction p
    with independent signs, (p . J)^2 is |J|^2 on average (Hutchinson, 1990), and one backward pass gives
    p . J for all ranks.

    Args:
        base: The adapter's base; restored afterwards.
        adapter: An adapter whose ranks are the singular vectors of `layers`.
        layers: Its layers.
    """
    noised, timesteps, prompt = _probes(base, adapter)
    generator, mount = torch.Generator().manual_seed(1), Mount(base)
    effects = [torch.zeros(len(layer.values), dtype=torch.float64) for layer in layers]
    try:
        mount.use(adapter, 1.0)
        weights = slots(base)
        used = [(effect, layer) for effect, layer in zip(effects, layers, strict=True) if len(effect)]
        downs = [weights[f"{layer.part}.{layer.module}.lora_A.weight"] for _, layer in used]
        for sample, timestep in zip(noised.split(1), timesteps.split(1), strict=True):
            if not downs:  # every layer's change is zero
                break
            prediction = base.predict(sample, timestep, base.condition(prompt, adapter.recipe.edit.clip_skip))
            signs = torch.randint(0, 2, prediction.shape, generator=generator).to(prediction) * 2 - 1
            slopes = torch.autograd.grad((prediction * signs).sum(), downs, allow_unused=True)
            for (effect, _), down, slope in zip(used, downs, slopes, strict=True):
                if slope is not None:
                    gate = (down.detach() * slope).flatten(1).sum(1).double().cpu()
                    effect += gate[: len(effect)].square()
    finally:
        mount.release()
    return effects


def _probes(base: Base, adapter: Adapter) -> tuple[Tensor, Tensor, str]:
    """Returns the photo (zeros, if the file doesn't hold it), noised to ten levels, their timesteps, and a prompt."""
    size = adapter.size_on(base)
    schedule = base.schedule(size)
    index = torch.arange(_PROBES) * (len(schedule) // _PROBES) + len(schedule) // (2 * _PROBES)
    shape = (_PROBES, *base.sample_shape(size))
    photo = None if adapter.photo_latents is None else checked_photo(adapter, base)
    clean = torch.zeros(shape) if photo is None else photo.cpu().expand(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return schedule.add_noise(clean, noise, index), schedule.timesteps[index], adapter.rare_tokens or ""


@torch.no_grad()
def effect_lost(base: Base, before: Adapter, after: Adapter) -> float:
    """Returns the share of an adapter's effect that a compressed copy of it lacks.

    The effect is the difference that the adapter makes to the base's predictions: root mean square, over
    its noised photo (noise alone, if the file doesn't hold the photo) at ten timesteps.

    Args:
        base: The base that both were made for; restored afterwards.
        before: The adapter.
        after: The adapter that was made from it.

    Raises:
        AdapterFileError: The tensors of one don't match the base.
    """
    noised, timesteps, prompt = _probes(base, before)
    mount, predictions = Mount(base), list[Tensor]()
    for adapter in (None, before, after):
        mount.use(adapter, 1.0)
        condition = base.condition(prompt, before.recipe.edit.clip_skip)
        predictions.append(base.predict(noised, timesteps, expanded(condition, _PROBES)))
    mount.release()
    plain, whole, cut = predictions
    return float(
        (cut - whole).square().mean().sqrt() / (whole - plain).square().mean().sqrt().clamp(min=1e-12)
    )


def _photo_numbers(adapter: Adapter) -> int:
    return 0 if adapter.photo_latents is None else adapter.photo_latents.numel()


def _by_singular_values(adapter: Adapter) -> list[Layer]:
    """Returns every layer's singular value decomposition, largest values first, without zeros."""
    layers = []
    for path in sorted(layers_of(adapter.tensors)):
        part, _, module = path.partition(".")
        a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        shapes = (a.shape, b.shape)
        outer, upper = torch.linalg.qr(b.flatten(1))
        inner, lower = torch.linalg.qr(a.flatten(1).T)
        left, values, right = torch.linalg.svd(upper @ lower.T)
        scaled = values * adapter.scale_of(part)
        rank = int((scaled > 1e-9 * scaled.max().clamp(min=1e-30)).sum())
        layers.append(
            Layer(
                part,
                module,
                (outer @ left)[:, :rank],
                scaled[:rank],
                (right @ inner.T)[:rank],
                shapes,
                importance=scaled[:rank].square(),
            )
        )
    return layers


def _put_together(adapter: Adapter, layers: list[Layer], ranks: list[list[int]]) -> Adapter:
    """Returns an adapter of the kept ranks of each layer, with alpha = rank."""
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
    lora = dict(adapter.recipe.lora)
    for part, kept_modules in modules.items():
        targets = lora[part].targets
        if kept_modules and set(kept_modules) != {layer.module for layer in layers if layer.part == part}:
            targets = tuple(sorted(kept_modules))
        most = max(kept_modules.values(), default=0)
        lora[part] = replace(lora[part], rank=most, alpha=0.0, targets=targets)
    return replace(adapter, tensors=tensors, recipe=replace(adapter.recipe, lora=lora))
