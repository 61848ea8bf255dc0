"""Kinds of base model: what a fit and an edit need from one, the table of families, and how to load a base.

Only inside this folder is it known what a base is made of. Everything else reads its row of the table. Importing
this file loads no torch: files are described without it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lora_unitune.errors import RecipeError
from lora_unitune.families.names import SD_NAMES, SDXL_NAMES, LayerNames
from lora_unitune.recipe import Recipe
from lora_unitune.settings import LoraSettings, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_unitune.families.sampler import Sampler
    from lora_unitune.families.schedule import NoiseSchedule

POCKET_FOLDER = Path(__file__).resolve().parent.parent / "pocket" / "weights"

Size = tuple[int, int]
"""(width, height) in pixels."""

Condition = dict[str, "Tensor"]
"""All that a denoiser receives beside the noised picture and the time; batch first; names are the family's."""


@dataclass(frozen=True)
class Family:
    """A kind of base model: its row of the table, which everything else reads.

    Attributes:
        name: What files call it.
        title: What people call it.
        pipelines: Pipeline classes of diffusers that are of this kind, as model_index.json names them.
        module: Module with `load(name, location, device, dtype, quantize) -> Base`.
        denoiser: The part that predicts; the others turn the prompt into its condition.
        parts: What a fit can adapt, with each part's defaults.
        recipe: Name of the shipped recipe for bases of this kind.
        names: What other tools call its layers.
        signs: Beginnings of keys by which a file of another tool is known to be of this kind.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    module: str
    denoiser: str
    parts: Mapping[str, LoraSettings]
    recipe: str
    names: LayerNames = field(default_factory=LayerNames)
    signs: tuple[str, ...] = ()

    def complete(self, recipe: Recipe) -> Recipe:
        """Returns a recipe with settings for every part: its own, and the family's where it says nothing.

        Raises:
            RecipeError: The recipe has settings for a part that bases of this kind don't have.
        """
        for part in recipe.lora:
            if part not in self.parts:
                raise RecipeError(
                    f"lora.{part}: {self.title} has no part {part!r}{nearest(part, self.parts)}; it has "
                    f"{', '.join(self.parts)}"
                )
        lora = {}
        for part, default in self.parts.items():
            given = recipe.lora.get(part, default)
            lora[part] = dataclasses.replace(
                given,
                targets=given.targets or default.targets,
                learning_rate=given.learning_rate or default.learning_rate,
            )
        return dataclasses.replace(recipe, lora=lora)

    def owns(self, shapes: Mapping[str, tuple[int, ...]], keys: Iterable[str] = ()) -> bool:
        """Says whether a file of another tool is surely of this kind.

        Args:
            shapes: of its tensors, by this package's keys.
            keys: of the file, as they are written in it.
        """
        signed = any(key.startswith(self.signs) for key in [*shapes, *keys]) if self.signs else False
        return signed or self.names.kind_of(shapes) is not None


_UNET = LoraSettings(8, targets=("to_q", "to_k", "to_v", "to_out.0"), learning_rate=4e-4)
_CLIP = LoraSettings(4, targets=("q_proj", "k_proj", "v_proj", "out_proj"), learning_rate=1e-4)

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="sd",
            title="Stable Diffusion 1.x and 2.x",
            pipelines=("StableDiffusionPipeline",),
            module="lora_unitune.families.sd",
            denoiser="unet",
            parts={"unet": _UNET, "text_encoder": _CLIP},
            recipe="sd15/8gb",
            names=SD_NAMES,
        ),
        Family(
            name="sdxl",
            title="Stable Diffusion XL",
            pipelines=("StableDiffusionXLPipeline",),
            module="lora_unitune.families.sdxl",
            denoiser="unet",
            parts={"unet": _UNET, "text_encoder": _CLIP, "text_encoder_2": _CLIP},
            recipe="sdxl/12gb",
            names=SDXL_NAMES,
            signs=(
                "text_encoder_2.",
                "lora_te2_",
                "lora_unet_input_block",
                "lora_unet_middle_block",
                "lora_unet_output_block",
            ),
        ),
    )
}
"""The table of families, by name."""


LIBRARIES = (
    "transformers.models.clip.modeling_clip",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
)
"""Modules of libraries that the families' loaders import: a command may import them early, its own way."""


