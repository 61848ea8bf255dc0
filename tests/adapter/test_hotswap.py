"""The scale of a mounted adapter, for all parts or by part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import unchanged, weights_of
from random_adapters import LORA, changed, make_adapter, make_full_adapter

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.hotswap import Mount, Scale
from lora_unitune.adapter.layers import multiplied
from lora_unitune.adapter.stack import stacked
from lora_unitune.errors import AdapterFileError, SettingError
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


def test_stacked_adapters_change_the_weights_as_both_do(base15: Base) -> None:
    other_lora = changed(
        LORA, unet={"rank": 6, "alpha": 3.0, "targets": ("to_q", "conv1")}, text_encoder={"rank": 0}
    )
    first, other = make_adapter(base15), make_adapter(base15, other_lora, seed=1)
    both, before = stacked(first, other, 0.5), weights_of(base15)
    product = {
        layer: 2.5
        * first.tensors[f"{layer}.lora_B.weight"].flatten(1)
        @ first.tensors[f"{layer}.lora_A.weight"].flatten(1)
        for layer in layers_of(first)
        if layer.startswith("unet.")
    }
    for layer in layers_of(other):
        b, a = (other.tensors[f"{layer}.lora_{side}.weight"].flatten(1) for side in "BA")
        product[layer] = product.get(layer, 0) + 0.5 * 0.5 * b @ a
    for layer, change in product.items():
        b, a = (both.tensors[f"{layer}.lora_{side}.weight"].flatten(1) for side in "BA")
        assert torch.allclose(both.scale_of("unet") * b @ a, change, atol=1e-4), layer
    mount = Mount(base15)
    silent, alone = output(mount, stacked(first, other, 0.0), 1.0), output(mount, first, 1.0)
    assert (silent - alone).abs().max() < 1e-5 < (output(mount, both, 1.0) - alone).abs().max()
    assert (both.rare_tokens, both.recipe.edit) == (first.rare_tokens, first.recipe.edit)
    mount.release()
    assert unchanged(base15, before)


def test_what_can_not_be_stacked_is_one_line(base15: Base, basexl: Base) -> None:
    one = make_adapter(base15)
    with pytest.raises(AdapterFileError, match="for the same base"):
        stacked(one, make_adapter(basexl))
    with pytest.raises(AdapterFileError, match="for the same base"):
        stacked(one, replace(one, fingerprint="0" * 16))
    with pytest.raises(SettingError, match="method 'lora'"):
        stacked(one, make_full_adapter(base15))
    large = make_adapter(base15, changed(LORA, unet={"rank": 600}))
    with pytest.raises(SettingError, match="rank 1200 together"):
        stacked(large, large)


def layers_of(adapter: Adapter) -> list[str]:
    return [key.removesuffix(".lora_A.weight") for key in adapter.tensors if key.endswith(".lora_A.weight")]
