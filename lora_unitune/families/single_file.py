"""Bases in one .safetensors file, in the layout of the original code: what a file is, and its models.

The configurations travel with the package; a diffusers folder of configurations beside the file, named as the file
without its suffix, is used instead. diffusers converts the names of the tensors.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_unitune.errors import BaseModelError, one_line
from lora_unitune.families.configuration import CHANNELS

CONFIGURATIONS = Path(__file__).resolve().parent / "configurations"

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXTS = {
    "cond_stage_model.transformer.": "sd15",
    "cond_stage_model.model.": "sd21",
    "conditioner.embedders.1.model.": "sdxl",
}
"""Prefix of a text encoder's tensors -> the configuration of bases with it."""

_PREFIXES = {
    "unet": (_UNET,),
    "vae": (_VAE,),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}

_OTHERS = (
    (r"[._]lora[._]|^lora_|\.hada_w1|\.lokr_w|\.oft_|\.dora_scale|^bundle_emb\.", "a LoRA"),
    (r"^control_model\.|^control_|controlnet_|input_hint_block\.|^controlnet_blocks\.", "a ControlNet"),
    (r"motion_modules\.", "a motion module of AnimateDiff"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"^(emb_params|string_to_param.*|clip_[lg])$", "a textual inversion"),
    (r"^edm_(mean|std)$", "an EDM model such as Playground 2.5"),
    (r"individual_token_refiner\.", "a HunyuanVideo model"),
    (r"(^|\.)early_stream_modulations\.", "a FLUX.3 model"),
    (r"(^|\.)(double|single)_stream_modulation", "a FLUX.2 model"),
    (r"(^|\.)distilled_guidance_layer\.", "a Chroma model"),
    (r"(^|\.)double_blocks\.\d+\.img_attn", "a FLUX.1 model"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 or 3.5 model"),
    (r"(^|\.)layers\.0\.adaLN_modulation\.0\.", "a Z-Image model"),
    (r"(^|\.)cap_embedder\.", "a Lumina 2 model"),
    (r"(^|\.)txtfusion\.", "a Krea 2 model"),
    (r"(^|\.)(txt_norm|txt_in\.text_norm)\.", "a Qwen-Image model"),
    (r"(^|\.)double_layers\.", "an AuraFlow model"),
    (r"(^|\.)cross_attn\.(kv_linear|q_linear)\.", "a Sana or PixArt model"),
    (r"(^|\.)double_stream_blocks\.", "a HiDream model"),
    (r"(^|\.)patchify_proj\.", "an LTX-Video model"),
    (r"(^|\.)head\.modulation$", "a Wan model"),
    (r"clip_txt_mapper\.|\.channelwise\.", "a Stable Cascade model"),
    (r"conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL"),
    (
        r"(^|\.)(single_)?transformer_blocks\.0\.(attn\.)?(norm_q|add_q_proj|norm1_context)",
        "another transformer",
    ),
)
"""Pattern of a key -> what a file with such a key is, the first match first."""

_ALONE = (
    (
        r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.",
        "a VAE alone; give it as vae=FILE",
    ),
    (r"^(down_blocks|up_blocks)\.", "the UNet of a diffusers folder alone; give the folder"),
    (rf"^{re.escape(_UNET)}", "a UNet alone, without text encoders and VAE; give the whole model"),
    (r"(^|\.)text_model\.|resblocks\.", "a text encoder alone; give the whole model"),
)
"""Pattern of a key -> what a file without the other parts is."""


def configuration_of(name: str, prediction: str | None, has_vae: bool) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of configurations for a file, and changes of its scheduler.

    Args:
        name: Path of the file, as the user specified it.
        prediction: What the base predicts, if the user says so.
        has_vae: Whether the VAE comes from another file.

    Raises:
        BaseModelError: The file is none of a supported base, or it doesn't say what it predicts.
    """
    shapes, header = _read_header(name)
    kind = _kind_of(name, shapes, has_vae)
    beside = Path(name).with_suffix("")
    if (beside / "model_index.json").is_file():
        return beside, {}
    said = prediction or _prediction_of(shapes, header)
    if kind == "sd21" and said is None:
        raise BaseModelError(
            f"base '{name}' is of Stable Diffusion 2.x, and the file doesn't say what it predicts; give "
            "prediction='epsilon' (2.0 and 2.1 at 512) or prediction='v_prediction' (at 768)"
        )
    changes: dict[str, Any] = {"prediction_type": said} if said else {}
    if "ztsnr" in shapes:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return CONFIGURATIONS / (f"{kind}-v" if kind == "sd21" and said == "v_prediction" else kind), changes


def _read_header(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Returns the shapes of a file's tensors by their keys, and its own entries."""
    if not name.endswith(".safetensors"):
        raise BaseModelError(
            f"base '{name}' isn't a .safetensors file; other files can run code when they are opened: give the model "
            "as .safetensors"
        )
    try:
        with safe_open(name, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except Exception as error:  # SafetensorError, or what it makes of a broken header
        raise BaseModelError(
            f"base '{name}' can't be read ({one_line(error)}); copy the file again"
        ) from error


def _kind_of(name: str, shapes: Mapping[str, tuple[int, ...]], has_vae: bool) -> str:
    """Returns the configuration of a file: "sd15", "sd21" or "sdxl"."""
    kind = next((kind for pattern, kind in _OTHERS if _has(shapes, pattern)), None)
    if kind:
        raise BaseModelError(
            f"base '{name}' is {kind}, which can't be used as a base; give a model of Stable Diffusion 1.5, 2.1 or XL"
        )
    text = next(
        (kind for start, kind in _TEXTS.items() if any(key.startswith(start) for key in shapes)), None
    )
    has_unet, own_vae = (any(key.startswith(start) for key in shapes) for start in (_UNET, _VAE))
    if not (text and has_unet and (own_vae or has_vae)):
        if text and has_unet:
            alone: str | None = "a model without its VAE; give one as vae=FILE"
        else:
            alone = next((kind for pattern, kind in _ALONE if _has(shapes, pattern)), None)
        raise BaseModelError(
            f"base '{name}' is {alone}" if alone else
            f"base '{name}' is a file of an unknown kind; give a model of Stable Diffusion 1.5, 2.1 or XL"
        )  # fmt: skip
    channels = shapes.get(f"{_UNET}input_blocks.0.0.weight", (0, 4))[1]
    if channels in CHANNELS:
        raise BaseModelError(
            f"base '{name}' is {CHANNELS[channels]} (its UNet takes {channels} channels), which isn't supported; use "
            "a text-to-image model of Stable Diffusion"
        )
    return text


def _has(keys: Iterable[str], pattern: str) -> bool:
    search = re.compile(pattern).search
    return any(search(key) for key in keys)


def _prediction_of(keys: Iterable[str], header: Mapping[str, str]) -> str | None:
    """Returns what a file says that it predicts, None if it says nothing."""
    said, model = header.get("modelspec.prediction_type", ""), header.get("modelspec.architecture", "")
    if "v_pred" in keys or said.startswith("v") or model.endswith("-v"):
        return "v_prediction"
    return "epsilon" if said == "epsilon" or model.endswith("v2-512") else None


def read_model(model: type[Any], file: Path, folder: Path, component: str) -> Any:
    """Reads one model of a file in float32; other models of the file stay on the disk.

    Args:
        model: Class of the model.
        file: The file.
        folder: Folder of the configurations.
        component: Name of the model in the folder.

    Raises:
        ValueError: A tensor is missing, or has another shape than the configuration says.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
        chosen = [key for key in keys if key.startswith(_PREFIXES[component])] or keys
        weights = {key: opened.get_tensor(key) for key in chosen}
    options: dict[str, Any] = {
        "config": str(folder),
        "subfolder": component,
        "torch_dtype": torch.float32,
        "local_files_only": True,
    }
    try:
        if component.startswith("text_encoder"):
            return create_diffusers_clip_model_from_ldm(model, weights, **options)
        return model.from_single_file(weights, **options)
    except NotImplementedError as error:  # of a tensor that is still without data
        raise ValueError(f"{file.name} lacks some of its tensors") from error


def build_tokenizer(kind: type[Any], folder: Path) -> Any:
    """Builds CLIP's tokenizer from the package's vocabulary, with the special tokens that a folder says.

    Args:
        kind: Class of the tokenizer.
        folder: Folder with a tokenizer_config.json.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary, merges = _clip_vocabulary()
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")
    return kind(vocab=vocabulary, merges=merges, **{name: config[name] for name in names})


@lru_cache(maxsize=1)
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns CLIP's token -> id, and its merges in order (arXiv 2103.00020, section 2.4)."""
    with gzip.open(CONFIGURATIONS / "clip_merges.txt.gz", "rt", encoding="utf-8") as lines:
        merges = [(first, second) for first, second in (line.split() for line in lines)]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + index) for index in range(256 - len(printable))]
    letters = [chr(code) for code in printable] + others
    names = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: index for index, name in enumerate(names)}, merges
