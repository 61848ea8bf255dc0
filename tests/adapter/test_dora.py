"""DoRA files (arXiv 2402.09353) open with the weights that PEFT merges, and LyCORIS' formula gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from random_adapters import KOHYA_LAYER
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.compress import compress
from lora_unitune.adapter.convert import convert
from lora_unitune.adapter.describe import describe
from lora_unitune.adapter.header import open_source
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.adapter.tools import problems
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import AdapterFileError, SettingError
from lora_unitune.families import Base

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
KOHYA_CONV = "lora_unet_mid_block_resnets_0_conv1"


@pytest.fixture
def by_peft(tiny_sd15: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A DoRA of PEFT, trained a little, and the denoiser's weights with it merged."""
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False
    )
    model = get_peft_model(pipeline.unet, config)
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data *= 1 + torch.rand_like(weight) / 2
    path = tmp_path / "dora"
    model.save_pretrained(path)
    return path, dict(model.merge_and_unload().state_dict())


def used(base: Base, adapter: Adapter, scale: float = 1.0) -> dict[str, Tensor]:
    """Returns copies of the denoiser's weights with an adapter."""
    mount = Mount(base)
    mount.use(adapter, scale)
    weights = {key: tensor.clone() for key, tensor in base.parts["unet"].state_dict().items()}
    mount.release()
    return weights


def test_pefts_folder_gives_the_weights_that_peft_merges(base15: Base, by_peft: Any) -> None:
    folder, merged = by_peft
    before = {key: tensor.clone() for key, tensor in base15.parts["unet"].state_dict().items()}
    adapter = Adapter.load(folder, "")
    assert {layer.rpartition(".")[2] for layer in adapter.magnitudes} == {"to_q", "conv1"}
    weights = used(base15, adapter)
    for key, weight in weights.items():
        assert torch.allclose(weight, merged[key], atol=1e-5), key
    changed = {key for key, weight in weights.items() if not torch.equal(weight, before[key])}
    assert {key.split(".")[-2] for key in changed} == {"to_q", "conv1"}
    half = used(base15, adapter, 0.5)[f"{CONV}.weight"]
    assert torch.allclose(half, (before[f"{CONV}.weight"] + merged[f"{CONV}.weight"]) / 2, atol=1e-5)
    after = base15.parts["unet"].state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_every_layout_keeps_it(base15: Base, by_peft: Any, tmp_path: Path, layout: Any) -> None:
    folder, merged = by_peft
    path = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    convert(folder, layout, path)
    weights = used(base15, Adapter.load(path, ""))
    for key in (f"{LINEAR}.weight", f"{CONV}.weight"):
        assert torch.allclose(weights[key], merged[key], atol=1e-5)
    assert any("DoRA" in note for note in describe(path)["notes"])
    if layout != "peft":
        assert ("names" in problems("diffusers", open_source(path))) == (layout != "diffusers")


def test_diffusers_opens_its_layout_with_the_same_weights(
    tiny_sd15: Path, by_peft: Any, tmp_path: Path
) -> None:
    folder, merged = by_peft
    convert(folder, "diffusers", tmp_path / "out.safetensors")
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True)
    pipeline.load_lora_weights(tmp_path / "out.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    weights = pipeline.unet.state_dict()
    for key in (f"{LINEAR}.weight", f"{CONV}.weight"):
        assert torch.allclose(weights[key], merged[key], atol=1e-5)


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_kohyas_names_say_which_axis_the_magnitudes_are_of(base15: Base, tmp_path: Path, axis: str) -> None:
    """LyCORIS and OneTrainer store those of inputs or of outputs; the expected weight is their formula."""
    own = {key: module.weight.detach().clone() for key, module in _modules(base15).items()}
    tensors, expected = dict[str, Tensor](), dict[str, Tensor]()
    for (key, weight), name in zip(own.items(), (KOHYA_LAYER, KOHYA_CONV), strict=True):
        rest = weight.shape[2:]
        a, b = (
            torch.randn(2, weight.shape[1], *rest) / 9,
            torch.randn(weight.shape[0], 2, *[1] * len(rest)) / 9,
        )
        shape = (len(weight), 1) if axis == "outputs" else (1, weight.shape[1])
        magnitude = torch.rand(*shape, *[1] * len(rest)) + 0.5
        merged = weight + (b.flatten(1) @ a.flatten(1)).reshape(weight.shape) / 2
        axes = [each for each in range(weight.ndim) if each != (axis == "inputs")]
        expected[key] = merged * magnitude / torch.linalg.vector_norm(merged, dim=axes, keepdim=True)
        tensors |= {
            f"{name}.lora_down.weight": a,
            f"{name}.lora_up.weight": b,
            f"{name}.dora_scale": magnitude,
        }
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "dora.safetensors")
    adapter = Adapter.load(tmp_path / "dora.safetensors", "")
    weights = used(base15, adapter)
    for key, weight in expected.items():
        assert torch.allclose(weights[f"{key}.weight"], weight, atol=1e-5), key
    convert(tmp_path / "dora.safetensors", "kohya", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert {key: tensor.shape for key, tensor in again.items()} == {k: t.shape for k, t in tensors.items()}
    assert all(torch.allclose(again[key], tensor) for key, tensor in tensors.items())
    if axis == "inputs":
        with pytest.raises(SettingError, match="kohya"):
            convert(tmp_path / "dora.safetensors", "diffusers", tmp_path / "no.safetensors")
    for tool in ("a1111", "comfyui"):
        assert ("magnitudes" in problems(tool, open_source(tmp_path / "dora.safetensors"))) == (
            axis == "outputs"
        )


def test_an_edit_with_it_and_what_it_can_not_do(editor: Editor, base15: Base, by_peft: Any) -> None:
    adapter = Adapter.load(by_peft[0], "")
    with Editor(base15) as own:
        plain = own.edit(None, "a fox", strength=1.0, steps=2)
        edit = own.edit(adapter, "a fox", strength=1.0, steps=2)
        assert edit.image != plain.image and any("DoRA" in note for note in edit.notes)
        assert own.edit(adapter, "a fox", strength=1.0, steps=2, adapter_scale=0.0).image == plain.image
        with pytest.raises(SettingError, match="DoRA"):
            own.edit(adapter, "a fox", strength=1.0, unconditional="base")
        assert own.edit(None, "a fox", strength=1.0, steps=2).image == plain.image
    with pytest.raises(SettingError, match="DoRA"):
        compress(adapter, keep=0.9)


def test_magnitudes_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    path, pair = tmp_path / "dora.safetensors", {"lora_down.weight": (4, 8), "lora_up.weight": (6, 4)}
    for shape in [(8, 1), (1, 6), (6, 6), (0,), ()]:
        shapes = {**pair, "dora_scale": shape}
        save_file({f"{KOHYA_LAYER}.{end}": torch.ones(each) for end, each in shapes.items()}, path)
        with pytest.raises(AdapterFileError, match="dora_scale.*width"):
            Adapter.load(path, "")
    save_file({f"{KOHYA_LAYER}.dora_scale": torch.ones(6, 1)}, path)
    with pytest.raises(AdapterFileError, match="dora_scale"):
        Adapter.load(path, "")


def _modules(base: Base) -> dict[str, nn.Linear | nn.Conv2d]:
    modules: Any = {name: base.parts["unet"].get_submodule(name) for name in (LINEAR, CONV)}
    return modules
