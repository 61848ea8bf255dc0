"""Writes a diffusers folder as one file in the layout of the original code, the inverse of diffusers' conversion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_blocks(levels: int, layers: int) -> dict[str, str]:
    """Returns the paths of a UNet's modules in diffusers -> in the original code."""
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for level in range(levels):
        for layer in range(layers):
            place = f"input_blocks.{(layers + 1) * level + layer + 1}"
            names[f"down_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (level + 1)}.0.op"
        for layer in range(layers + 1):
            place = f"output_blocks.{(layers + 1) * level + layer}"
            names[f"up_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"{place}.1"
    return names


def unet_key(key: str, blocks: Mapping[str, str], layers: int, has_attention: Mapping[str, bool]) -> str:
    if ".upsamplers." in key:
        level = int(key.split(".")[1])
        place = 2 if has_attention[f"up_blocks.{level}"] else 1
        return f"output_blocks.{(layers + 1) * (level + 1) - 1}.{place}.conv.{key.rpartition('.')[2]}"
    start = next(start for start in blocks if key.startswith(f"{start}."))
    inside = key.removeprefix(f"{start}.")
    if ".resnets." in start:
        module, _, last = inside.rpartition(".")
        inside = f"{RESNET[module]}.{last}"
    return f"{blocks[start]}.{inside}"


def original_unet(folder: Path) -> dict[str, Tensor]:
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    layers = config["layers_per_block"]
    blocks = unet_blocks(len(config["block_out_channels"]), layers)
    attention = {
        f"up_blocks.{level}": "CrossAttn" in kind for level, kind in enumerate(config["up_block_types"])
    }
    return {
        f"model.diffusion_model.{unet_key(key, blocks, layers, attention)}": tensor
        for key, tensor in weights.items()
    }


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_vae(folder: Path, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """Returns a VAE's tensors; the attention's matrices are 1 x 1 convolutions there."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    levels = len(config["block_out_channels"])
    renamed = {}
    for key, tensor in weights.items():
        new = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for level in range(levels):
            new = new.replace(f"down_blocks.{level}.resnets", f"down.{level}.block")
            new = new.replace(f"down_blocks.{level}.downsamplers.0", f"down.{level}.downsample")
            new = new.replace(f"up_blocks.{level}.resnets", f"up.{levels - 1 - level}.block")
            new = new.replace(f"up_blocks.{level}.upsamplers.0", f"up.{levels - 1 - level}.upsample")
        for index in range(2):
            new = new.replace(f"mid_block.resnets.{index}", f"mid.block_{index + 1}")
        if "attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            for ours, theirs in ATTENTION.items():
                new = new.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[prefix + new] = tensor
    return renamed


def original_clip(folder: Path, prefix: str) -> dict[str, Tensor]:
    weights = load_file(folder / "model.safetensors")
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": each for key, each in weights.items()}


OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_open_clip(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Returns an OpenCLIP text encoder's tensors; query, key and value are one matrix there."""
    weights = {
        key.removeprefix("text_model."): each for key, each in load_file(folder / "model.safetensors").items()
    }
    width = weights["final_layer_norm.weight"].shape[0]
    renamed = {
        "positional_embedding": weights.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": weights.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": weights.pop("final_layer_norm.weight"),
        "ln_final.bias": weights.pop("final_layer_norm.bias"),
        "text_projection": weights.pop("text_projection.weight", torch.eye(width)).T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for key in list(weights):
        new = key.replace("encoder.layers", "transformer.resblocks")
        for ours, theirs in OPEN_CLIP.items():
            new = new.replace(ours, theirs)
        if ".q_proj." in key:
            parts = [weights[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            name = "attn.in_proj_weight" if key.endswith("weight") else "attn.in_proj_bias"
            renamed[f"{new.partition('self_attn')[0]}{name}"] = torch.cat(parts)
        elif "k_proj" not in key and "v_proj" not in key:
            renamed[new] = weights[key]
    return {f"{prefix}{key}": each for key, each in renamed.items()}


def original(folder: Path, kind: str) -> dict[str, Tensor]:
    """Returns all tensors of a folder in the layout of "sd15", "sd21" or "sdxl"."""
    tensors = original_unet(folder / "unet") | original_vae(folder / "vae")
    if kind == "sd15":
        return tensors | original_clip(folder / "text_encoder", "cond_stage_model.transformer.")
    if kind == "sd21":
        return tensors | original_open_clip(folder / "text_encoder", "cond_stage_model.model.")
    small = original_clip(folder / "text_encoder", "conditioner.embedders.0.transformer.")
    return tensors | small | original_open_clip(folder / "text_encoder_2", "conditioner.embedders.1.model.")


def save_original(
    folder: Path,
    file: Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    header: dict[str, str] | None = None,
) -> Path:
    """Saves a folder's models as one file, and its configurations beside it, named as the file."""
    tensors = {key: each.to(dtype).contiguous() for key, each in original(folder, kind).items()}
    save_file(tensors, file, header)
    skip = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder, file.with_suffix(""), ignore=skip)
    return file
