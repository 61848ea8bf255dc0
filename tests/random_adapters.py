"""Adapters with random tensors, large enough to change a tiny base's images."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.layers import attach, collect, detach
from lora_unitune.families import Base
from lora_unitune.recipe import EditSettings, FitSettings, LoraSettings, Recipe

LORA = LoraSettings(
    unet_rank=4,
    unet_alpha=10.0,
    text_encoder_rank=2,
    text_encoder_alpha=3.0,
    text_encoder_2_rank=3,
    text_encoder_2_alpha=7.5,
)
EDIT = EditSettings(steps=4, guidance=4.0)


@functools.cache
def adapter_shapes(base: Base, lora: LoraSettings) -> dict[str, torch.Size]:
    """Returns the shapes of an adapter's tensors, found by attaching one."""
    attach(base, lora)
    shapes = {key: tensor.shape for key, tensor in collect(base).items()}
    detach(base)
    return shapes


def make_adapter(base: Base, lora: LoraSettings = LORA, seed: int = 0) -> Adapter:
    """Returns an adapter for a base with random tensors, large enough to change its images."""
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(base, lora)
    return Adapter(
        tensors={key: torch.randn(shape, generator=generator) / 4 for key, shape in shapes.items()},
        rare_tokens="zqrt ohwx",
        recipe=Recipe(lora=lora, edit=EDIT),
        base=base.name,
        fingerprint=base.fingerprint,
        photo_latents=torch.randn((1, *base.latent_shape()), generator=generator),
        resolution=base.resolution,
        family=base.family,
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
    recipe = Recipe(lora=LORA, edit=EDIT, fit=FitSettings(method="full"))
    return replace(make_adapter(base), tensors=tensors, recipe=recipe)
