"""The scale of a mounted adapter, for all parts or by part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import unchanged, weights_of
from random_adapters import make_adapter, make_full_adapter

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.hotswap import Mount, Scale
from lora_unitune.adapter.layers import multiplied
from lora_unitune.errors import SettingError
from lora_unitune.families import Base


@torch.no_grad()
def output(mount: Mount, adapter: Adapter, scale: Scale) -> torch.Tensor:
    """One deterministic forward pass through text encoder and UNet."""
    mount.use(adapter, scale)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    return mount.base.predict(latents, torch.tensor([500]), mount.base.condition("a red fox"))


def test_a_scale_by_part_multiplies_that_parts_change(base15: Base) -> None:
    adapter, mount, before = make_adapter(base15), Mount(base15), weights_of(base15)
    whole = output(mount, adapter, 1.0)
    for factors in ({"unet": 0.25, "text_encoder": 2.0}, {"unet": 0.25}, {"text_encoder": 0.0}):
        ours = output(mount, adapter, factors)
        theirs = output(mount, replace(adapter, tensors=multiplied(adapter.tensors, factors)), 1.0)
        assert (ours - theirs).abs().max() < 1e-5 and (ours - whole).abs().max() > 1e-3
    assert torch.equal(output(mount, adapter, {"unet": 1.0, "text_encoder": 1.0}), whole)
    assert torch.equal(output(mount, adapter, {}), whole)
    same = dict.fromkeys(("unet", "text_encoder"), 0.5)
    assert torch.equal(output(mount, adapter, same), output(mount, adapter, 0.5))
    same["unet"] = 1.0  # a caller's mapping may change afterwards
    assert not torch.equal(output(mount, adapter, same), output(mount, adapter, 0.5))
    mount.release()
    assert unchanged(base15, before)


def test_all_weights_of_a_model_take_one_scale(base15: Base) -> None:
    mount, before = Mount(base15), weights_of(base15)
    with pytest.raises(SettingError, match="takes one scale for all parts; give a number"):
        mount.use(make_full_adapter(base15), {"unet": 0.5})
    assert unchanged(base15, before)
