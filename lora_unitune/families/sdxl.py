"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, and a UNet conditioned on the image size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_unitune.families import FAMILIES, BaseFiles, Condition
from lora_unitune.families.loading import load_components, public_name, quiet
from lora_unitune.families.sd import StableDiffusionBase, padded_ids


class StableDiffusionXLBase(StableDiffusionBase):
    """A Stable Diffusion XL base in memory; see `families.Base` for what each member means.

    Token ids are those of both tokenizers, concatenated: (1, 2 L).
    """

    family = FAMILIES["sdxl"]
    _size_embeddings = True
    _corrects_old_files = False

    def __init__(
        self,
        name: str,
        *,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        zeros_for_empty: bool,
        device: torch.device,
        dtype: torch.dtype,
        quantize: str = "none",
        **components: Any,
    ) -> None:
        """Takes over loaded components, as `StableDiffusionBase` does.

        Args:
            name: A hub id, or a folder's name without its path.
            text_encoder_2: The larger text encoder, float32.
            tokenizer_2: Its tokenizer, which differs in its padding.
            zeros_for_empty: Whether the empty prompt's embedding is zero (force_zeros_for_empty_prompt in
                model_index.json).
            device: Device of the modules.
            dtype: Dtype of the UNet and the text encoders.
            quantize: Quantization of their linear layers.
            **components: unet, text_encoder, vae, tokenizer and scheduler.
        """
        super().__init__(
            name, **components, text_encoder_2=text_encoder_2, device=device, dtype=dtype, quantize=quantize
        )
        self._tokenizer_2 = tokenizer_2
        self._empty = self.tokenize("")[0] if zeros_for_empty else None

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        """Returns the token ids of both tokenizers (1, 2 L), and the text that was truncated."""
        ids, cut = super().tokenize(text)
        return torch.cat([ids, padded_ids(self._tokenizer_2, text).to(self.device)], dim=1), cut

    def condition(self, prompt: str, clip_skip: int = 1) -> Condition:
        """Returns the penultimate hidden states of both encoders, or earlier ones, and a pooled embedding."""
        ids = self.tokenize(prompt)[0]
        first, second = ids.chunk(2, dim=1)
        small = self.parts["text_encoder"](first, output_hidden_states=True)
        large = self.parts["text_encoder_2"](second, output_hidden_states=True)
        condition = {
            "encoder_hidden_states": torch.cat(
                [self._layer(each.hidden_states, clip_skip + 1) for each in (small, large)], dim=2
            ),
            "text_embeds": large.text_embeds,
        }
        is_empty = self._empty is not None and torch.equal(ids, self._empty)
        return (
            {name: torch.zeros_like(tensor) for name, tensor in condition.items()} if is_empty else condition
        )

    def _arguments(self, condition: Condition, noisy: Tensor) -> dict[str, Any]:
        """Returns the condition and the size conditioning: the image's own size, without cropping."""
        arguments = super()._arguments(condition, noisy)
        height, width = (side * self._factor for side in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(arguments["text_embeds"])
        added = {"text_embeds": arguments.pop("text_embeds"), "time_ids": sizes.expand(len(noisy), -1)}
        return {**arguments, "added_cond_kwargs": added}


def load(files: BaseFiles, device: torch.device, dtype: torch.dtype, quantize: str) -> StableDiffusionXLBase:
    """Loads a Stable Diffusion XL base from safetensors only; see `sd.load`.

    Raises:
        BaseModelError: A component is missing or broken, or isn't one of Stable Diffusion XL's.
    """
    models = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
    }
    loaded = load_components(files, models, CLIPTokenizer)
    zeros = bool(files.index.get("force_zeros_for_empty_prompt", True))
    with quiet():
        return StableDiffusionXLBase(
            public_name(files.name),
            **loaded,
            zeros_for_empty=zeros,
            device=device,
            dtype=dtype,
            quantize=quantize,
        )