class Vocabulary(Protocol):
    """What rare tokens are looked for in: a base's tokenizer and the embeddings of its tokens."""

    prompt_length: int
    """How many tokens a prompt may have."""

    def words(self) -> dict[str, int]:
        """Returns the words that are one token -> its number; later numbers are rarer."""
        ...

    def norms(self) -> list[float] | None:
        """Returns the length of each token's embedding, by its number; None where there are none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns a text's tokens, without those for start and end."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens."""
        ...

    def special(self) -> set[int]:
        """Returns the tokens that stand for no text: start, end, padding, unknown."""
        ...


@runtime_checkable
class Base(Protocol):
    """A base model in memory, frozen and in eval mode.

    Pictures are x0 (b, c, h, w) in whatever space the base denoises in, float32.

    Attributes:
        name: "pocket", a hub id, or a folder's name without its path.
        fingerprint: 16 hexadecimal digits that change with the weights.
        family: Its row of the table.
        device: Where it computes.
        dtype: Of the parts' weights.
        quantized: What the parts' linear layers were rounded to, or "none".
        size: (width, height) in pixels that it was trained at.
        size_step: What a side in pixels must be a multiple of.
        parts: The modules that a fit can adapt, by the names in the family's row.
        frozen: The others, which only encode and decode; out of the device's memory while a fit takes steps.
    """

    name: str
    fingerprint: str
    family: Family
    device: torch.device
    dtype: torch.dtype
    quantized: str
    size: Size
    size_step: int
    parts: dict[str, nn.Module]
    frozen: dict[str, nn.Module]

    def sample_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """Returns (c, h, w) of x0 for a picture of (width, height) pixels; None means the base's own size.

        Raises:
            RecipeError: The base can't work at that size.
        """
        ...

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of x0, each (1, c, h, w), of pixels (1, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Returns pixels (b, 3, H, W) float32 in [0, 1] of x0 (b, c, h, w)."""
        ...

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        """Returns the padded token ids (1, L) int64 of a text, and the part of the text that didn't fit."""
        ...

    def condition(self, prompt: str) -> Condition:
        """Returns a prompt's condition, with a batch of 1. Gradients flow through the parts."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Returns what rare tokens are looked for in."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Returns the denoiser's raw output (b, c, h, w) float32 for noised x0 (b, c, h, w), timesteps (b,)."""
        ...

    def schedule(self, size: Size | None = None) -> NoiseSchedule:
        """Returns the noise levels that the base was trained at, for a picture of that size."""
        ...

    def sampler(self, steps: int, size: Size | None = None, skip: int = 0) -> Sampler:
        """Returns a fresh sampler of a full run of `steps` steps whose first `skip`, the noisiest, are left out."""
        ...


def expanded(condition: Condition, count: int) -> Condition:
    """Returns a condition of batch 1 repeated `count` times, without copying."""
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in condition.items()}


def joined(*conditions: Condition) -> Condition:
    """Returns conditions of one base as one batch, in their order."""
    import torch

    return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}


def load_base(
    name: str, device: str = "auto", dtype: torch.dtype | None = None, quantize: str = "none"
) -> Base:
    """Loads a base model, frozen and in eval mode.

    Args:
        name: "pocket" (ships with the package), a folder with a model_index.json, or a hub id.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: Of the parts; None means float16 on CUDA and float32 elsewhere.
        quantize: "none", or "int8" or "nf4" for linear layers in 8 or 4 bits, which takes bitsandbytes.

    Raises:
        BaseModelError: The base is unknown, broken, or of a kind that isn't supported.
        DeviceError: The device isn't there.
        SettingError: bitsandbytes is needed and can't be imported.
    """
    import torch

    from lora_unitune.families.loading import detect_family, locate_base, resolve_device

    target = resolve_device(device)
    family = detect_family(name)
    if dtype is None:
        dtype = torch.float16 if target.type == "cuda" else torch.float32
    module = importlib.import_module(family.module)
    base: Base = module.load(name, locate_base(name), target, dtype, quantize)
    return base


def default_recipe(name: str, family: Family) -> Recipe:
    """Returns the recipe for a base when the user names none, with settings for every part.

    Args:
        name: Name, folder or hub id of the base, as the user gave it.
        family: The base's.
    """
    return family.complete(Recipe.load("pocket/default" if name == "pocket" else family.recipe))
