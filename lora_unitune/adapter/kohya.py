"""The kohya layout, which ComfyUI, A1111 and kohya's own scripts read: names of layers, alphas, header.

A layer's key is its path in the model with underscores for dots; beside its two matrices lies its alpha.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from lora_unitune.adapter.int8 import rank_axis

PREFIXES = {
    "sd": {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"},
    "sdxl": {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_text_model_",
        "text_encoder_2": "lora_te2_text_model_",
    },
}
SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}

_WORDS = (
    "down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 "
    "attn2 to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_shortcut conv_in "
    "conv_out time_emb_proj time_embedding add_embedding linear_1 linear_2 encoder layers self_attn q_proj "
    "k_proj v_proj out_proj mlp fc1 fc2"
).split()
_STEP = re.compile("(" + "|".join([*sorted(_WORDS, key=len, reverse=True), r"\d+"]) + r")(?:_|$)")
_KEY = re.compile(r"(?P<layer>lora_[^.]+)\.(?P<what>lora_down\.weight|lora_up\.weight|alpha)")
_LEGACY_PART = (0x100000, 0x110000)  # bytes of a file that kohya's older hash looks at


def _sdxl_blocks() -> dict[str, str]:
    """Returns the blocks of SDXL's UNet as diffusers names them -> as Stability's own code and kohya do."""
    found = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for ours, theirs in {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}.items():
        found |= {f"{ours}.linear_1": f"{theirs}.0", f"{ours}.linear_2": f"{theirs}.2"}
    for level in range(3):
        for layer in range(2):
            place = f"input_blocks.{3 * level + layer + 1}"
            found[f"down_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            if level > 0:
                found[f"down_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        for layer in range(3):
            place = f"output_blocks.{3 * level + layer}"
            found[f"up_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            if level < 2:
                found[f"up_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        if level < 2:
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
            found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.2.conv"
    return found


_SDXL_BLOCKS = _sdxl_blocks()
_SDXL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_FROM_SDXL = {
    **{
        f"{theirs}.{inside}".replace(".", "_"): f"{ours}.{name}"
        for ours, theirs in _SDXL_BLOCKS.items()
        for name, inside in _SDXL_RESNET.items()
        if ".resnets." in ours
    },
    **{theirs.replace(".", "_"): ours for ours, theirs in _SDXL_BLOCKS.items() if ".resnets." not in ours},
}


def layer_name(part: str, module: str, family: str) -> str:
    """Returns a layer's kohya name.

    Args:
        part: "unet", "text_encoder" or "text_encoder_2".
        module: its path in that part, with dots.
        family: "sd" or "sdxl", whose UNet has other names in this layout.
    """
    path = module.removeprefix("text_model.")
    if family == "sdxl" and part == "unet":
        block = next((b for b in _SDXL_BLOCKS if f"{path}.".startswith(f"{b}.")), None)
        if block:
            inside = path.removeprefix(block).removeprefix(".")
            path = ".".join(filter(None, (_SDXL_BLOCKS[block], _SDXL_RESNET.get(inside, inside))))
    return PREFIXES[family][part] + path.replace(".", "_")


def module_of(name: str) -> tuple[str, str] | None:
    """Returns the part and the path of a layer's kohya name; None for a name that no such model has."""
    prefixes = {prefix: part for parts in PREFIXES.values() for part, prefix in parts.items()}
    for prefix, part in prefixes.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            block = next((b for b in _FROM_SDXL if part == "unet" and f"{rest}_".startswith(f"{b}_")), "")
            steps = [_FROM_SDXL[block]] if block else ["text_model"] if part == "text_encoder_2" else []
            rest = rest.removeprefix(block).removeprefix("_")
            while rest:
                match = _STEP.match(rest)
                if not match:
                    return None
                steps.append(match[1])
                rest = rest[match.end() :]
            return (part, ".".join(steps)) if steps else None
    return None


def is_sdxl(keys: Iterable[str]) -> bool:
    """Says whether any key of a file has a name that only SDXL has in this layout."""
    return any(re.match(r"lora_te2_|lora_unet_(input|middle|output)_block", key) for key in keys)


def is_kohya(keys: Iterable[str]) -> bool:
    """Says whether any key of a file is one of this layout."""
    return any(_KEY.fullmatch(key) for key in keys)


def our_key(key: str) -> str | None:
    """Returns a kohya key in this package's spelling, an alpha's ending in ".alpha"; None if it isn't one."""
    match = _KEY.fullmatch(key)
    found = module_of(match["layer"]) if match else None
    if not match or not found:
        return None
    ending = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return f"{found[0]}.{found[1]}.{ending.get(match['what'], 'alpha')}"


def filled_up(
    tensors: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Fills layers of lower rank up with zeros; diffusers' reader takes one alpha for a whole text encoder.

    Args:
        tensors: by "<part>.<module>.lora_A.weight" and "...lora_B.weight".
        ranks: of the parts.

    Returns:
        The tensors, and the ranks that the layers had which were filled up.
    """
    filled, lower = dict[str, Tensor](), dict[str, int]()
    for key, tensor in tensors.items():
        layer, inner, rank = key.rsplit(".", 2)[0], rank_axis(key), ranks[key.partition(".")[0]]
        room = list(tensor.shape)
        room[inner] = rank
        filled[key] = tensor.new_zeros(room)
        filled[key].narrow(inner, 0, tensor.shape[inner]).copy_(tensor)
        if tensor.shape[inner] < rank:
            lower[layer] = tensor.shape[inner]
    return filled, lower


def to_kohya(tensors: Mapping[str, Tensor], scales: Mapping[str, float], family: str) -> dict[str, Tensor]:
    """Renames an adapter's tensors, and adds each layer's alpha.

    Args:
        tensors: by "<part>.<module>.lora_A.weight" and "...lora_B.weight".
        scales: alpha / rank, by part.
        family: "sd" or "sdxl".
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, side, _ = key.rsplit(".", 2)
        part, _, module = path.partition(".")
        name = layer_name(part, module, family)
        renamed[f"{name}.{SIDES[side]}.weight"] = tensor
        if side == "lora_A":
            renamed[f"{name}.alpha"] = torch.tensor(scales[part] * tensor.shape[0])
    return dict(sorted(renamed.items()))


def header(
    tensors: Mapping[str, Tensor], rank: int, alpha: float, title: str, version: str
) -> dict[str, str]:
    """Returns the ss_ and sshs_ entries that tools of this layout look for.

    Args:
        tensors: as `to_kohya` returns them.
        rank: the largest of the layers'.
        alpha: of the layers with that rank.
        title: what a list of files shows.
        version: of the base, as kohya calls it: "sd_v1", "sd_v2" or "sdxl_base_v1-0".
    """
    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": title,
    }
    whole = save(dict(tensors), entries)
    legacy = hashlib.sha256(whole[slice(*_LEGACY_PART)]).hexdigest()[:8]
    return {**entries, "sshs_model_hash": content_hash(tensors), "sshs_legacy_hash": legacy}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of what follows the header in a file of these tensors."""
    content = save(dict(tensors))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
