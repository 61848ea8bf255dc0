"""Builds pocket's untrained components in Stable Diffusion's layout, and writes them as a pipeline folder."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .. import world

RARE_WORD_COUNT = 240
MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def rare_words() -> list[str]:
    """Made-up words of four letters that no caption uses; the tokenizer has one token for each."""
    rng, made = random.Random("rare words"), set[str]()
    while len(made) < RARE_WORD_COUNT:
        word = (
            rng.choice("bdfgjkmnpvwxz")
            + rng.choice("aeiou")
            + rng.choice("bdfgjkpqvxz")
            + rng.choice("kqvxz")
        )
        made.add(word)
    return sorted(made - set(world.words()))


def byte_symbols() -> list[str]:
    """The 256 printable characters by which byte-level tokenizers write bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one symbol (Sennrich et al., 2016, arXiv 1508.07909)."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in texts]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for symbols in split for pair in zip(symbols, symbols[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in split:
            for i in range(len(symbols) - 2, -1, -1):
                if tuple(symbols[i : i + 2]) == best:
                    symbols[i : i + 2] = ["".join(best)]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with a token for every caption word and every rare word."""
    merges = learn_merges([w.strip(",") for w in world.words()] + rare_words())
    symbols = byte_symbols()
    entries = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges] + [START, END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    end = tokenizer.convert_tokens_to_ids(END)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.convert_tokens_to_ids(START),
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction on SD's noise schedule, rescaled to zero terminal signal (arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused with trailing spacing; StableDiffusionPipeline warns without it
    )


def assemble(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """The pipeline of a VAE, a UNet, a text encoder and a tokenizer."""
    pipeline = StableDiffusionPipeline(
        **parts,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Writes a pipeline folder: safetensors only, VAE and UNet in half precision."""
    pipeline.vae.half()
    pipeline.unet.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
