"""Stable Diffusion 1.x and 2.x: latent diffusion (arXiv 2112.10752), epsilon- or v-prediction."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lora_unitune.errors import BaseModelError, RecipeError
from lora_unitune.families import one_line, read_model_index
from lora_unitune.families.quantize import place

_UNET_SHAPE = (
    "in_channels",
    "out_channels",
    "sample_size",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "down_block_types",
    "up_block_types",
    "use_linear_projection",
)
_TEXT_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_VAE_SHAPE = ("block_out_channels", "latent_channels", "scaling_factor")
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
_FINGERPRINT_ROWS = 1024


class StableDiffusionBase:
    """A Stable Diffusion 1.x or 2.x base in memory; see `families.Base` for what each member means.

    The VAE stays in float32 whatever `dtype` is: it is small, and half precision can overflow in it.
    """

    family = "sd"

    def __init__(
        self,
        name: str,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        device: torch.device,
        dtype: torch.dtype,
        quantize: str = "none",
        **text_encoders: nn.Module,
    ) -> None:
        """Takes loaded components over: freezes them, fingerprints them, and moves them to the device.

        Args:
            name: "pocket", a hub id, or a folder's name without its path.
            unet: the denoiser, float32.
            vae: pixels to latents and back, float32.
            tokenizer: text to token ids.
            scheduler: the sampler the base ships.
            device: where the modules go.
            dtype: what the UNet and the text encoders are cast to.
            quantize: what their linear layers are rounded to, see `quantize.place`.
            **text_encoders: text_encoder, and text_encoder_2 where there is one, float32.
        """
        self.name = name
        self.device = device
        self.dtype = dtype
        self.quantized = quantize
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint(unet, vae, scheduler, **text_encoders)
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.parts: dict[str, nn.Module] = {
            part: place(module, device, dtype, quantize)
            for part, module in {"unet": unet, **text_encoders}.items()
        }
        self._scheduler = _sampler_for(scheduler)
        self.prediction_type: str = self._scheduler.config["prediction_type"]
        self.alphas_cumprod: Tensor = self._scheduler.alphas_cumprod.float()
        self._latent_channels: int = unet.config["in_channels"]
        self._factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        sample_size = unet.config["sample_size"]
        side = sample_size if isinstance(sample_size, int) else min(sample_size)
        self.resolution: int = side * self._factor
        self.resolution_step: int = self._factor * 2 ** (len(unet.config["block_out_channels"]) - 1)

    def latent_shape(self, resolution: int = 0) -> tuple[int, int, int]:
        """Returns (channels, h, w) of the latents of a square picture.

        Args:
            resolution: side of the picture in pixels; 0 means the base's own.

        Raises:
            RecipeError: the base can't work at that resolution.
        """
        side = resolution or self.resolution
        if side < self.resolution_step or side % self.resolution_step:
            raise RecipeError(
                f"photo.resolution = {side} doesn't suit base '{self.name}'; give a multiple of "
                f"{self.resolution_step} pixels, or 0 for its own {self.resolution}"
            )
        return self._latent_channels, side // self._factor, side // self._factor

    @torch.no_grad()
    def encode_photo(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a photo with the VAE.

        Args:
            pixels: (1, 3, H, W) in [-1, 1].

        Returns:
            Mean and standard deviation of the posterior, each (1, c, h, w) float32, times the scaling factor.
        """
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        scale = self.vae.config["scaling_factor"]
        return posterior.mean * scale, posterior.std * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (b, c, h, w) to pictures (b, 3, H, W) float32 in [0, 1]."""
        unscaled = latents.to(self.device, torch.float32) / self.vae.config["scaling_factor"]
        pixels: Tensor = self.vae.decode(unscaled).sample
        return (pixels / 2 + 0.5).clamp(0, 1)

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        """Turns a text into token ids, padded and cut to the text encoder's length.

        Returns:
            The ids (1, L) int64 on the base's device, and the text that didn't fit ("" if all of it did).
        """
        length = self.tokenizer.model_max_length
        full = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        cut = self.tokenizer.decode(full[length - 1 : -1]).strip() if len(full) > length else ""
        return padded_ids(self.tokenizer, text).to(self.device), cut

    def embed(self, ids: Tensor) -> Tensor:
        """Returns the text encoder's last hidden states (b, L, width) of token ids (b, L)."""
        embeddings: Tensor = self.parts["text_encoder"](ids.to(self.device))[0]
        return embeddings

    def predict(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Runs the UNet.

        Args:
            latents: (b, c, h, w), noised.
            timesteps: (b,) int64.
            embeddings: (b, L, width).

        Returns:
            The UNet's raw output (b, c, h, w) float32: noise, velocity or picture, as `prediction_type` says.
        """
        output = self.parts["unet"](
            latents.to(self.device, self.dtype),
            timesteps.to(self.device),
            **self._conditions(embeddings.to(self.device, self.dtype), latents),
            return_dict=False,
        )[0]
        prediction: Tensor = output.float()
        return prediction

    def _conditions(self, embeddings: Tensor, latents: Tensor) -> dict[str, Any]:
        """Returns what the UNet is told besides the noised latents and the time."""
        return {"encoder_hidden_states": embeddings}

    def make_scheduler(self) -> Any:
        """Returns a fresh sampler with the base's own noise schedule and settings."""
        return type(self._scheduler).from_config(self._scheduler.config)


def load(
    name: str, location: str, device: torch.device, dtype: torch.dtype, quantize: str
) -> StableDiffusionBase:
    """Loads a Stable Diffusion base from safetensors only.

    Args:
        name: what the user called it.
        location: a folder, or a hub id that diffusers downloads or finds in its cache.
        device: where to put it.
        dtype: of the UNet and the text encoder; the weights are read in float32 and then cast, so that the
            fingerprint doesn't depend on it.
        quantize: what their linear layers are rounded to, see `quantize.place`.

    Raises:
        BaseModelError: a component is missing or broken, or isn't one of Stable Diffusion's.
    """
    models = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    loaded = load_components(name, location, models, "Stable Diffusion 1.x and 2.x")
    with quiet():
        return StableDiffusionBase(public_name(name), **loaded, device=device, dtype=dtype, quantize=quantize)


def load_components(name: str, location: str, models: Mapping[str, type[Any]], kind: str) -> dict[str, Any]:
    """Loads a pipeline's models in float32, the tokenizers of its text encoders, and its scheduler.

    Args:
        name: what the user called the base.
        location: its folder or hub id.
        models: by the names of their folders.
        kind: of base, for messages.

    Raises:
        BaseModelError: a component is missing or broken, or is of another class.
    """
    index = read_model_index(name)
    for component, expected in models.items():
        found = (index.get(component) or [None, None])[1]
        if found != expected.__name__:
            raise BaseModelError(
                f"base '{name}' has a {component} of class {found}; {kind} have {expected.__name__}"
            )
    local = {"local_files_only": Path(location).is_dir()}
    weights: dict[str, Any] = {"use_safetensors": True, **local}
    loaders: dict[str, tuple[type[Any], dict[str, Any]]] = {
        component: (model, {**weights, "dtype" if _is_text(component) else "torch_dtype": torch.float32})
        for component, model in models.items()
    }
    tokenizers = {text.replace("text_encoder", "tokenizer"): text for text in models if _is_text(text)}
    loaders |= dict.fromkeys(tokenizers, (CLIPTokenizer, local))
    loaders["scheduler"] = (_scheduler_class(name, index), local)
    loaded = {}
    for component, (loader, options) in loaders.items():
        try:
            with quiet():
                loaded[component] = loader.from_pretrained(location, subfolder=component, **options)
        except Exception as error:  # diffusers, transformers, safetensors and json each raise their own
            raise BaseModelError(
                f"base '{name}': its {component} can't be loaded ({one_line(error)}); it has to be a "
                "complete Stable Diffusion model with safetensors weights"
            ) from error
    for tokenizer, text_encoder in tokenizers.items():
        words, rows = len(loaded[tokenizer]), loaded[text_encoder].config.vocab_size
        if not rows // 2 <= words <= rows:  # transformers makes up an empty one when the files are missing
            raise BaseModelError(
                f"base '{name}': its {tokenizer} can't be loaded or isn't its own (it has {words} tokens and "
                f"the {text_encoder} {rows}); copy the model again"
            )
    return loaded


def public_name(name: str) -> str:
    """Returns a base's name without its folder's path: it tells about its owner, and files are shared."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def padded_ids(tokenizer: CLIPTokenizer, text: str) -> Tensor:
    """Returns a text's token ids (1, L) int64, padded and cut to the tokenizer's length."""
    ids: Tensor = tokenizer(
        text,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )["input_ids"]
    return ids


def _is_text(component: str) -> bool:
    return component.startswith("text_encoder")


def fingerprint(unet: Any, vae: Any, scheduler: Any, **text_encoders: Any) -> str:
    """Identifies a base by its shape, its noise schedule, and a few of its tensors as float32.

    The schedule counts by the settings it is computed from: its numbers differ in the last bit between
    processors, and a file made on one computer has to open on another.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    shape = {
        "unet": _pick(unet.config, _UNET_SHAPE),
        **{name: _pick(part.config.to_dict(), _TEXT_SHAPE) for name, part in text_encoders.items()},
        "vae": _pick(vae.config, _VAE_SHAPE),
        "prediction_type": scheduler.config["prediction_type"],
        "noise": [scheduler.config.get(key) or 0 for key in _NOISE_SCHEDULE],
    }
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    tokens = (part.get_input_embeddings().weight[-_FINGERPRINT_ROWS:] for part in text_encoders.values())
    sample = (
        unet.conv_in.weight,
        unet.conv_out.weight,
        vae.encoder.conv_in.weight,
        vae.decoder.conv_out.weight,
        *tokens,
    )
    for tensor in sample:
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _pick(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in keys}


def _scheduler_class(name: str, index: dict[str, Any]) -> type[Any]:
    import diffusers

    kind = (index.get("scheduler") or [None, None])[1]
    found = getattr(diffusers, str(kind), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise BaseModelError(f"base '{name}' names a scheduler '{kind}' that diffusers doesn't have")
    return found


def _sampler_for(scheduler: Any) -> Any:
    """Replaces PNDM, which can't start from a noised photo, by DDIM on the same noise schedule."""
    if type(scheduler).__name__ != "PNDMScheduler":
        return scheduler
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps diffusers and transformers from writing notes and progress bars while they load."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
