"""Adapters with random tensors, large enough to change a tiny base's images."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.layers import attach, collect, detach
from lora_unitune.families import Base
from lora_unitune.recipe import Recipe
from lora_unitune.settings import EditSettings, FitSettings, LoraSettings

_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
LORA = {
    "unet": LoraSettings(4, 10.0, ("to_q", "to_k", "to_v", "to_out.0")),
    "text_encoder": LoraSettings(2, 3.0, _CLIP),
    "text_encoder_2": LoraSettings(3, 7.5, _CLIP),
}
"""Settings of the parts of every base that is built here; a base takes those of its own parts."""

EDIT = EditSettings(steps=4, guidance=4.0)
KOHYA_LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


Lora = Mapping[str, LoraSettings]


def own(base: Base, lora: Lora = LORA) -> dict[str, LoraSettings]:
    """Returns the settings of a base's own parts, completed by its family."""
    chosen = {part: settings for part, settings in lora.items() if part in base.parts}
    return dict(base.family.complete(Recipe(lora=chosen)).lora)


def changed(lora: Lora, **parts: dict[str, Any]) -> dict[str, LoraSettings]:
    """Returns settings with some of them replaced, by part."""
    return {**lora, **{part: replace(lora[part], **values) for part, values in parts.items()}}


EVERYTHING = changed(
    LORA,
    unet={
        "targets": ("to_q", "to_out.0", "conv1", "conv_shortcut", "ff.net.0.proj", "time_emb_proj", "proj_in")
    },
    text_encoder={"targets": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")},
    text_encoder_2={"targets": ("q_proj", "k_proj", "v_proj", "out_proj", "fc2")},
)
"""Settings with adapters on every kind of layer."""


@functools.cache
def adapter_shapes(base: Base, settings: tuple[tuple[str, LoraSettings], ...]) -> dict[str, torch.Size]:
    """Returns the shapes of an adapter's tensors, found by attaching one, once."""
    attach(base, dict(settings))
    shapes = {key: tensor.shape for key, tensor in collect(base).items()}
    detach(base)
    return shapes


def make_adapter(
    base: Base, lora: Lora = LORA, seed: int = 0, size: tuple[int, int] | None = None
) -> Adapter:
    """Returns an adapter for a base with random tensors, large enough to change its images."""
    generator = torch.Generator().manual_seed(seed)
    lora = own(base, lora)
    shapes = adapter_shapes(base, tuple(lora.items()))
    return Adapter(
        tensors={key: torch.randn(shape, generator=generator) / 4 for key, shape in shapes.items()},
        rare_tokens="zqrt ohwx",
        recipe=Recipe(lora=lora, edit=EDIT),
        base=base.name,
        fingerprint=base.fingerprint,
        photo_latents=torch.randn((1, *base.sample_shape(size)), generator=generator),
        size=size or base.size,
        family=base.family.name,
        seed=seed,
        seconds=1.0,
    )


def make_full_adapter(base: Base) -> Adapter:
    """Returns an adapter of method "full": the base's own weights, moved a little."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{part}.{name}": weight.detach() + torch.randn(weight.shape, generator=generator) / 50
        for part, module in base.parts.items()
        for name, weight in module.named_parameters()
    }
    recipe = Recipe(lora=own(base), edit=EDIT, fit=FitSettings(method="full"))
    return replace(make_adapter(base), tensors=tensors, recipe=recipe)


def kohya_pair(layer: str = KOHYA_LAYER, width: int = 32, rank: int = 4) -> dict[str, torch.Tensor]:
    """Returns the random tensors of one layer of a tiny base, in kohya's layout."""
    return {
        f"{layer}.lora_down.weight": torch.randn(rank, width),
        f"{layer}.lora_up.weight": torch.randn(32, rank),
    }
