"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, and a UNet that is told the picture's size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_unitune.families import read_model_index
from lora_unitune.families.sd import (
    StableDiffusionBase,
    load_components,
    padded_ids,
    public_name,
    quiet,
)


class StableDiffusionXLBase(StableDiffusionBase):
    """A Stable Diffusion XL base in memory; see `families.Base` for what each member means.

    Token ids are those of both tokenizers, one after the other: (b, 2 L). Embeddings are (b, L + 1, width):
    the L rows that the UNet attends to, both encoders' side by side, and below them the second one's pooled
    embedding, filled up with zeros.
    """

    family = "sdxl"

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
        self._pooled_width: int = text_encoder_2.config.projection_dim
        self._empty = self.tokenize("")[0] if zeros_for_empty else None

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        """Turns a text into the token ids of both encoders (1, 2 L), and the part that didn't fit."""
        ids, cut = super().tokenize(text)
        return torch.cat([ids, padded_ids(self._tokenizer_2, text).to(self.device)], dim=1), cut

    def embed(self, ids: Tensor) -> Tensor:
        """Returns both encoders' last hidden states but one, and the pooled embedding: (b, L + 1, width)."""
        ids = ids.to(self.device)
        first, second = ids.chunk(2, dim=1)
        small = self.parts["text_encoder"](first, output_hidden_states=True)
        large = self.parts["text_encoder_2"](second, output_hidden_states=True)
        rows = torch.cat([small.hidden_states[-2], large.hidden_states[-2]], dim=2)
        pooled = rows.new_zeros(len(rows), 1, rows.shape[2])
        pooled[:, 0, : self._pooled_width] = large.text_embeds
        embeddings = torch.cat([rows, pooled], dim=1)
        if self._empty is None:
            return embeddings
        return embeddings.masked_fill((ids == self._empty).all(1)[:, None, None], 0)

    def _conditions(self, embeddings: Tensor, latents: Tensor) -> dict[str, Any]:
        """Returns the embeddings, and the picture's size: as large as it was, nothing cropped."""
        height, width = (side * self._factor for side in latents.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(embeddings)
        added = {
            "text_embeds": embeddings[:, -1, : self._pooled_width],
            "time_ids": sizes.expand(len(embeddings), -1),
        }
        return {"encoder_hidden_states": embeddings[:, :-1], "added_cond_kwargs": added}


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
    loaded = load_components(name, location, models, "Stable Diffusion XL bases")
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
