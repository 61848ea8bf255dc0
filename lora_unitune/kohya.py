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

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}

_OTHER_PREFIXES = {"lora_te1_text_model_": "text_encoder"}  # as SDXL has it; some tools write it for all
_WORDS = (
    "down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 "
    "attn2 to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_shortcut conv_in "
    "conv_out time_emb_proj time_embedding linear_1 linear_2 encoder layers self_attn q_proj k_proj v_proj "
    "out_proj mlp fc1 fc2"
).split()
_STEP = re.compile("(" + "|".join([*sorted(_WORDS, key=len, reverse=True), r"\d+"]) + r")(?:_|$)")
_KEY = re.compile(r"(?P<layer>lora_[^.]+)\.(?P<what>lora_down\.weight|lora_up\.weight|alpha)")
_LEGACY_PART = (0x100000, 0x110000)  # bytes of a file that kohya's older hash looks at


def layer_name(part: str, module: str) -> str:
    """Returns a layer's kohya name.

    Args:
        part: "unet" or "text_encoder".
        module: its path in that part, with dots.
    """
    return PREFIXES[part] + module.removeprefix("text_model.").replace(".", "_")


def module_of(name: str) -> tuple[str, str] | None:
    """Returns the part and the path of a layer's kohya name; None for a name that no such model has."""
    prefixes = {**{prefix: part for part, prefix in PREFIXES.items()}, **_OTHER_PREFIXES}
    for prefix, part in prefixes.items():
        if name.startswith(prefix):
            rest, steps = name.removeprefix(prefix), list[str]()
            while rest:
                match = _STEP.match(rest)
                if not match:
                    return None
                steps.append(match[1])
                rest = rest[match.end() :]
            return (part, ".".join(steps)) if steps else None
    return None


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
        layer, side, _ = key.rsplit(".", 2)
        inner, rank = ("lora_A", "lora_B").index(side), ranks[key.partition(".")[0]]
        room = list(tensor.shape)
        room[inner] = rank
        filled[key] = tensor.new_zeros(room)
        filled[key].narrow(inner, 0, tensor.shape[inner]).copy_(tensor)
        if tensor.shape[inner] < rank:
            lower[layer] = tensor.shape[inner]
    return filled, lower


def to_kohya(tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Renames an adapter's tensors, and adds each layer's alpha.

    Args:
        tensors: by "<part>.<module>.lora_A.weight" and "...lora_B.weight".
        scales: alpha / rank, by part.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, side, _ = key.rsplit(".", 2)
        part, _, module = path.partition(".")
        name = layer_name(part, module)
        renamed[f"{name}.{SIDES[side]}.weight"] = tensor
        if side == "lora_A":
            renamed[f"{name}.alpha"] = torch.tensor(scales[part] * tensor.shape[0])
    return dict(sorted(renamed.items()))


def header(tensors: Mapping[str, Tensor], rank: int, alpha: float, title: str) -> dict[str, str]:
    """Returns the ss_ and sshs_ entries that tools of this layout look for.

    Args:
        tensors: as `to_kohya` returns them.
        rank: the largest of the layers'.
        alpha: of the layers with that rank.
        title: what a list of files shows.
    """
    widths = {t.shape[1] for key, t in tensors.items() if key.endswith("attn2_to_k.lora_down.weight")}
    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": "sd_v2" if widths == {1024} else "sd_v1",
        "ss_v2": str(widths == {1024}),
        "ss_output_name": title,
    }
    whole = save(dict(tensors), entries)
    legacy = hashlib.sha256(whole[slice(*_LEGACY_PART)]).hexdigest()[:8]
    return {**entries, "sshs_model_hash": content_hash(tensors), "sshs_legacy_hash": legacy}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of what follows the header in a file of these tensors."""
    content = save(dict(tensors))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
