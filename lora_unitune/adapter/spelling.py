"""How other tools spell the tensors of an adapter: one reader for all, and names for what isn't a LoRA."""

from __future__ import annotations

import re

from lora_unitune.errors import AdapterFileError
from lora_unitune.families import FAMILIES, Family

SKIPPED = re.compile(r"bundle_emb\.")
"""Prefix of keys that hold no adapter: embeddings of textual inversion, stored beside one."""

_WRAPPERS = ("base_model.model.", "module.")
_MATRIX = re.compile(
    r"(?P<path>.+?)(\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(?P<side>A|B|down|up|mid)"
    r"(\.(?!weight$|bias$)[\w-]+)?(\.weight)?"
)
_SIDES = {"down": "A", "up": "B"}
_ALPHA = re.compile(r"(?P<path>.+?)(_lora|\.lora|\.lora_linear_layer)?(\.(down|lora_down)\.weight)?\.alpha")
_HADAMARD = re.compile(r"(?P<path>.+)\.(?P<what>hada_(w[12]_[ab]|t[12]))")
_MAGNITUDE = re.compile(
    r"(?P<path>.+)\.(?P<what>dora_scale|lora_magnitude_vector)(\.(?!weight$)[\w-]+)?(\.weight)?"
)

_OTHERS_OF_PEFT = (
    "p?vera|randlora|hra|hira|fourierft|shira|miss|bone|c3a|vblora|road|waveft|delora|gralora|ln_tuning|adamss|beft|deft|"
    "frod|lily|osf|peanut|poly|psoft|supertuning|tinylora|trainable_tokens|unilora"
)

_OTHERS = {
    r".*\.lokr_": "a LoKr (Kronecker products)",
    r".*\.(oft_|boft_)": "an OFT (rotations of the base's weights)",
    r".*\.[ab][12]\.weight$": "a GLoRA",
    r".*(\.on_input$|\.ia3_l)": "an IA3 (factors of activations)",
    r".*\.(w_norm|b_norm)$": "a training of norms",
    r".*\.(diff|diff_b|set_weight)$": "a file of whole weight differences",
    r".*\.lora_E$": "an AdaLoRA",
    rf".*\.({_OTHERS_OF_PEFT})_": "an adapter of another kind of PEFT's",
    r".*\.lora_embedding_[AB]": "a LoRA of token embeddings",
    r".*\.lora_(A|B|up|down)(\.[\w-]+)?\.bias$": "a LoRA with biases",
    r".*custom_diffusion": "a Custom Diffusion",
    r"lora_controlnet$": "a Control-LoRA",
    r".*:\d+:(up|down)$": "a LoRA in cloneofsimo's old layout",
    r"(emb_params|string_to_param|clip_[lg])$|<[^>]+>$": "an embedding of textual inversion",
    r"(control_model|controlnet_|lllite_)": "a ControlNet",
    r"(image_proj|ip_adapter)\.": "an IP-Adapter",
    r".*motion_modules\.": "a motion module of AnimateDiff, or a LoRA for one",
    r"(first_stage_model|(model\.diffusion_model|cond_stage_model|conditioner)\.(?!.*lora))": "a whole model",
    r"(?!.*lora).*\.(weight|bias)$": "a file with whole weights of layers",
}


_OTHER_BASES = {
    r".*(double_blocks|single_blocks|single_transformer_blocks)[._]": "FLUX",
    r".*joint_blocks[._]|transformer\.transformer_blocks\.\d+\.attn\.add_": "Stable Diffusion 3",
}


def split(key: str) -> tuple[str, str] | None:
    """Splits a tensor's key into its layer's path, in the tool's spelling, and what it is of that layer.

    Args:
        key: The tensor's key in a file.

    Returns:
        The path; and "lora_A.weight", "lora_B.weight", "lora_mid.weight", "alpha", or one of a LoHa's matrices,
        such as "hada_w1_a", or one of a DoRA's magnitudes, "dora_scale" and "lora_magnitude_vector". None for a key
        of none of these.
    """
    for wrapper in _WRAPPERS:
        key = key.removeprefix(wrapper)
    if match := _MATRIX.fullmatch(key):
        side = match["side"]
        return match["path"], f"lora_{_SIDES.get(side, side)}.weight"
    if match := _ALPHA.fullmatch(key):
        return match["path"], "alpha"
    if match := _HADAMARD.fullmatch(key) or _MAGNITUDE.fullmatch(key):
        return match["path"], match["what"]
    return None


def our_key(key: str, family: Family) -> str | None:
    """Returns a tensor's key in this package: "<part>.<module>." and what it is of that layer, as for `split`.

    A key of no layer is only renamed to its current spelling.

    Args:
        key: The tensor's key in a file.
        family: Family of the file's base.

    Returns:
        The key; None for a layer in kohya's layout that the family doesn't have.
    """
    found = split(key)
    if not found:
        return family.names.current(key)
    layer = family.names.layer(found[0], family.denoiser)
    return f"{layer}.{found[1]}" if layer else None


def check_is_lora(name: str, keys: list[str]) -> None:
    """Checks that no key belongs to an adapter of another kind, or for another kind of base.

    Args:
        name: Name of the file in messages.
        keys: Keys of its tensors.

    Raises:
        AdapterFileError: One does; the message names the kind.
    """
    for pattern, title in _OTHERS.items():
        if any(re.match(pattern, key) for key in keys):
            raise AdapterFileError(
                f"{name} is {title}, and only LoRA is supported; give a LoRA (or LoCon, LoHa, DoRA) file"
            )
    for pattern, title in _OTHER_BASES.items():
        if any(re.match(pattern, key) for key in keys):
            supported = " or ".join(row.title for row in FAMILIES.values())
            raise AdapterFileError(f"{name} is an adapter for {title}; give one for {supported}")
