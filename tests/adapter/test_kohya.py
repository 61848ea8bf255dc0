"""kohya's layout: its names are those of other tools, and its files have what these look for."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from conftest import XL_UNET, metadata_of
from diffusers import UNet2DConditionModel
from random_adapters import EVERYTHING, make_adapter
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.convert import convert
from lora_unitune.adapter.describe import describe
from lora_unitune.families import FAMILIES, Base


def kohya_names(models: dict[str, torch.nn.Module], family: str) -> set[str]:
    """Returns the name of every layer that can be adapted, after a check that names are unique and reversible."""
    row, names = FAMILIES[family], set[str]()
    for part, model in models.items():
        for module, layer in model.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and module != "text_projection":
                name = row.names.to_kohya(f"{part}.{module}", row.denoiser)
                assert name not in names
                names.add(name)
                assert row.names.from_kohya(name, row.denoiser) == f"{part}.{module}"
    return names


def test_kohya_names_are_those_of_stable_diffusion_15() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # the defaults are those of 1.x
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        )
    names = kohya_names({"unet": unet, "text_encoder": text_encoder}, "sd")
    attention = [name for name in names if name.startswith("lora_unet") and "attn" in name]
    assert len(attention) == 16 * 2 * 4
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in names
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj" in names
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0" in names
    assert "lora_te_text_model_encoder_layers_11_self_attn_out_proj" in names
    assert sum(name.startswith("lora_te_") for name in names) == 12 * 6


def sdxl_names() -> set[str]:
    """The kohya names of all layers of SDXL, derived from the structure of Stability's UNet."""
    attention = ("to_q", "to_k", "to_v", "to_out_0")
    block = [f"attn{number}_{name}" for number in (1, 2) for name in attention]
    block += ["ff_net_0_proj", "ff_net_2"]
    resnet = ("in_layers_2", "emb_layers_1", "out_layers_3")
    depths = {4: 2, 5: 2, 7: 10, 8: 10}  # input block -> transformer layers
    names = ["input_blocks_0_0", "input_blocks_3_0_op", "input_blocks_6_0_op", "out_2"]
    names += ["time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"]
    names += ["output_blocks_2_2_conv", "output_blocks_5_2_conv"]
    places = [(f"input_blocks_{n}", depths.get(n, 0)) for n in (1, 2, 4, 5, 7, 8)]
    places += [(f"output_blocks_{n}", 10 if n < 3 else 2 if n < 6 else 0) for n in range(9)]
    names += [f"{place}_0_{layer}" for place, _ in places for layer in resnet]
    names += [f"{place}_0_skip_connection" for place in ("input_blocks_4", "input_blocks_7")]
    names += [f"output_blocks_{n}_0_skip_connection" for n in range(9)]
    names += [f"middle_block_{n}_{layer}" for n in (0, 2) for layer in resnet]
    for place, depth in [(f"{place}_1", depth) for place, depth in places if depth] + [
        ("middle_block_1", 10)
    ]:
        names += [f"{place}_proj_in", f"{place}_proj_out"]
        names += [f"{place}_transformer_blocks_{n}_{layer}" for n in range(depth) for layer in block]
    all_names = {f"lora_unet_{name}" for name in names}
    inside = [f"self_attn_{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    for encoder, layers in (("te1", 12), ("te2", 32)):
        start = f"lora_{encoder}_text_model_encoder_layers"
        all_names |= {f"{start}_{n}_{name}" for n in range(layers) for name in inside}
    return all_names


def test_kohya_names_are_those_of_stable_diffusion_xl() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=XL_UNET["down_block_types"],
            up_block_types=XL_UNET["up_block_types"],
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        small = CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
        large = CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20)
        text = {"text_encoder": CLIPTextModel(small), "text_encoder_2": CLIPTextModelWithProjection(large)}
    assert kohya_names({"unet": unet, **text}, "sdxl") == sdxl_names()


def test_other_tools_sdxl_files_open_completely(basexl: Base, tmp_path: Path) -> None:
    """Without this package's header the family is inferred from the names, or from the second text encoder."""
    adapter = make_adapter(basexl, EVERYTHING)
    for layout in ("kohya", "diffusers"):
        path = tmp_path / f"{layout}.safetensors"
        replace(adapter, fingerprint="", photo_latents=None).save(path, dtype=torch.float32, layout=layout)
        assert "lora_unitune" not in metadata_of(path)
        opened = Adapter.load(path)
        assert opened.family == "sdxl" and opened.tensors.keys() == adapter.tensors.keys()
        assert [opened.scale_of(part) for part in opened.parts] == [2.5, 1.5, 2.5]
        assert all(torch.equal(opened.tensors[key], tensor) for key, tensor in adapter.tensors.items())


def test_a_kohya_file_has_the_metadata_of_its_tools(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "kohya.safetensors"
    adapter.save(path, layout="kohya")
    content, metadata, tensors = path.read_bytes(), metadata_of(path), load_file(path)
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "10")
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert "lora_adapter_metadata" not in metadata  # diffusers refuses it beside these keys
    alphas = {key: tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {10.0, 3.0}
    assert 3 * len(alphas) == len(tensors), "two matrices and an alpha each; the photo is in the header"
    assert describe(path)["photo_embedded"] is True


def test_a_wide_adapter_goes_to_kohya_and_back(base15: Base, tmp_path: Path) -> None:
    first, other, again = (tmp_path / f"{name}.safetensors" for name in ("first", "other", "again"))
    make_adapter(base15, EVERYTHING, size=(48, 32)).save(first)
    convert(first, "kohya", other)
    convert(other, "diffusers", again)
    assert metadata_of(again) == metadata_of(first) and describe(other)["size"] == [48, 32]
    before, after = load_file(first), load_file(again)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
