"""Auxiliary losses of pocket's training: classification of captions, and of poses and suns hidden by noise."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .. import world
from ..world.drawing import SUNS

POSES = tuple(itertools.product(world.SIDE_WORDS, ("small", "", "big"), (False, True)))
IGNORED = -100
CAPTION_FIELDS = ("object", "place", "time", "look", "colour", "side", "scale", "companion")


def _labels(drawn: list[world.Scene]) -> Tensor:
    """(n, fields) int64: class index of each attribute's value, among those that occur."""
    columns = [[getattr(scene, field) for scene in drawn] for field in CAPTION_FIELDS]
    kinds = [{value: index for index, value in enumerate(sorted(set(column)))} for column in columns]
    return torch.tensor(
        [[kind[value] for value in column] for kind, column in zip(kinds, columns, strict=True)]
    ).T


def teach_words(
    encoder: nn.Module, tokenizer: Any, drawn: list[world.Scene], seconds: float, device: str
) -> float:
    """Pretrains the text encoder to classify a caption's attributes from its last position; returns the loss."""
    labels, rng = _labels(drawn), random.Random(1)
    sizes = (labels.max(0).values + 1).tolist()
    head = nn.Linear(128, sum(sizes)).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-3)
    end, loss = time.monotonic() + seconds, torch.zeros(())
    while time.monotonic() < end:
        chosen = [rng.randrange(len(drawn)) for _ in range(64)]
        ids = tokens(tokenizer, [world.caption(drawn[i], rng) for i in chosen]).to(device)
        logits = head(encoder(ids).last_hidden_state[:, -1]).split(sizes, dim=1)
        loss = torch.stack(
            [F.cross_entropy(a, b) for a, b in zip(logits, labels[chosen].to(device).T, strict=False)]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    """(n, length) int64."""
    out = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = out.input_ids
    return ids


class Observer(nn.Module):
    """A UNet with an auxiliary head on its middle block that classifies the object's pose and the sun's position.

    A UNet half of which got no gradient (see the weights' provenance) recognized these only at very low noise,
    and blended several poses at higher noise. Whether a fully trained UNet needs this loss isn't measured. It
    resembles representation alignment (arXiv 2410.06940), with the known attributes of the scene as targets; the
    head isn't exported.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.head = nn.Linear(unet.config["block_out_channels"][-1] * 16, len(POSES) + len(SUNS))
        unet.mid_block.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, features: Tensor) -> None:
        self._features = features

    def forward(self, noisy: Tensor, timesteps: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        v = self.unet(noisy, timesteps, embedded).sample
        return v, self.head(self._features.flatten(1))


def poses_and_suns(drawn: list[world.Scene]) -> Tensor:
    """(n, 2) int64: indices in `POSES` and `SUNS`; `IGNORED` without an object, and for a sun that isn't drawn."""
    return torch.tensor(
        [
            (
                POSES.index((s.side, s.scale, s.mirrored)) if s.object else IGNORED,
                IGNORED if s.place in ("room", "") else world.sun(s),
            )
            for s in drawn
        ]
    )


def pose_and_sun_loss(names: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Classification loss of `Observer`'s output, and whether each pose is recognized.

    Args:
        names: Logits of poses and suns, (n, poses + suns) float32.
        labels: What `poses_and_suns` returns for them, (n, 2).
    """
    parts = names.split((len(POSES), len(SUNS)), dim=1)
    losses = [
        F.cross_entropy(part, true, ignore_index=IGNORED, reduction="sum") / (true != IGNORED).sum().clamp(1)
        for part, true in zip(parts, labels.T, strict=True)
    ]
    return losses[0] + losses[1], parts[0].argmax(1) == labels[:, 0]
