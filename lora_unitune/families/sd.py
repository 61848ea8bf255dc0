"""Stable Diffusion 1.x and 2.x: latent diffusion (arXiv 2112.10752), epsilon- or v-prediction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lora_unitune.errors import RecipeError, SettingError
from lora_unitune.families import FAMILIES, BaseFiles, Condition, Size
from lora_unitune.families.configuration import (
    check_configuration,
    check_scheduler,
    corrected,
    side_of,
)
from lora_unitune.families.loading import fingerprint_of, load_components, public_name, quiet
from lora_unitune.families.quantize import place
from lora_unitune.families.sampler import Sampler
from lora_unitune.families.schedule import NoiseSchedule

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
_WHOLE_WORD = re.compile(r"(.+)</w>")


class StableDiffusionBase:
    """A Stable Diffusion 1.x or 2.x base in memory; see `families.Base` for what each member means.

    x0 is the VAE's latents, normalized and times the scaling factor. The VAE stays in float32 whatever `dtype` is:
    it is small, and half precision can overflow in it.
    """

    family = FAMILIES["sd"]
    _size_embeddings = False
    _corrects_old_files = True  # as its pipeline does

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
        """Takes over loaded components: fingerprints and freezes them, and moves them to the device.

        Args:
            name: "pocket", a hub id, or a folder's name without its path.
            unet: The denoiser, float32.
            vae: The autoencoder, float32.
            tokenizer: The tokenizer.
            scheduler: The base's scheduler.
            device: Device of the modules.
            dtype: Dtype of the UNet and the text encoders.
            quantize: Quantization of their linear layers, see `quantize.place`.
            **text_encoders: text_encoder, and text_encoder_2 if there is one, float32.
        """
        texts = [text.config for text in text_encoders.values()]
        check_configuration(name, unet.config, vae.config, texts, self._size_embeddings)
        check_scheduler(name, scheduler)
        self.name = name
        self.device = device
        self.dtype = dtype
        self.quantized = quantize
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint(unet, vae, scheduler, **text_encoders)
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.frozen: dict[str, nn.Module] = {"vae": self.vae}
        self.parts: dict[str, nn.Module] = {
            part: place(module, device, dtype, quantize)
            for part, module in {"unet": unet, **text_encoders}.items()
        }
        self._scheduler = corrected(scheduler) if self._corrects_old_files else scheduler
        self._schedule = NoiseSchedule.diffusion(
            self._scheduler.alphas_cumprod, self._scheduler.config["prediction_type"]
        )
        self._channels: int = unet.config["in_channels"]
        self._factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self._scale, self._shift = _normalizer(vae.config, device)
        side = side_of(unet.config, self._corrects_old_files)
        self.size: Size = (side * self._factor, side * self._factor)
        self.size_step: int = self._factor * 2 ** (len(unet.config["block_out_channels"]) - 1)

    def sample_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """Returns (channels, h, w) of the latents of an image.

        Args:
            size: (width, height) in pixels; None means the base's own.

        Raises:
            RecipeError: The base can't work at that size.
        """
        width, height = size or self.size
        step = self.size_step
        if min(width, height) < step or width % step or height % step:
            raise RecipeError(
                f"photo.size = {width}x{height} doesn't suit base '{self.name}'; give multiples of {step}, "
                f"such as {self.size[0]}x{self.size[1]}, or leave it empty"
            )
        return self._channels, height // self._factor, width // self._factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a photo with the VAE.

        Args:
            pixels: The photo, (1, 3, H, W) in [-1, 1].

        Returns:
            Mean and standard deviation of the posterior, each (1, c, h, w) float32, times the scaling factor.
        """
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        return (posterior.mean - self._shift) * self._scale, posterior.std * self._scale

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Decodes scaled latents (b, c, h, w) to images (b, 3, H, W) float32 in [0, 1]."""
        unscaled = x0.to(self.device, torch.float32) / self._scale + self._shift
        pixels: Tensor = self.vae.decode(unscaled).sample
        return (pixels / 2 + 0.5).clamp(0, 1)

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        """Tokenizes a text, padded and truncated to the text encoder's length.

        Returns:
            The ids (1, L) int64 on the base's device, and the truncated text ("" if there is none).
        """
        length = self.tokenizer.model_max_length
        full = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        cut = self.tokenizer.decode(full[length - 1 : -1]).strip() if len(full) > length else ""
        return padded_ids(self.tokenizer, text).to(self.device), cut

    def condition(self, prompt: str, clip_skip: int = 1) -> Condition:
        """Returns the text encoder's hidden states, (1, L, width): the last, or earlier ones with the last norm."""
        encoder: Any = self.parts["text_encoder"]
        output = encoder(self.tokenize(prompt)[0], output_hidden_states=clip_skip > 1)
        if clip_skip == 1:
            return {"encoder_hidden_states": output[0]}
        states = self._layer(output.hidden_states, clip_skip)
        return {"encoder_hidden_states": getattr(encoder, "text_model", encoder).final_layer_norm(states)}

    def _layer(self, states: Sequence[Tensor], count: int) -> Tensor:
        """Returns the hidden states of a text encoder's layer, counted from its last, 1.

        Raises:
            SettingError: It has fewer layers.
        """
        if count >= len(states):
            raise SettingError(
                f"edit.clip_skip is too high for base '{self.name}', whose text encoder has {len(states) - 1} "
                "layers; lower it"
            )
        return states[-count]

    def vocabulary(self) -> ClipVocabulary:
        """Returns the tokenizer's words with the text encoder's embeddings."""
        text_encoder: Any = self.parts["text_encoder"]
        return ClipVocabulary(self.tokenizer, text_encoder.get_input_embeddings().weight)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Runs the UNet.

        Args:
            noisy: Noised latents (b, c, h, w).
            timesteps: Timesteps (b,) int64.
            condition: Condition as returned by `condition`, with a batch of b.

        Returns:
            The UNet's raw output (b, c, h, w) float32: noise, velocity or x0, as `schedule().prediction` says.
        """
        output = self.parts["unet"](
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            **self._arguments(condition, noisy),
            return_dict=False,
        )[0]
        prediction: Tensor = output.float()
        return prediction

    def _arguments(self, condition: Condition, noisy: Tensor) -> dict[str, Any]:
        """Returns the UNet's arguments besides the noised latents and the timestep."""
        return {name: tensor.to(self.device, self.dtype) for name, tensor in condition.items()}

    def schedule(self, size: Size | None = None) -> NoiseSchedule:
        """Returns the noise levels that the base was trained at; they are the same for every size."""
        return self._schedule

    def sampler(self, steps: int, size: Size | None = None, skip: int = 0) -> Sampler:
        """Returns a new sampler of the class and with the settings of the base's scheduler."""
        return Sampler(self.make_scheduler(skip), self._schedule, steps, skip, self.device)

    def make_scheduler(self, skip: int = 0) -> Any:
        """Returns a new scheduler of diffusers, of the class and with the settings of the base's.

        PNDM can't skip steps, to start from a noised photo: then it is DDIM on the same noise levels.

        Args:
            skip: Number of first steps to skip.
        """
        if skip and isinstance(self._scheduler, PNDMScheduler):
            return DDIMScheduler.from_config(self._scheduler.config, clip_sample=False)
        return type(self._scheduler).from_config(self._scheduler.config)


