"""Files that diffusers and PEFT themselves write open with the change that they make."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from test_spellings import assert_same, diffusers_changes, ours

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.errors import AdapterFileError

UNET, TEXT = ["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "v_proj", "fc1"]
WITHOUT_METADATA: dict[str, dict[str, Any]] = {"plain": {}, "other ranks": {"rank_pattern": {"to_q": 2}}}
WITH_METADATA: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 10},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2, "q_proj": 1}, "alpha_pattern": {"to_q": 7, "q_proj": 3}},
}
PARTS = ("unet", "text_encoder", "text_encoder_2")


def trained(folder: Path, **settings: Any) -> Any:
    """Returns a pipeline with adapters whose B isn't zero."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    for part in PARTS:
        module = getattr(pipeline, part, None)
        if module is not None:
            targets = UNET if part == "unet" else TEXT
            config = {
                "r": 4,
                "lora_alpha": 4,
                "target_modules": targets,
                "init_lora_weights": False,
            } | settings
            module.add_adapter(LoraConfig(**config))
    return pipeline


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("style", ["peft", "diffusers"])
@pytest.mark.parametrize("name", [*WITHOUT_METADATA, *WITH_METADATA])
def test_training_scripts(folder: Path, tmp_path: Path, style: str, name: str) -> None:
    pipeline = trained(folder, **(WITHOUT_METADATA | WITH_METADATA)[name])
    modules = {part: getattr(pipeline, part) for part in PARTS if hasattr(pipeline, part)}
    states = {part: get_peft_model_state_dict(module) for part, module in modules.items()}
    if style == "diffusers":
        states = {part: convert_state_dict_to_diffusers(state) for part, state in states.items()}
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    if name in WITH_METADATA:
        layers |= {
            f"{part}_lora_adapter_metadata": m.peft_config["default"].to_dict() for part, m in modules.items()
        }
    type(pipeline).save_lora_weights(tmp_path, **layers)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert_same(ours(path), diffusers_changes(folder, path))


def test_diffusers_own_kohya_export(folder: Path, tmp_path: Path) -> None:
    """It leaves text_model out of the text encoders' names, and its alphas are whole numbers."""
    pipeline, state = trained(folder), {}
    for part in PARTS:
        if hasattr(pipeline, part):
            layers = get_peft_model_state_dict(getattr(pipeline, part))
            state |= {f"{part}.{key}": tensor for key, tensor in layers.items()}
    save_file(convert_state_dict_to_kohya(state), tmp_path / "kohya.safetensors")
    expected = ours(tmp_path / "kohya.safetensors")
    save_file(state, tmp_path / "peft.safetensors")
    assert_same(expected, ours(tmp_path / "peft.safetensors"))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_peft_folders_and_their_single_files(tiny_sd15: Path, tmp_path: Path, part: str) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True)
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=UNET if part == "unet" else TEXT, init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(getattr(pipeline, part), config)
        model.save_pretrained(tmp_path / "peft")
    expected = {
        f"{part}.{name.removeprefix('base_model.model.')}": layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert expected
    assert_same(ours(tmp_path / "peft"), expected)
    assert_same(ours(tmp_path / "peft" / "adapter_model.safetensors"), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}},
        {"target_modules": ["to_q", "conv1"], "use_effective_conv2d": True},
    ],
)
def test_a_folder_of_pefts_loha_has_its_alphas(tiny_sd15: Path, tmp_path: Path, settings: Any) -> None:
    import peft

    unet: Any = DiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True).unet
    chosen = {"r": 4, "alpha": 2, "target_modules": ["to_q", "to_v"], "init_weights": False} | settings
    model = get_peft_model(unet, peft.LoHaConfig(**chosen))
    model.save_pretrained(tmp_path / "peft")
    expected = {
        f"unet.{name.removeprefix('base_model.model.')}": layer.get_delta_weight("default")
        .detach()
        .flatten(1)
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert_same(ours(tmp_path / "peft"), expected)


@pytest.mark.parametrize("kind", ["LoKr", "LoHa", "OFT", "IA3"])
def test_other_kinds_of_pefts_own(tiny_sd15: Path, tmp_path: Path, kind: str) -> None:
    """PEFT's LoHa opens with the change that PEFT makes; the others are refused by name."""
    import peft

    unet: Any = DiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True).unet
    targets = ["to_q", "to_v"]
    configs: dict[str, Any] = {
        "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=targets, init_weights=False),
        "LoHa": lambda: peft.LoHaConfig(r=4, alpha=2, target_modules=targets, init_weights=False),
        "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=targets),
        "IA3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    }
    model = get_peft_model(unet, configs[kind]())
    path = tmp_path / "one.safetensors"
    save_file({key: t.contiguous() for key, t in get_peft_model_state_dict(model).items()}, path)
    if kind != "LoHa":
        with pytest.raises(AdapterFileError, match=kind):
            Adapter.load(path, "")
        return
    changes = {
        f"unet.{name.removeprefix('base_model.model.')}": layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert_same(
        ours(path), {layer: 2 * change for layer, change in changes.items()}
    )  # its alpha isn't in the file
    assert all(torch.isfinite(change).all() for change in changes.values())
