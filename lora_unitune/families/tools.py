"""Names of tensors that other tools know in a LoRA file.

After ComfyUI `comfy/lora.py` (a125cd84), A1111 `extensions-builtin/Lora/networks.py` (82a973c0), and diffusers
`loaders/lora_pipeline.py`. The code of ComfyUI and A1111 was run on files in each layout that this package
writes, for every layer of Stable Diffusion 1.5, 2.1 and XL: it matches what these patterns match, and nothing else.
"""

from __future__ import annotations

import re

_KOHYA = r"lora_(unet|te|te1|te2)_\w+\.(lora_(up|down|mid)\.weight|alpha|hada_\w+|dora_scale)"
_UNET = r"(unet\.)?(conv_in|conv_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks)\."
_ENDS = r"(\.lora_[AB]|\.lora\.(up|down)|\.lora_linear_layer\.(up|down))\.weight"
KNOWN_KEYS = {
    "a1111": re.compile(rf"(?!lora_te\d?_text_projection){_KOHYA}"),
    "comfyui": re.compile(
        rf"{_KOHYA}|lycoris_\w+\.(lora_(up|down|mid)\.weight|alpha|hada_\w+|dora_scale)"
        # ComfyUI has ".processor" in the names of attention, and no ".0"
        rf"|{_UNET}(?:(?!\.to_).)+{_ENDS}|{_UNET}(lora_[AB]|lora\.(up|down))\.weight"
        rf"|{_UNET}.+\.processor\.to_(q|k|v|out)({_ENDS}|_lora\.(up|down)\.weight)"
        rf"|text_encoder(_2)?\.text_model\.encoder\.layers\..+{_ENDS}"
        rf"|(diffusion_model\.(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)|text_encoders)\..+({_ENDS}|\.alpha)"
    ),
    "diffusers": re.compile(
        r"lora_(unet|te|te1|te2)_\w+\.(lora_(up|down)\.weight|alpha)"
        r"|(unet|text_encoder|text_encoder_2)\..+(lora.*\.weight|\.lora_magnitude_vector)"
    ),
}
"""Pattern of the keys that a tool knows, by the tool."""