class ClipVocabulary:
    """A CLIP tokenizer and its token embeddings, from which rare tokens are chosen."""

    def __init__(self, tokenizer: CLIPTokenizer, embeddings: Tensor | None = None) -> None:
        """Takes the tokenizer, and the embeddings (vocabulary, width) if there are any."""
        self._tokenizer, self._embeddings = tokenizer, embeddings
        self.prompt_length: int = tokenizer.model_max_length - 2

    def words(self) -> dict[str, int]:
        """Returns word -> token id for words that are a single token; CLIP marks the end of a word with "</w>"."""
        matches = (
            (_WHOLE_WORD.fullmatch(name), number) for name, number in self._tokenizer.get_vocab().items()
        )
        return {match[1]: number for match, number in matches if match}

    def norms(self) -> list[float] | None:
        """Returns the norm of each token's embedding, by id."""
        if self._embeddings is None:
            return None
        lengths: list[float] = self._embeddings.detach().float().norm(dim=1).tolist()
        return lengths

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without start and end tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of token ids."""
        return str(self._tokenizer.decode(tokens)).strip()

    def special(self) -> set[int]:
        """Returns the ids of special tokens."""
        return {self._tokenizer.unk_token_id, *self._tokenizer.all_special_ids}


def load(files: BaseFiles, device: torch.device, dtype: torch.dtype, quantize: str) -> StableDiffusionBase:
    """Loads a Stable Diffusion base from safetensors only.

    Args:
        files: The base's files.
        device: Device of the modules.
        dtype: Dtype of the UNet and the text encoder; the weights are read in float32 and then cast, so that
            the fingerprint doesn't depend on it.
        quantize: Quantization of their linear layers, see `quantize.place`.

    Raises:
        BaseModelError: A component is missing or broken, or isn't one of Stable Diffusion's.
    """
    models = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
    loaded = load_components(files, models, CLIPTokenizer)
    with quiet():
        return StableDiffusionBase(
            public_name(files.name), **loaded, device=device, dtype=dtype, quantize=quantize
        )


def padded_ids(tokenizer: CLIPTokenizer, text: str) -> Tensor:
    """Returns a text's token ids (1, L) int64, padded and truncated to the tokenizer's length."""
    ids: Tensor = tokenizer(
        text,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )["input_ids"]
    return ids


def fingerprint(unet: Any, vae: Any, scheduler: Any, **text_encoders: Any) -> str:
    """Returns a base's fingerprint; see `loading.fingerprint_of`."""
    shape = {
        "unet": _pick(unet.config, _UNET_SHAPE),
        **{name: _pick(part.config.to_dict(), _TEXT_SHAPE) for name, part in text_encoders.items()},
        "vae": _pick(vae.config, _VAE_SHAPE),
        "prediction_type": scheduler.config["prediction_type"],
        "noise": [scheduler.config.get(key) or 0 for key in _NOISE_SCHEDULE],
    }
    tokens = (part.get_input_embeddings().weight[-_FINGERPRINT_ROWS:] for part in text_encoders.values())
    sample = (
        unet.conv_in.weight,
        unet.conv_out.weight,
        vae.encoder.conv_in.weight,
        vae.decoder.conv_out.weight,
        *tokens,
    )
    return fingerprint_of(shape, sample)


def _pick(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in keys}


def _normalizer(config: Any, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Returns scale and shift of x0 = (latents - shift) * scale, each a number or (1, c, 1, 1)."""
    scale, mean, std = config["scaling_factor"], config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, 0.0
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return scale / std, mean
