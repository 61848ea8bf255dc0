"""Imagic, the method most similar to UniTune, as published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_unitune import Editor
from lora_unitune.editing.sampling import sample
from lora_unitune.photo.reading import photo_to_tensor
from lora_unitune.settings import EditSettings
from lora_unitune.training.loop import denoising_error

from .method import RESCALE, STEPS, Dials, Unfitted, conditions, framed, sampling_grid, to_bytes

TEXT = "encoder_hidden_states"  # of Stable Diffusion 1.x and 2.x, the only bases supported here


class Imagic(Unfitted):
    """Imagic (arXiv 2210.09276): optimize the prompt's embedding, then the UNet, then interpolate embeddings.

    It fits every pair separately, since its embedding starts from the prompt.
    """

    grid = {
        "mix": (0.7, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0),
        **sampling_grid(1.0, 4.0, 0.0, 1.0),
        "unet_rate": (5e-5, 1e-5, 2e-5, 1e-4, 2e-4),
    }
    embedding_steps, embedding_rate, unet_steps, batch = 60, 2e-3, 40, 4
    kept = 0  # number of cached fits, set by `tune`; a run needs each fit once

    def __init__(self) -> None:
        self._learned: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        editor.release()
        return np.concatenate([self._edit(editor, *one, dials) for one in zip(pairs, seeds, strict=True)])

    def _edit(self, editor: Editor, pair: Any, seed: int, dials: Dials) -> np.ndarray:
        mean, std = editor.base.encode(photo_to_tensor(framed(editor, pair.image)))
        wanted = conditions(editor, [pair.prompt])[TEXT]
        embedding, learned = self._learn(editor, wanted, mean, std, seed, dials["unet_rate"])
        unet = editor.base.parts["unet"]
        with trainable(unet), torch.no_grad():
            for weight, value in zip(unet.parameters(), learned, strict=True):
                weight.copy_(value)
            return self._sample(editor, embedding.lerp(wanted, dials["mix"]), mean, seed, dials)

    def _learn(
        self, editor: Editor, wanted: Tensor, mean: Tensor, std: Tensor, seed: int, rate: float
    ) -> tuple[Tensor, list[Tensor]]:
        """The embedding and the UNet's weights of a pair; tuning caches the last ones for its next trials."""
        key = (editor.base.fingerprint, seed, rate, *(tensor.numpy().tobytes() for tensor in (wanted, mean)))
        if key not in self._learned:
            unet, generator = editor.base.parts["unet"], torch.Generator().manual_seed(seed)
            embedding = wanted.clone().requires_grad_(True)
            descend(
                editor,
                [embedding],
                self.embedding_rate,
                self.embedding_steps,
                embedding,
                mean,
                std,
                generator,
            )
            embedding = embedding.detach()
            with trainable(unet):
                weights = list(unet.parameters())
                descend(editor, weights, rate, self.unet_steps, embedding, mean, std, generator)
                learned = [weight.detach().clone() for weight in weights]
            if not self.kept:
                return embedding, learned
            self._learned[key] = embedding, learned
            for old in list(self._learned)[: -self.kept]:
                del self._learned[old]
        return self._learned[key]

    def _sample(self, editor: Editor, mixed: Tensor, mean: Tensor, seed: int, dials: Dials) -> np.ndarray:
        chosen = {name: value for name, value in dials.items() if name not in ("mix", "unet_rate")}
        settings = EditSettings(steps=STEPS, guidance_rescale=RESCALE, **chosen)
        start = mean if settings.strength < 1 else None
        base, empty = editor.base, conditions(editor, [""])
        return to_bytes(base.decode(sample(base, base.size, {TEXT: mixed}, empty, start, [seed], settings)))


def descend(
    editor: Editor,
    weights: Sequence[Tensor],
    rate: float,
    steps: int,
    embedding: Tensor,
    mean: Tensor,
    std: Tensor,
    generator: torch.Generator,
) -> None:
    """Minimizes the denoising loss of one photo with Adam, for an embedding (1, L, width)."""
    base, batch = editor.base, Imagic.batch
    optimizer = torch.optim.Adam(list(weights), lr=rate)
    schedule, condition = base.schedule(), {TEXT: embedding}
    for _ in range(steps):
        drawn = torch.randn((2, batch, *mean.shape[1:]), generator=generator).to(base.device)
        index = schedule.draw(batch, generator)
        loss = denoising_error(base, schedule, mean + std * drawn[0], drawn[1], index, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@contextlib.contextmanager
def trainable(module: torch.nn.Module) -> Iterator[None]:
    """Inside the `with` block the weights are trainable; afterwards they are restored bit for bit."""
    kept = [weight.detach().clone() for weight in module.parameters()]
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)
        with torch.no_grad():
            for weight, before in zip(module.parameters(), kept, strict=True):
                weight.copy_(before)
                weight.grad = None
