"""Adapters are removed without a trace, and are named and scaled as in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from random_adapters import own
from safetensors.torch import load_file

from lora_unitune.adapter import layers
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import Base, joined
from lora_unitune.settings import LoraSettings

WITH_CONVOLUTIONS = {
    "unet": LoraSettings(4, 2.0, ("to_q", "to_out.0", "conv1", "ff.net.2")),
    "text_encoder": LoraSettings(2),
    "text_encoder_2": LoraSettings(4),
}
Lora = Mapping[str, LoraSettings]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attach_random(base: Base, lora: Lora, seed: int = 0) -> dict[str, torch.Tensor]:
    """Attaches adapters with random A and B, as after a training, and returns their tensors."""
    lora = own(base, lora)
    layers.attach(base, lora, seeded(seed))
    generator = seeded(seed + 1)
    drawn = {key: 0.2 * torch.randn(t.shape, generator=generator) for key, t in layers.collect(base).items()}
    layers.load_in_place(layers.slots(base), drawn, lora)
    return drawn


@torch.no_grad()
def output(base: Base) -> torch.Tensor:
    """One deterministic forward pass through text encoder and UNet."""
    latents = torch.randn(1, 4, 16, 16, generator=seeded(9))
    return base.predict(latents, torch.tensor([500]), base.condition("a red fox"))


def anatomy(base: Base) -> dict[str, tuple[int, bool, frozenset[str]]]:
    """Every module of the base: its identity, its mode, and the names of its attributes."""
    return {
        f"{part}.{name}": (id(child), child.training, frozenset(vars(child)))
        for part, module in base.parts.items()
        for name, child in module.named_modules()
    }


@pytest.fixture(params=["15", "21"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(f"base{request.param}")


@pytest.mark.parametrize("lora", [{}, WITH_CONVOLUTIONS])
def test_detaching_leaves_the_original_objects_and_weights(base: Base, lora: Lora) -> None:
    before, weights = anatomy(base), {id(p): p.clone() for m in base.parts.values() for p in m.parameters()}
    expected = output(base)
    attach_random(base, lora)
    assert not torch.equal(output(base), expected)
    layers.detach(base)
    assert anatomy(base) == before
    for module in base.parts.values():
        assert all(torch.equal(p, weights[id(p)]) and not p.requires_grad for p in module.parameters())
    assert torch.equal(output(base), expected)
    layers.detach(base)
    assert anatomy(base) == before


def test_a_new_adapter_changes_nothing(base: Base) -> None:
    expected = output(base)
    layers.attach(base, own(base, {}), seeded())
    assert torch.equal(output(base), expected)


def test_same_seed_same_tensors_whatever_the_global_state(base15: Base) -> None:
    lora = own(base15, WITH_CONVOLUTIONS)
    layers.attach(base15, lora, seeded(5))
    first = layers.collect(base15)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    layers.attach(base15, lora, seeded(5))
    second = layers.collect(base15)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
    layers.attach(base15, lora, seeded(6))
    assert not all(torch.equal(first[key], tensor) for key, tensor in layers.collect(base15).items())


def test_only_the_adapters_are_trainable(base15: Base) -> None:
    layers.attach(base15, own(base15, {}), seeded())
    trainable = layers.trainable_parameters(base15)
    assert list(trainable) == ["unet", "text_encoder"]
    assert sum(map(len, trainable.values())) == len(layers.collect(base15))
    assert all(p.dtype == torch.float32 for group in trainable.values() for p in group)
    assert not any(child.training for module in base15.parts.values() for child in module.modules())
    layers.attach(base15, own(base15, {"text_encoder": LoraSettings(0)}), seeded())
    assert list(layers.trainable_parameters(base15)) == ["unet"]
    layers.detach(base15)
    assert layers.trainable_parameters(base15) == {}


def test_keys_are_those_diffusers_writes(base: Base, tmp_path: Path) -> None:
    tensors = attach_random(base, WITH_CONVOLUTIONS)
    layers = {p: get_peft_model_state_dict(m, adapter_name="unitune") for p, m in base.parts.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"]
    )
    written = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in written)


def test_diffusers_loads_the_tensors_at_the_same_strength(
    base15: Base, tiny_sd15: Path, tmp_path: Path
) -> None:
    bare = output(base15)
    tensors = attach_random(base15, WITH_CONVOLUTIONS)
    expected = output(base15)
    assert (expected - bare).abs().max() > 1e-2
    by_part = {
        part: {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}
        for part in base15.parts
    }
    metadata = {
        part: layers.lora_config(own(base15, WITH_CONVOLUTIONS)[part]).to_dict() for part in base15.parts
    }
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=by_part["unet"],
        text_encoder_lora_layers=by_part["text_encoder"],
        unet_lora_adapter_metadata=metadata["unet"],
        text_encoder_lora_adapter_metadata=metadata["text_encoder"],
    )
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_sd15, use_safetensors=True, safety_checker=None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(tmp_path)
    embeddings, _ = pipeline.encode_prompt("a red fox", "cpu", 1, do_classifier_free_guidance=False)
    latents = torch.randn(1, 4, 16, 16, generator=seeded(9))
    with torch.no_grad():
        plain = pipeline.unet(latents, torch.tensor([500]), encoder_hidden_states=embeddings).sample
    assert torch.allclose(expected, plain, atol=1e-6)


def test_collected_tensors_come_back_bit_for_bit(base: Base) -> None:
    tensors = attach_random(base, {}, seed=1)
    expected = output(base)
    layers.attach(base, own(base, {}))
    layers.load_in_place(layers.slots(base), tensors, own(base, {}))
    assert torch.equal(output(base), expected)
    collected = layers.collect(base)
    assert all(torch.equal(collected[key], tensors[key]) for key in tensors)
    collected[next(iter(collected))].zero_()
    assert torch.equal(output(base), expected), "collect hands out copies"


def test_scale_is_exact_at_zero_and_one_and_linear_between(base15: Base) -> None:
    plain = output(base15)
    attach_random(base15, {"text_encoder": LoraSettings(0)})
    full = output(base15)
    layers.set_scale(base15, {"unet": 0.0, "text_encoder": 0.0})
    assert torch.equal(output(base15), plain)
    layers.set_scale(base15, {"unet": 0.5, "text_encoder": 0.5})
    half = output(base15)
    assert not torch.equal(half, full) and not torch.equal(half, plain)
    layers.set_scale(base15, {"unet": 0.5, "text_encoder": 0.5})
    assert torch.equal(output(base15), half), "a scale replaces the one before"
    layers.set_scale(base15, {"unet": 1.0, "text_encoder": 1.0})
    assert torch.equal(output(base15), full)


def test_disabled_adapters_are_the_base_even_after_an_error(base: Base) -> None:
    plain = output(base)
    attach_random(base, {})
    adapted = output(base)
    assert not torch.equal(adapted, plain)
    trainable = sum(map(len, layers.trainable_parameters(base).values()))
    with layers.adapters_disabled(base):
        assert torch.equal(output(base), plain)
    with pytest.raises(ZeroDivisionError), layers.adapters_disabled(base):
        raise ZeroDivisionError
    assert torch.equal(output(base), adapted)
    assert sum(map(len, layers.trainable_parameters(base).values())) == trainable


def test_one_batch_holds_rows_with_and_without_the_adapter(base15: Base) -> None:
    attach_random(base15, {"unet": LoraSettings(8, targets=("to_q", "to_v", "conv1", "time_emb_proj"))})
    condition = base15.condition("a red fox")
    latents = torch.randn(1, 4, 16, 16, generator=seeded(9))
    timesteps = torch.tensor([500])
    adapted = base15.predict(latents, timesteps, condition)
    with layers.adapters_disabled(base15):
        plain = base15.predict(latents, timesteps, condition)
    assert (adapted - plain).abs().max() > 1e-2
    with torch.no_grad(), layers.adapters_for_last(base15, 1):
        first, last = base15.predict(
            torch.cat([latents] * 2), timesteps.repeat(2), joined(condition, condition)
        ).split(1)
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, adapted, atol=1e-5, rtol=1e-4)
    assert torch.equal(base15.predict(latents, timesteps, condition), adapted)


def test_missing_surplus_and_wrong_shape_tensors_are_named_and_nothing_is_copied(base15: Base) -> None:
    layers.attach(base15, own(base15, {}), seeded())
    before = layers.collect(base15)
    key = list(before)[-1]
    missing = {name: tensor + 1 for name, tensor in before.items() if name != key}
    surplus = {name: tensor + 1 for name, tensor in before.items()} | {
        "unet.nowhere.lora_A.weight": before[key]
    }
    wrong_shape = {name: tensor + 1 for name, tensor in before.items()} | {key: torch.zeros(3, 3)}
    for tensors, named in ((missing, key), (surplus, "unet.nowhere.lora_A.weight"), (wrong_shape, key)):
        with pytest.raises(AdapterFileError, match=f"'{named}'"):
            layers.load_in_place(layers.slots(base15), tensors, own(base15, {}))
    after = layers.collect(base15)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"unet": LoraSettings(8, targets=("to_q", "to_kk"))},
            r"lora.unet.targets: 'to_kk' names no layer.*did you mean 'to_k'",
        ),
        (
            {"text_encoder": LoraSettings(4, targets=("to_q",))},
            r"lora.text_encoder.targets: 'to_q' names no layer.*q_proj",
        ),
        ({"unet": LoraSettings(8, targets=("attn1",))}, r"'attn1' isn't a linear or convolution layer"),
    ],
)
def test_an_unknown_target_is_named_and_nothing_is_attached(base15: Base, lora: Lora, message: str) -> None:
    before = anatomy(base15)
    with pytest.raises(RecipeError, match=message):
        layers.attach(base15, lora)
    assert anatomy(base15) == before


def test_adapters_on_a_half_precision_base_are_float32(tiny_sd15: Path) -> None:
    from lora_unitune.families import load_base

    base = load_base(str(tiny_sd15), "cpu", torch.bfloat16)
    attach_random(base, {})
    assert all(
        p.dtype == torch.float32 for group in layers.trainable_parameters(base).values() for p in group
    )
    assert output(base).dtype == torch.float32 and output(base).isfinite().all()
