"""Names of tensors that other tools know in a LoRA file.

After ComfyUI `comfy/lora.py`, A1111 `extensions-builtin/Lora/networks.py`, and diffusers `loaders/lora_pipeline.py`.
ComfyUI's names of a UNet's layers were compared with its source; the other rules of ComfyUI and A1111 were not.
"""

from __future__ import annotations

import re

_KOHYA = r"lora_(unet|te|te1|te2)_\w+\.(lora_(up|down|mid)\.weight|alpha|hada_\w+)"
_ENDS = r"(\.lora_[AB]|\.lora\.(up|down)|\.lora_linear_layer\.(up|down))\.weight"
KNOWN_KEYS = {
    "a1111": re.compile(_KOHYA),
    "comfyui": re.compile(
        rf"{_KOHYA}|lycoris_\w+\.(lora_(up|down|mid)\.weight|alpha|hada_\w+)"
        # ComfyUI has ".processor" in the names of attention, and no ".0"
        rf"|(unet\.)?(?!text_encoder)(?:(?!\.to_).)+{_ENDS}"
        rf"|(unet\.)?(down_blocks|mid_block|up_blocks)\..+\.processor\.to_(q|k|v|out)({_ENDS}|_lora\.(up|down)\.weight)"
        rf"|text_encoder(_2)?\.text_model\.encoder\.layers\..+{_ENDS}"
        rf"|(diffusion_model\.(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)|text_encoders)\..+({_ENDS}|\.alpha)"
    ),
    "diffusers": re.compile(
        r"lora_(unet|te|te1|te2)_\w+\.(lora_(up|down)\.weight|alpha)"
        r"|(unet|text_encoder|text_encoder_2)\..+lora.*\.weight"
    ),
}
"""Pattern of the keys that a tool knows, by the tool."""
