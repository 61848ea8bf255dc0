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
        blocks: Paths of the denoiser's blocks -> their paths in the model's original code, where they differ.
        block_parts: Module -> its name in the original code, inside "resnets" blocks.
        kohya_blocks: Whether kohya's layout names blocks as the original code does.
        aliases: Prefixes of paths in other tools' files, and in files of earlier releases -> prefix here, or in
            kohya's layout; the longest match is used.
        stored: Prefixes of keys here -> in diffusers' layout, where an older library needs another spelling.
        respelled: Patterns of paths in other tools' files -> replacements.
        width_key: Suffix of the keys whose last dimension, the width, identifies the base model.
        kinds: Width -> the base model's name in kohya's header, and in ModelSpec.
        by_prediction: The same by width and what the base model predicts, where only that tells them apart.
        in_dialogs: The base model's name in kohya's header -> in A1111's dialogs.
        versions: How names of its base models begin, in headers of any tool.
        kernels: Last component of a convolution's path -> side of its kernel.
        kernels_of: The same for those layers that are convolutions in one base model only, by its name in kohya's
            header.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
    block_parts: Mapping[str, str] = field(default_factory=dict)
    kohya_blocks: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    respelled: Mapping[str, str] = field(default_factory=dict)
    width_key: str = ""
    kinds: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    by_prediction: Mapping[tuple[int, str], tuple[str, str]] = field(default_factory=dict)
    in_dialogs: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[str, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    kernels_of: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def kernel(self, layer: str, kind: str) -> int:
        """Returns the side of a convolution's kernel; 0 if the layer isn't known to be one.

        Args:
            layer: "<part>.<module>".
            kind: The base model's name in kohya's header, "" if unknown.
        """
        return {**self.kernels, **self.kernels_of.get(kind, {})}.get(layer.rpartition(".")[2], 0)

    def current(self, key: str) -> str:
        """Returns a key or path with its prefix in the current spelling."""
        alias = max((old for old in self.aliases if key.startswith(old)), key=len, default="")
        return self.aliases[alias] + key.removeprefix(alias) if alias else key

    def in_file(self, key: str) -> str:
        """Returns a key as it is stored in diffusers' layout."""
        ours = next((ours for ours in self.stored if key.startswith(ours)), "")
        return self.stored[ours] + key.removeprefix(ours) if ours else key

    def layer(self, path: str, denoiser: str) -> str | None:
        """Returns "<part>.<module>" of a layer's path in any tool's spelling.

        Args:
            path: The layer's path, with dots or, as in kohya's layout, underscores.
            denoiser: Name of the denoising part.

        Returns:
            The layer; None if the family has no layer of that name in kohya's layout.
        """
        named, path = path, self.current(path)
        for pattern, replacement in self.respelled.items():
            path = re.sub(pattern, replacement, path)
        start = f"{denoiser}."
        if "." not in path:
            return self.from_kohya(path, denoiser)
        if path.startswith(start) and path.removeprefix(start).partition(".")[0] in self._originals:
            path = path.removeprefix(start).replace(".", "_")
            return self.from_kohya(self.prefixes[start] + path, denoiser)
        is_other = path.startswith(start) and not named.startswith(
            start
        )  # prefixes that all bases' files have
        tops = {block.partition(".")[0] for block in self.blocks}
        return None if is_other and path.removeprefix(start).partition(".")[0] not in tops else path

    def kind_of(self, shapes: Mapping[str, tuple[int, ...]], prediction: str = "") -> tuple[str, str] | None:
        """Returns the base model's names in kohya's header and in ModelSpec; None if it can't be identified.

        Args:
            shapes: Shapes of the tensors, by "<part>.<module>.lora_A.weight" and the like.
            prediction: What the base model predicts, as diffusers names it; "" if unknown.
        """
        widths = {
            shape[-1]
            for key, shape in shapes.items()
            if self.width_key and key.endswith(self.width_key) and shape
        }
        width = next(iter(widths)) if len(widths) == 1 else 0
        return self.by_prediction.get((width, prediction)) or self.kinds.get(width)

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
        if start == f"{denoiser}." and self.kohya_blocks:
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
    def _originals(self) -> frozenset[str]:
        """First components of the original code's paths."""
        return frozenset(path.partition(".")[0] for path in self.blocks.values())

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


def _stability_blocks(levels: int, attention: range) -> dict[str, str]:
    """Returns the blocks of a UNet as diffusers names them -> as Stability's code names them.

    Args:
        levels: Number of its resolutions.
        attention: Levels with attention, counted from the highest resolution.
    """
    blocks = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for ours, theirs in {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}.items():
        blocks |= {f"{ours}.linear_1": f"{theirs}.0", f"{ours}.linear_2": f"{theirs}.2"}
    for level in range(levels):
        for layer in range(2):
            place = f"input_blocks.{3 * level + layer + 1}"
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            if level in attention:
                blocks[f"down_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        attends = levels - 1 - level in attention
        for layer in range(3):
            place = f"output_blocks.{3 * level + layer}"
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"{place}.0"
            if attends:
                blocks[f"up_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        if level < levels - 1:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
            last = 2 if attends else 1
            blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.{last}.conv"
    return blocks


_RESNET_PARTS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_STARTS = (
    "down_blocks. mid_block. up_blocks. conv_in conv_out time_embedding. add_embedding. input_blocks. "
    "middle_block. output_blocks. time_embed. label_emb. out."
).split()
_UNET_ALIASES = {
    **{start: f"unet.{start}" for start in _UNET_STARTS},  # without any prefix, as raw PEFT writes them
    **dict.fromkeys(("diffusion_model.", "model.diffusion_model.", "lora_unet."), "unet."),
    "lycoris_": "lora_unet_",
}
_RESPELLED = {
    r"\.processor\.": ".",  # diffusers in 2023
    r"\.to_out$": ".to_out.0",
    r"\.self_attn\.to_(q|k|v|out)$": r".self_attn.\1_proj",
    r"\.self_attn\.to_out\.0$": ".self_attn.out_proj",
}


def _clip_aliases(inside: str, kohya: str, names: tuple[str, ...]) -> dict[str, str]:
    """Returns the spellings of a text encoder's paths.

    Args:
        inside: Prefix of its paths here.
        kohya: Prefix of its layers in kohya's layout.
        names: Its other names, in paths with dots.
    """
    models = (f"{name}.{model}text_model." for name in names for model in ("", "transformer."))
    short = {f"{name}.encoder.": f"{inside}encoder." for name in (*names, inside.partition(".")[0])}
    aliases = {
        **dict.fromkeys(models, inside),
        **short,
        kohya.replace("text_model_", "encoder_"): f"{kohya}encoder_",
    }
    return {old: new for old, new in aliases.items() if old != new}


_STORED = {"text_encoder.encoder.": "text_encoder.text_model.encoder."}  # as transformers 4 has it

_CLIP_L = ("text_encoder", "text_encoders.clip_l", "clip_l", "lora_te1", "lora_te", "cond_stage_model")
_CLIP_H = ("text_encoders.clip_h", "clip_h")
_CLIP_G = ("text_encoders.clip_g", "clip_g", "lora_te2")
_BARE_CLIP = {"text_model.": "text_encoder.", "encoder.layers.": "text_encoder.encoder.layers."}

_KERNELS = {"conv": 3, "conv1": 3, "conv2": 3, "conv_in": 3, "conv_out": 3, "conv_shortcut": 1}

SD_NAMES = LayerNames(
    prefixes={"unet.": "lora_unet_", "text_encoder.": "lora_te_text_model_"},
    words=SD_WORDS,
    blocks=_stability_blocks(4, range(3)),
    block_parts=_RESNET_PARTS,
    kohya_blocks=False,
    aliases={
        **_UNET_ALIASES,
        **_BARE_CLIP,
        **_clip_aliases("text_encoder.", "lora_te_text_model_", _CLIP_L + _CLIP_H),
        "lora_te1_text_model_": "lora_te_text_model_",
        "lora_te1_encoder_": "lora_te_text_model_encoder_",
    },
    stored=_STORED,
    respelled=_RESPELLED,
    width_key=WIDTH_KEY,
    kinds={768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", "stable-diffusion-v2")},
    by_prediction={
        (1024, "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
        (1024, "v_prediction"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    },
    in_dialogs={"sd_v1": "SD1", "sd_v2": "SD2", "sd_v2_v": "SD2"},
    versions=("sd_v1", "sd_v2", "sd_1", "sd_2", "stable-diffusion-v1", "stable-diffusion-v2"),
    kernels=_KERNELS,
    kernels_of={"sd_v1": {"proj_in": 1, "proj_out": 1}},
)
SDXL_NAMES = LayerNames(
    prefixes={
        "unet.": "lora_unet_",
        "text_encoder.": "lora_te1_text_model_",
        "text_encoder_2.text_model.": "lora_te2_text_model_",
        "text_encoder_2.": "lora_te2_",
    },
    words=SD_WORDS,
    blocks=_stability_blocks(3, range(1, 3)),
    block_parts=_RESNET_PARTS,
    aliases={
        **_UNET_ALIASES,
        **_BARE_CLIP,
        **_clip_aliases("text_encoder.", "lora_te1_text_model_", _CLIP_L),
        **_clip_aliases("text_encoder_2.text_model.", "lora_te2_text_model_", _CLIP_G),
        "text_encoders.clip_g.transformer.text_projection": "text_encoder_2.text_projection",
        "lora_te_text_model_": "lora_te1_text_model_",
        "lora_te_encoder_": "lora_te1_text_model_encoder_",
    },
    stored=_STORED,
    respelled=_RESPELLED,
    width_key=WIDTH_KEY,
    kinds={2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")},
    in_dialogs={"sdxl_base_v1-0": "SDXL"},
    versions=("sdxl", "stable-diffusion-xl"),
    kernels=_KERNELS,
)
