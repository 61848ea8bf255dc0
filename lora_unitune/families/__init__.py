"""Families of base models: the interface that a fit and an edit use, the table of families, and loading.

Only this folder knows the components of a base; all other code uses its `Family`. Importing this file doesn't
import torch, so that files can be described without it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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
"""All inputs of a denoiser except the noised sample and the timestep; batch first; names are the family's."""


@dataclass(frozen=True)
class Family:
    """A family of base models: one row of the table `FAMILIES`.

    Attributes:
        name: Name in files, such as "sd".
        title: Name in messages and documentation.
        pipelines: Names of its pipeline classes in diffusers, as in model_index.json, the main one first.
        module: Module with `load(files, device, dtype, quantize) -> Base`.
        denoiser: Name of the denoising part; the other parts encode the prompt.
        parts: Parts that a fit can adapt, with their default settings.
        recipe: Name of the bundled recipe for bases of this family.
        names: Names of its layers in other tools.
        signs: Prefixes of keys that identify a file of another tool as of this family.
        hints: Prefixes of keys that suggest it.
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
    hints: tuple[str, ...] = ()

    def complete(self, recipe: Recipe, overrides: str | Sequence[str] = ()) -> Recipe:
        """Returns a recipe with settings for every part, missing ones filled with the family's defaults.

        Args:
            recipe: The recipe to complete.
            overrides: Single settings, as for `Recipe.override`; they may change any part.

        Raises:
            RecipeError: The recipe has settings for a part that bases of this family don't have.
        """
        if overrides:
            recipe = self.complete(recipe).override(overrides)
        for part in recipe.lora:
            if part not in self.parts:
                raise RecipeError(
                    f"lora.{part}: {self.title} has no part {part!r}{nearest(part, self.parts)}; it has "
                    f"{', '.join(self.parts)}"
                )
        lora = {}
        for part, default in self.parts.items():
            settings = recipe.lora.get(part, default)
            lora[part] = dataclasses.replace(
                settings,
                targets=settings.targets or default.targets,
                learning_rate=settings.learning_rate or default.learning_rate,
            )
        return dataclasses.replace(recipe, lora=lora)

    def owns(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Returns whether tensors of another tool's file are certainly for a base of this family.

        Args:
            shapes: Shapes of its tensors, by this package's keys.
        """
        signed = any(key.startswith(self.signs) for key in shapes) if self.signs else False
        return signed or self.names.kind_of(shapes) is not None


@dataclass(frozen=True)
class BaseFiles:
    """A base's files, as `location.locate_base` finds them.

    Attributes:
        name: "pocket", a hub id, or the path of a folder or a file, as the user specified it.
        folder: Folder with model_index.json and the configurations; without `weights`, also the models.
        index: Content of model_index.json.
        family: Its family.
        weights: Single file of the models; None means those in `folder`.
        vae: File or folder of another VAE; None means the base's own.
        scheduler: Changes of the scheduler's settings.
    """

    name: str
    folder: Path
    index: Mapping[str, Any]
    family: Family
    weights: Path | None = None
    vae: Path | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)


LOCATION_OPTIONS = {
    "vae": ("FILE|FOLDER", "Another VAE for the base."),
    "prediction": (
        "epsilon|v_prediction",
        "What the base predicts, if it is a single file that doesn't say so.",
    ),
}
"""Arguments of `location.locate_base` besides the name -> how a value is written, and what it means."""


def _pipelines(name: str) -> tuple[str, ...]:
    """Returns the names of the pipeline classes that hold the same models, all called as a kind of `name`."""
    tasks = ("", "Img2Img", "Inpaint")
    kinds = ("", "PAG", "ControlNet", "ControlNetPAG", "Adapter")
    return tuple(f"{name}{kind}{task}Pipeline" for kind in kinds for task in tasks)


_UNET = LoraSettings(8, targets=("to_q", "to_k", "to_v", "to_out.0"), learning_rate=4e-4)
_CLIP = LoraSettings(4, targets=("q_proj", "k_proj", "v_proj", "out_proj"), learning_rate=1e-4)

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="sd",
            title="Stable Diffusion 1.x and 2.x",
            pipelines=_pipelines("StableDiffusion"),
            module="lora_unitune.families.sd",
            denoiser="unet",
            parts={"unet": _UNET, "text_encoder": _CLIP},
            recipe="sd15/8gb",
            names=SD_NAMES,
        ),
        Family(
            name="sdxl",
            title="Stable Diffusion XL",
            pipelines=_pipelines("StableDiffusionXL"),
            module="lora_unitune.families.sdxl",
            denoiser="unet",
            parts={"unet": _UNET, "text_encoder": _CLIP, "text_encoder_2": _CLIP},
            recipe="sdxl/12gb",
            names=SDXL_NAMES,
            signs=("text_encoder_2.", "lora_unet_label_emb", "unet.add_embedding."),
            hints=("lora_unet_input_block", "lora_unet_middle_block", "lora_unet_output_block"),
        ),
    )
}
"""The table of families, by name."""


