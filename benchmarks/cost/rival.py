"""The baseline ("rival"): a fit as in diffusers' DreamBooth examples, reimplemented from their description.

In every step the photo is read from a data loader and encoded by the VAE, and each copy's prompt by the text
encoder; timesteps are drawn independently; AdamW at a constant rate (5e-4 for LoRA, 5e-6 for all
weights, weight decay 1e-2), gradients clipped to 1; A matrices start as Gaussian noise. Rank, targets and
batch are those of the recipe, so that only the loop differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from lora_unitune.adapter import layers
from lora_unitune.families import Base, expanded
from lora_unitune.photo.framing import choose_size, frame
from lora_unitune.photo.reading import load_photo, photo_to_tensor
from lora_unitune.recipe import Recipe
from lora_unitune.training.prepare import choose_rare_tokens

RATES = {"lora": 5e-4, "full": 5e-6}


def train_rival(
    photo: Image.Image,
    base: Base,
    recipe: Recipe,
    on_step: Callable[[int], Any],
    rate: float | None = None,
    seed: int = 0,
) -> None:
    """Trains all trainable parameters of the base: attached adapters, or its own weights.

    Args:
        photo: The photo, of any size.
        base: The base, with adapters attached or with weights made trainable.
        recipe: The recipe, whose steps, batch, size and rare tokens are used.
        on_step: Callback after each step, with its number; True ends the training.
        rate: Learning rate; None takes that of the examples.
        seed: Seed of all randomness.
    """
    torch.manual_seed(seed)
    for name, weight in layers.slots(base).items():
        if ".lora_A." in name:
            torch.nn.init.normal_(weight, std=1 / weight.shape[0])
    settings = recipe.fit
    read, rare_tokens = load_photo(photo), choose_rare_tokens(recipe, base)
    size = choose_size(read.image.size, recipe.photo, base.size, base.size_step)
    pixels = photo_to_tensor(frame(read, size))[0]
    weights = [weight for part in layers.trainable_parameters(base).values() for weight in part]
    rate = rate or RATES[settings.method]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-2)
    copies: Any = [pixels] * settings.batch_size
    loader: DataLoader[Any] = DataLoader(copies, batch_size=settings.batch_size, shuffle=True)
    schedule = base.schedule(size)
    half = torch.autocast(base.device.type, torch.bfloat16, enabled=base.device.type == "cuda")
    step = 0
    while step < settings.steps:
        for batch in loader:
            mean, std = base.encode(batch)
            latents = mean + std * torch.randn_like(mean)
            noise = torch.randn_like(latents)
            index = torch.randint(0, len(schedule), (len(latents),))
            noised, timesteps = schedule.add_noise(latents, noise, index), schedule.timesteps[index]
            with half:
                condition = expanded(base.condition(rare_tokens), len(latents))
                predicted = base.predict(noised, timesteps.to(base.device), condition)
            target = schedule.target(latents, noise, index)
            F.mse_loss(predicted.float(), target.float()).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if on_step(step) or step == settings.steps:
                return
