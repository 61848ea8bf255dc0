"""The kohya layout, which ComfyUI, A1111 and kohya's own scripts read: names of layers, alphas, header.

A layer's key is its path in the model with underscores for dots; its alpha is stored with its two matrices. The
family's `LayerNames` map between both spellings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_unitune.adapter.dora import KOHYA
from lora_unitune.adapter.int8 import rank_axis
from lora_unitune.errors import SettingError
from lora_unitune.families import Family

if TYPE_CHECKING:
    from torch import Tensor

SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}

ALIAS_KEY = "ss_output_name"
"""Header entry with the name that A1111 and Forge take for a file."""

_LEGACY_PART = (0x100000, 0x110000)  # bytes of a file that kohya's older hash covers


def zero_padded(
    tensors: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Zero-pads layers of lower rank, since diffusers reads one alpha for a whole text encoder.

    Args:
        tensors: Matrices by "<part>.<module>.lora_A.weight" and "...lora_B.weight".
        ranks: Ranks by part.

    Returns:
        The tensors, and the original ranks of the padded layers.
    """
    padded: dict[str, Tensor] = {}
    lower: dict[str, int] = {}
    for key, tensor in tensors.items():
        layer, inner, rank = key.rsplit(".", 2)[0], rank_axis(key), ranks[key.partition(".")[0]]
        shape = list(tensor.shape)
        shape[inner] = rank
        padded[key] = tensor.new_zeros(shape)
        padded[key].narrow(inner, 0, tensor.shape[inner]).copy_(tensor)
        if tensor.shape[inner] < rank:
            lower[layer] = tensor.shape[inner]
    return padded, lower


def to_kohya(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
    family: Family,
    magnitudes: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Renames an adapter's tensors, and adds each layer's alpha.

    Args:
        tensors: Matrices by "<part>.<module>.lora_A.weight" and "...lora_B.weight".
        scales: alpha / rank, by part.
        family: The base's family.
        magnitudes: Magnitudes of a DoRA, by "<part>.<module>".

    Raises:
        SettingError: A layer has no name in this layout.
    """
    import torch

    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, side, _ = key.rsplit(".", 2)
        try:
            name = family.names.to_kohya(layer, family.denoiser)
        except KeyError:
            raise SettingError(f"layer {layer!r} has no name in kohya's layout; keep diffusers'") from None
        renamed[f"{name}.{SIDES[side]}.weight"] = tensor
        if side == "lora_A":
            renamed[f"{name}.alpha"] = torch.tensor(scales[layer.partition(".")[0]] * tensor.shape[0])
            if layer in magnitudes:
                renamed[f"{name}.{KOHYA}"] = magnitudes[layer].to(tensor.dtype)
    return dict(sorted(renamed.items()))


def header(tensors: Mapping[str, Tensor], rank: int, alpha: float, version: str) -> dict[str, str]:
    """Returns the ss_ and sshs_ entries that tools of this layout look for.

    Args:
        tensors: As `to_kohya` returns them.
        rank: The largest rank of the denoiser's layers.
        alpha: Alpha of the layers with that rank.
        version: Name of the base model in kohya's header, such as "sd_v1"; "" if unknown.
    """
    from safetensors.torch import save

    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
    }
    if any(tensor.ndim == 4 and tensor.shape[-1] > 1 for tensor in tensors.values()):
        entries["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": f"{alpha:g}"})
    if version:  # ss_v2 is redundant, but read by kohya's tools
        entries |= {"ss_base_model_version": version, "ss_v2": str("_v2" in version)}
    whole = save(dict(tensors), entries)
    legacy = hashlib.sha256(whole[slice(*_LEGACY_PART)]).hexdigest()[:8]
    return {**entries, "sshs_model_hash": content_hash(tensors), "sshs_legacy_hash": legacy}


def alias(text: str) -> str:
    """Returns a name that survives the syntax `<lora:name:1>` of A1111 and Forge."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or "adapter"


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of what follows the header in a file of these tensors."""
    from safetensors.torch import save

    content = save(dict(tensors))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def photo_text(latents: Tensor) -> str:
    """Returns the photo's latents as a header entry, since a file in this layout can hold only layers.

    float16 is kept; other dtypes are stored as float32.
    """
    import torch

    kept = latents if latents.dtype == torch.float16 else latents.float()
    values = base64.b64encode(kept.contiguous().numpy().tobytes()).decode()
    return json.dumps({"shape": list(kept.shape), "dtype": str(kept.dtype)[6:], "values": values})
