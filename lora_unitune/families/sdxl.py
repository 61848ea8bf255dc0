"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, and a UNet with the picture's size as a condition."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_unitune.families import FAMILIES, Condition
from lora_unitune.families.loading import load_components, public_name, quiet, read_model_index
from lora_unitune.families.sd import StableDiffusionBase, padded_ids


class StableDiffusionXLBase(StableDiffusionBase):
    """A Stable Diffusion XL base in memory; see `families.Base` for what each member means.

    Token ids are those of both tokenizers, one after the other: (1, 2 L).
    """

    family = FAMILIES["sdxl"]

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
        """Takes loaded components over, as `StableDiffusionBase` does.

        Args:
            name: a hub id, or a folder's name without its path.
            text_encoder_2: the larger text encoder, float32.
            tokenizer_2: its tokenizer, which differs in its padding.
            zeros_for_empty: whether zeros stand for the empty prompt, as the base's model_index.json says.
            device: where the modules go.
            dtype: what the UNet and the text encoders are cast to.
            quantize: what their linear layers are rounded to.
            **components: unet, text_encoder, vae, tokenizer and scheduler.
        """
        super().__init__(
            name, **components, text_encoder_2=text_encoder_2, device=device, dtype=dtype, quantize=quantize
        )
        self._tokenizer_2 = tokenizer_2
        self._empty = self.tokenize("")[0] if zeros_for_empty else None

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        """Turns a text into the token ids of both encoders (1, 2 L), and the part that didn't fit."""
        ids, cut = super().tokenize(text)
        return torch.cat([ids, padded_ids(self._tokenizer_2, text).to(self.device)], dim=1), cut

    def condition(self, prompt: str) -> Condition:
        """Returns both encoders' last hidden states but one, side by side, and the second's pooled embedding."""
        ids = self.tokenize(prompt)[0]
        first, second = ids.chunk(2, dim=1)
        small = self.parts["text_encoder"](first, output_hidden_states=True)
        large = self.parts["text_encoder_2"](second, output_hidden_states=True)
        found = {
            "encoder_hidden_states": torch.cat([small.hidden_states[-2], large.hidden_states[-2]], dim=2),
            "text_embeds": large.text_embeds,
        }
        is_empty = self._empty is not None and torch.equal(ids, self._empty)
        return {name: torch.zeros_like(tensor) for name, tensor in found.items()} if is_empty else found

    def _arguments(self, condition: Condition, noisy: Tensor) -> dict[str, Any]:
        """Returns the condition, and the picture's size: as large as it was, nothing cropped."""
        arguments = super()._arguments(condition, noisy)
        height, width = (side * self._factor for side in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(arguments["text_embeds"])
        added = {"text_embeds": arguments.pop("text_embeds"), "time_ids": sizes.expand(len(noisy), -1)}
        return {**arguments, "added_cond_kwargs": added}


def load(
    name: str, location: str, device: torch.device, dtype: torch.dtype, quantize: str
) -> StableDiffusionXLBase:
    """Loads a Stable Diffusion XL base from safetensors only; see `sd.load`.

    Raises:
        BaseModelError: a component is missing or broken, or isn't one of Stable Diffusion XL's.
    """
    models = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "vae": AutoencoderKL,
    }
    loaded = load_components(name, models, CLIPTokenizer, FAMILIES["sdxl"].title)
    zeros = bool(read_model_index(name).get("force_zeros_for_empty_prompt", True))
    with quiet():
        return StableDiffusionXLBase(
            public_name(name),
            **loaded,
            zeros_for_empty=zeros,
            device=device,
            dtype=dtype,
            quantize=quantize,
        )
