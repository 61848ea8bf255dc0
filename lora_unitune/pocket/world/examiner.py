"""The examiner: a small classifier of a scene's attributes from its image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import TIMES, Scene
from .drawing import LOOKS, PLACES
from .pictures import to_pixels
from .sprites import COLOURS, OBJECTS

FILE = Path(__file__).with_name("examiner.safetensors")
CHOICES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "place": tuple(PLACES),
    "time": TIMES,
    "look": tuple(LOOKS),
    "colour": tuple(COLOURS),
}
WIDTHS = [len(values) for values in CHOICES.values()]


def has_colour(scene: Scene) -> bool:
    """Whether the image shows the object's colour: pencil sketches and sepia photos don't."""
    return bool(scene.colour) and scene.look in ("plain", "pixel")


def _block(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


class Network(nn.Module):
    """A residual network of 0.8 million parameters for 64 × 64 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 32, 3, padding=1), nn.ReLU())
        self.downs, self.blocks = nn.ModuleList(), nn.ModuleList()
        for before, after in ((32, 64), (64, 96), (96, 128)):
            down = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            self.downs.append(nn.Sequential(down, nn.BatchNorm2d(after), nn.ReLU()))
            self.blocks.append(_block(after))
        self.head = nn.Linear(128 * 16, sum(WIDTHS) + 2)
        self.temperatures: Tensor
        self.register_buffer("temperatures", torch.ones(len(WIDTHS)))

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """(n, 3, 64, 64) in [-1, 1] -> logits of each attribute, (n, choices), and (x, size), (n, 2)."""
        hidden = self.stem(pictures)
        for down, block in zip(self.downs, self.blocks, strict=True):
            hidden = down(hidden)
            hidden = F.relu(hidden + block(hidden))
        *logits, place = self.head(hidden.flatten(1)).split([*WIDTHS, 2], dim=1)
        return [a / t for a, t in zip(logits, self.temperatures, strict=True)], place


@dataclass(frozen=True)
class Reading:
    """The examiner's predictions for some images.

    Attributes:
        probabilities: Class probabilities by attribute, (n, choices) float32, in the order of `CHOICES`.
        x: Centres of the objects, fractions of the width, (n,).
        size: Longer sides of the objects, fractions of the width, (n,).
    """

    probabilities: dict[str, np.ndarray]
    x: np.ndarray
    size: np.ndarray

    def likeliest(self, attribute: str) -> list[str]:
        """The most likely value for each image."""
        return [CHOICES[attribute][i] for i in self.probabilities[attribute].argmax(1)]


@cache
def load() -> Network:
    """The examiner that is bundled with the package."""
    network = Network()
    network.eval()
    network.requires_grad_(False)
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(FILE).items()})
    return network


@torch.no_grad()
def run(network: Network, pictures: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """Runs the network on images (n, 64, 64, 3) uint8, in batches; returns logits and places as `forward` does."""
    batches = [network(to_pixels(pictures[s : s + 128], "cpu")) for s in range(0, len(pictures), 128)]
    logits, places = zip(*batches, strict=True)
    return [torch.cat(part) for part in zip(*logits, strict=True)], torch.cat(places)


def read(pictures: np.ndarray, network: Network | None = None) -> Reading:
    """Classifies images.

    Args:
        pictures: Images (n, 64, 64, 3) uint8.
        network: The examiner; None takes the bundled one.

    Raises:
        ValueError: The images have another shape.
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (64, 64, 3):
        raise ValueError(f"pictures have the shape {pictures.shape}; the examiner reads (n, 64, 64, 3)")
    logits, places = run(network or load(), pictures)
    x, size = places.numpy().T
    return Reading({field: a.softmax(1).numpy() for field, a in zip(CHOICES, logits, strict=True)}, x, size)
