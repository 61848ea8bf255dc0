"""Bases with the shapes of real models and random weights, since cost doesn't depend on their values."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_unitune.families import POCKET_FOLDER, Base, load_base
from lora_unitune.families.loading import resolve_device
from lora_unitune.families.sd import StableDiffusionBase
from lora_unitune.families.sdxl import StableDiffusionXLBase

NAMES = ("pocket", "sd15", "sdxl")


def make_base(name: str, device: str, dtype: torch.dtype | None = None) -> Base:
    """Pocket, or a random base of Stable Diffusion 1.5's or XL's shapes; on a GPU in half precision."""
    target = resolve_device(device)
    if name == "pocket":
        return load_base(name, device, dtype)
    torch.manual_seed(0)
    with target:
        components = _components(name)
    kind = StableDiffusionXLBase if name == "sdxl" else StableDiffusionBase
    return kind(
        name,
        **components,
        device=target,
        dtype=dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32),
    )


def _components(name: str) -> dict[str, Any]:
    tokenizer = CLIPTokenizer.from_pretrained(POCKET_FOLDER / "tokenizer", model_max_length=77)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    shared = {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler}
    small = CLIPTextModel(_text(tokenizer, 768, 12, 12))
    if name == "sd15":
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768
        )  # the other defaults are those of 1.x
        return {"unet": unet, "text_encoder": small, **shared}
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    large = CLIPTextModelWithProjection(_text(tokenizer, 1280, 32, 20))
    text = {"text_encoder": small, "text_encoder_2": large, "tokenizer_2": tokenizer}
    return {"unet": unet, **text, **shared, "zeros_for_empty": True}


def _text(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    end = tokenizer.eos_token_id
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