LIBRARIES = (
    "transformers.models.clip.modeling_clip",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
)
"""Library modules that the families' loaders import, so that a command can import them in advance."""


class Vocabulary(Protocol):
    """A base's tokenizer and token embeddings, from which rare tokens are chosen."""

    prompt_length: int
    """Maximum number of tokens of a prompt."""

    def words(self) -> dict[str, int]:
        """Returns word -> token id for words that are a single token; higher ids are rarer."""
        ...

    def norms(self) -> list[float] | None:
        """Returns the norm of each token's embedding, by id; None without embeddings."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without start and end tokens."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of token ids."""
        ...

    def special(self) -> set[int]:
        """Returns the ids of special tokens: start, end, padding, unknown."""
        ...


@runtime_checkable
class Base(Protocol):
    """A base model in memory, frozen and in eval mode.

    x0 (b, c, h, w) is an image in the space that the base denoises in, such as latents; float32.

    Attributes:
        name: "pocket", a hub id, or a folder's name without its path.
        fingerprint: 16 hexadecimal digits that change with the weights.
        family: Its family.
        device: Device of the modules.
        dtype: Dtype of the parts' weights.
        quantized: Quantization of the parts' linear layers: "int8", "nf4" or "none".
        size: (width, height) in pixels that it was trained at.
        size_step: Number of pixels that each side has to be a multiple of.
        parts: The modules that a fit can adapt, by the names in `family.parts`.
        frozen: The other modules, which encode and decode images; offloaded to the CPU during training steps.
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
        """Returns (c, h, w) of x0 for an image of (width, height) pixels; None means the base's own size.

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
        """Returns the padded token ids (1, L) int64 of a text, and the text that was truncated."""
        ...

    def condition(self, prompt: str, clip_skip: int = 1) -> Condition:
        """Returns a prompt's condition, with a batch of 1; differentiable with respect to the parts.

        Args:
            prompt: The complete prompt.
            clip_skip: Which layer embeds it, counted from the family's own, 1.

        Raises:
            SettingError: The base has no such layer.
        """
        ...

    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary to choose rare tokens from."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Returns the denoiser's raw output (b, c, h, w) float32 for noised x0 (b, c, h, w), timesteps (b,)."""
        ...

    def schedule(self, size: Size | None = None) -> NoiseSchedule:
        """Returns the noise levels that the base was trained at, for an image of that size."""
        ...

    def sampler(self, steps: int, size: Size | None = None, skip: int = 0) -> Sampler:
        """Returns a new sampler of `steps` steps without the first `skip` of them, the noisiest."""
        ...


def expanded(condition: Condition, count: int) -> Condition:
    """Returns a condition of batch 1 expanded to a batch of `count`, without copying."""
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in condition.items()}


def joined(*conditions: Condition) -> Condition:
    """Concatenates conditions of one base along the batch."""
    import torch

    return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}


def load_base(
    name: str | Path | BaseFiles,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quantize: str = "none",
) -> Base:
    """Loads a base model, frozen and in eval mode.

    Args:
        name: "pocket" (bundled with the package), a folder with a model_index.json, a .safetensors file, a hub id,
            or what `location.locate_base` found.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: Dtype of the parts; None means float16 on CUDA and float32 elsewhere.
        quantize: "none", or "int8" or "nf4" for linear layers in 8 or 4 bits, which needs bitsandbytes.

    Raises:
        BaseModelError: The base is unknown, broken, or of a family that isn't supported.
        DeviceError: The device isn't available.
        SettingError: bitsandbytes is needed and can't be imported.
    """
    import torch

    from lora_unitune.families.loading import resolve_device
    from lora_unitune.families.location import locate_base

    target = resolve_device(device)
    files = name if isinstance(name, BaseFiles) else locate_base(name)
    if dtype is None:
        dtype = torch.float16 if target.type == "cuda" else torch.float32
    module = importlib.import_module(files.family.module)
    base: Base = module.load(files, target, dtype, quantize)
    return base


def default_recipe(name: str, family: Family) -> Recipe:
    """Returns the default recipe of a base, with settings for every part.

    Args:
        name: Name, folder or hub id of the base, as the user specified it.
        family: The base's family.
    """
    return family.complete(Recipe.load("pocket/default" if name == "pocket" else family.recipe))
