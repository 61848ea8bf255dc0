"""Kinds of base model: what a fit and an edit need from one, and how to load one by name."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lora_unitune.errors import BaseModelError, DeviceError

FAMILIES: dict[str, tuple[str, str]] = {
    "StableDiffusionPipeline": ("sd", "lora_unitune.families.sd"),
    "StableDiffusionXLPipeline": ("sdxl", "lora_unitune.families.sdxl"),
}
"""Pipeline class named in model_index.json -> (family, module with a `load` function)."""

PARTS: dict[str, tuple[str, ...]] = {
    "sd": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
}
"""Family -> the parts that a fit can adapt."""

POCKET_FOLDER = Path(__file__).resolve().parent.parent / "pocket" / "weights"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@runtime_checkable
class Base(Protocol):
    """A base model in memory, frozen and in eval mode.

    `name` is what the user asked for, `family` the kind of model, `fingerprint` 16 hexadecimal digits that
    change with the weights, `resolution` the side in pixels the base was trained at, `resolution_step` what a
    side must be a multiple of, `quantized` what its linear layers were rounded to, or "none". `parts` holds
    the modules a fit adapts, by the names diffusers gives them, and `vae` the one that only encodes and
    decodes pictures.
    """

    name: str
    family: str
    fingerprint: str
    resolution: int
    resolution_step: int
    device: torch.device
    dtype: torch.dtype
    quantized: str
    parts: dict[str, nn.Module]
    vae: nn.Module
    tokenizer: Any
    prediction_type: str
    alphas_cumprod: Tensor

    def latent_shape(self, resolution: int = 0) -> tuple[int, int, int]:
        """Returns (channels, h, w) of the latents of a square picture; 0 means the base's own resolution."""
        ...

    def encode_photo(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the scaled latents, each (1, c, h, w) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the pictures (b, 3, H, W) float32 in [0, 1] of scaled latents (b, c, h, w)."""
        ...

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        """Returns the padded token ids (1, L) int64 of a text, and the part of the text that didn't fit.

        L counts both encoders' ids where there are two.
        """
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Returns all that `predict` is to know of a text, (b, rows, width), of token ids (b, L)."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Returns the denoiser's raw output (b, c, h, w) float32; timesteps are (b,)."""
        ...

    def make_scheduler(self) -> Any:
        """Returns a fresh diffusers sampler set up as the base asks."""
        ...


def resolve_device(name: str) -> torch.device:
    """Turns a device name into a device that is there.

    Args:
        name: "auto" (the best there is), "cpu", "cuda" or "mps".

    Raises:
        DeviceError: the name is unknown, or this machine has no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if name not in there:
        raise DeviceError(f"device '{name}' is unknown; choose one of auto, cpu, cuda, mps")
    if not there[name]:
        raise DeviceError(f"device '{name}' isn't available to PyTorch on this machine; use auto or cpu")
    return torch.device(name)


def locate_base(name: str) -> str:
    """Returns the folder or hub id that `name` ("pocket", a folder, a hub id) stands for.

    Raises:
        BaseModelError: it is none of the three.
    """
    if name == "pocket":
        return str(POCKET_FOLDER)
    if Path(name).is_dir() or _HUB_ID.fullmatch(name):
        return name
    raise BaseModelError(
        f"unknown base '{name}'; give 'pocket', a folder with a diffusers model, or a hub id (owner/model)"
    )


def read_model_index(name: str) -> dict[str, Any]:
    """Reads the model_index.json of a base, from its folder or (for a hub id) through diffusers.

    Raises:
        BaseModelError: there is none, it can't be downloaded, or it isn't a diffusers index.
    """
    location = locate_base(name)
    if Path(location).is_dir():
        path = Path(location) / "model_index.json"
        if not path.is_file():
            raise BaseModelError(
                f"base '{name}' isn't a diffusers model: its folder has no model_index.json; give the folder "
                "that holds one"
            )
        try:
            index: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"base '{name}': model_index.json can't be read ({one_line(error)}); copy the model again"
            ) from error
    else:
        from diffusers import DiffusionPipeline

        try:
            index = DiffusionPipeline.load_config(location)
        except Exception as error:  # network, authorisation and cache errors have no common class
            raise BaseModelError(
                f"base '{name}' can't be downloaded ({one_line(error)}); check the id and the network, or "
                "give a local folder"
            ) from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise BaseModelError(f"base '{name}': model_index.json names no pipeline class; copy the model again")
    return index


def detect_family(name: str) -> tuple[str, str]:
    """Returns the family of a base and the module that loads it, from its model_index.json.

    Raises:
        BaseModelError: the base isn't there, or is of a kind that isn't supported.
    """
    kind = read_model_index(name)["_class_name"]
    if kind not in FAMILIES:
        raise BaseModelError(
            f"base '{name}' is a {kind}, which isn't supported; use a base of kind {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def load_base(
    name: str, device: str = "auto", dtype: torch.dtype | None = None, quantize: str = "none"
) -> Base:
    """Loads a base model, frozen and in eval mode.

    Args:
        name: "pocket" (ships with the package), a folder with a model_index.json, or a hub id.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: of the denoiser and the text encoder; None means float16 on CUDA and float32 elsewhere.
        quantize: "none", or "int8" or "nf4" for linear layers in 8 or 4 bits, which takes bitsandbytes.

    Raises:
        BaseModelError: the base is unknown, broken, or of a kind that isn't supported.
        DeviceError: the device isn't there.
        SettingError: bitsandbytes is needed and can't be imported.
    """
    target = resolve_device(device)
    _, module = detect_family(name)
    if dtype is None:
        dtype = torch.float16 if target.type == "cuda" else torch.float32
    base: Base = importlib.import_module(module).load(name, locate_base(name), target, dtype, quantize)
    return base


def one_line(error: BaseException, limit: int = 200) -> str:
    """Returns an error's message as one line of at most `limit` characters that are safe to print.

    Libraries quote what they found in a file, control characters included.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
