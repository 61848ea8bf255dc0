"""Names of layers in other tools: the mapping of a family, and the tables of Stable Diffusion.

This module doesn't import torch, so that files can be described without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class LayerNames:
    """Names of a family's layers in files of other tools.

    Attributes:
        prefixes: Prefix of a layer's path, "<part>." or longer -> prefix of its name in kohya's layout; the
            first match is used.
        words: Every component of a module's path except numbers: kohya's names have underscores for dots, so
            only a list of components can restore the dots.
        blocks: Paths of the denoiser's blocks -> their paths in kohya's layout, where they differ.
        block_parts: Module -> its name in kohya's layout, inside "resnets" blocks.
        old_prefixes: Prefix of keys in files of earlier releases -> current prefix.
        width_key: Suffix of the keys whose last dimension, the width, identifies the base model.
        kinds: Width -> the base model's name in kohya's header, and in ModelSpec.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
    block_parts: Mapping[str, str] = field(default_factory=dict)
    old_prefixes: Mapping[str, str] = field(default_factory=dict)
    width_key: str = ""
    kinds: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    def current(self, key: str) -> str:
        """Returns a tensor's key in its current spelling."""
        for old, new in self.old_prefixes.items():
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    def kind_of(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
        """Returns the base model's names in kohya's header and in ModelSpec; None if it can't be identified.

        Args:
            shapes: Shapes of the tensors, by "<part>.<module>.lora_A.weight" and the like.
        """
        widths = {
            shape[-1] for key, shape in shapes.items() if self.width_key and key.endswith(self.width_key)
        }
        return self.kinds.get(next(iter(widths))) if len(widths) == 1 else None

    def to_kohya(self, layer: str, denoiser: str) -> str:
        """Returns a layer's name in kohya's layout.

        Args:
            layer: "<part>.<module>", the module's path with dots.
            denoiser: Name of the denoising part, whose blocks `blocks` renames.

        Raises:
            KeyError: The layout has no names for layers of this part.
        """
        layer = self.current(layer)
        start = next((start for start in self.prefixes if layer.startswith(start)), None)
        if start is None:
            raise KeyError(layer)
        path = layer.removeprefix(start)
        if start == f"{denoiser}.":
            block = next((b for b in self.blocks if f"{path}.".startswith(f"{b}.")), None)
            if block:
                inside = path.removeprefix(block).removeprefix(".")
                path = ".".join(filter(None, (self.blocks[block], self.block_parts.get(inside, inside))))
        return self.prefixes[start] + path.replace(".", "_")

    def from_kohya(self, name: str, denoiser: str) -> str | None:
        """Returns "<part>.<module>" of a layer's name in kohya's layout; None if the family has no such layer."""
        for start, prefix in self.prefixes.items():
            if name.startswith(prefix):
                path = self._path(name.removeprefix(prefix), start == f"{denoiser}.")
                if path:
                    return start + path
        return None

    def _path(self, rest: str, in_denoiser: bool) -> str:
        """Returns the dotted path of a name without its prefix, "" if a component is unknown."""
        block = self._block_at(rest) if in_denoiser and self.blocks else ""
        steps = [self._blocks_back[block]] if block else []
        rest = rest.removeprefix(block).removeprefix("_")
        while rest:
            match = self._step.match(rest)
            if not match:
                return ""
            steps.append(match[1])
            rest = rest[match.end() :]
        return ".".join(steps)

    def _block_at(self, name: str) -> str:
        """Returns the longest of kohya's block names that is a prefix of a name, "" if there is none."""
        words = name.split("_")
        starts = ("_".join(words[:count]) for count in range(len(words), 0, -1))
        return next((start for start in starts if start in self._blocks_back), "")

    @cached_property
    def _step(self) -> re.Pattern[str]:
        """Pattern of the next component or number of a name."""
        words = [*sorted(self.words, key=len, reverse=True), r"\d+"]
        return re.compile("(" + "|".join(words) + r")(?:_|$)")

    @cached_property
    def _blocks_back(self) -> dict[str, str]:
        """kohya's names of blocks, and of renamed modules inside them, -> paths."""
        inside = {
            f"{theirs}.{name}".replace(".", "_"): f"{ours}.{module}"
            for ours, theirs in self.blocks.items()
            for module, name in self.block_parts.items()
            if ".resnets." in ours
        }
        others = {
            theirs.replace(".", "_"): ours for ours, theirs in self.blocks.items() if ".resnets." not in ours
        }
        return {**inside, **others}


UNET_WORDS = (
    "down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 "
    "attn2 to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_shortcut conv_in "
    "conv_out time_emb_proj time_embedding add_embedding linear_1 linear_2"
)
CLIP_WORDS = "encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
SD_WORDS = tuple(f"{UNET_WORDS} {CLIP_WORDS}".split())
WIDTH_KEY = "attn2.to_k.lora_A.weight"


def _sdxl_blocks() -> dict[str, str]:
    """Returns the blocks of SDXL's UNet as diffusers names them -> as Stability's code and kohya name them."""
    blocks = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for ours, theirs in {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}.items():
        blocks |= {f"{ours}.linear_1": f"{theirs}.0", f"{ours}.linear_2": f"{theirs}.2"}
    for level in range(3):
        for layer in range(2):
            place = f"input_blocks.{3 * level + layer + 1}"
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            if level > 0:
                blocks[f"down_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        for layer in range(3):
            place = f"output_blocks.{3 * level + layer}"
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            if level < 2:
                blocks[f"up_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        if level < 2:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
            blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.2.conv"
    return blocks


SD_NAMES = LayerNames(
    prefixes={"unet.": "lora_unet_", "text_encoder.": "lora_te_text_model_"},
    words=SD_WORDS,
    old_prefixes={"text_encoder.text_model.": "text_encoder."},
    width_key=WIDTH_KEY,
    kinds={768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", "stable-diffusion-v2-512")},
)
SDXL_NAMES = LayerNames(
    prefixes={
        "unet.": "lora_unet_",
        "text_encoder.": "lora_te1_text_model_",
        "text_encoder_2.text_model.": "lora_te2_text_model_",
        "text_encoder_2.": "lora_te2_",
    },
    words=SD_WORDS,
    blocks=_sdxl_blocks(),
    block_parts={
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    },
    old_prefixes={"text_encoder.text_model.": "text_encoder."},
    width_key=WIDTH_KEY,
    kinds={2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")},
)
