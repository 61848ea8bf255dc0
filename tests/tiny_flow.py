"""A base of another family: a tiny flow-matching transformer that works on pixels, of a few lines of torch.

It has no autoencoder, no diffusers model and no CLIP: bytes for tokens, one layer of attention over patches.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_unitune.errors import RecipeError
from lora_unitune.families import FAMILIES, BaseFiles, Condition, Family, Size
from lora_unitune.families.names import LayerNames
from lora_unitune.families.sampler import Sampler
from lora_unitune.families.schedule import NoiseSchedule
from lora_unitune.settings import LoraSettings

WIDTH, PATCH, LENGTH = 24, 4, 24

FLOW = Family(
    name="tiny-flow",
    title="the tiny flow transformer",
    pipelines=("TinyFlowPipeline",),
    module="tiny_flow",
    denoiser="transformer",
    parts={
        "transformer": LoraSettings(4, targets=("query", "value", "up", "down"), learning_rate=2e-2),
        "reader": LoraSettings(2, targets=("mix",), learning_rate=1e-3),
    },
    recipe="sd15/8gb",
    names=LayerNames(
        prefixes={"transformer.": "lora_transformer_", "reader.": "lora_reader_"},
        words=("query", "key", "value", "up", "down", "out", "patches", "mix"),
    ),
    signs=("transformer.", "lora_transformer_"),
)


class Transformer(nn.Module):
    """Patches of the noised picture and letters of the prompt attend to each other; velocity comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 3 * PATCH**2)
        self.recomputes = False

    def enable_gradient_checkpointing(self) -> None:
        self.recomputes = True

    def disable_gradient_checkpointing(self) -> None:
        self.recomputes = False

    def forward(self, noisy: Tensor, times: Tensor, letters: Tensor, mask: Tensor) -> Tensor:
        height, width = noisy.shape[-2:]
        cut = nn.functional.unfold(noisy, PATCH, stride=PATCH).transpose(1, 2)
        rows = torch.cat([self.patches(cut), letters], dim=1) + self.time(times[:, None, None])
        seen = torch.cat([mask.new_ones(mask.shape[0], cut.shape[1]), mask], dim=1)[:, None]
        query, key, value = self.query(rows), self.key(rows), self.value(rows)
        rows = rows + nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen > 0)
        rows = rows + self.down(nn.functional.gelu(self.up(rows)))
        made = self.out(rows[:, : cut.shape[1]]).transpose(1, 2)
        return nn.functional.fold(made, (height, width), PATCH, stride=PATCH)


class Reader(nn.Module):
    """Embeds bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.table(ids))
        return mixed


class Letters:
    """A vocabulary of made-up single-token words, since bytes have none."""

    prompt_length = LENGTH

    def words(self) -> dict[str, int]:
        return {"fox": 1, "dog": 2, "zqr": 200, "vkp": 201, "jmq": 202}

    def norms(self) -> list[float] | None:
        return None

    def encode(self, text: str) -> list[int]:
        return [self.words().get(word, 3) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        back = {number: word for word, number in self.words().items()}
        return " ".join(back.get(token, "?") for token in tokens)

    def special(self) -> set[int]:
        return {0}


class TinyFlowBase:
    """See `families.Base` for each member; x0 are the pixels in [-1, 1]."""

    family = FLOW
    dtype = torch.float32
    quantized = "none"
    size: Size = (16, 16)
    size_step = PATCH

    def __init__(self, name: str, transformer: Transformer, reader: Reader, device: torch.device) -> None:
        self.name, self.device = name, device
        self.parts: dict[str, nn.Module] = {"transformer": transformer, "reader": reader}
        self.frozen: dict[str, nn.Module] = {}
        for module in self.parts.values():
            module.eval().requires_grad_(False).to(device)
        weights = b"".join(w.numpy().tobytes() for m in self.parts.values() for w in m.state_dict().values())
        self.fingerprint = hashlib.sha256(weights).hexdigest()[:16]

    def sample_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        width, height = size or self.size
        if width % PATCH or height % PATCH or min(width, height) < PATCH:
            raise RecipeError(f"photo.size = {width}x{height} doesn't suit; give multiples of {PATCH}")
        return 3, height, width

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels.to(self.device), torch.zeros_like(pixels, device=self.device)

    def decode(self, x0: Tensor) -> Tensor:
        return (x0 / 2 + 0.5).clamp(0, 1)

    def tokenize(self, text: str) -> tuple[Tensor, str]:
        ids = list(text.encode())
        padded = (ids + [0] * LENGTH)[:LENGTH]
        return torch.tensor([padded]), bytes(ids[LENGTH:]).decode(errors="replace")

    def condition(self, prompt: str, clip_skip: int = 1) -> Condition:
        ids, _ = self.tokenize(prompt)
        return {"letters": self.parts["reader"](ids), "mask": (ids > 0).float()}

    def vocabulary(self) -> Letters:
        return Letters()

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        velocity: Tensor = self.parts["transformer"](noisy, timesteps / 1000, **condition)
        return velocity.float()

    def schedule(self, size: Size | None = None) -> NoiseSchedule:
        return NoiseSchedule.flow(torch.arange(1, 1001) / 1000)

    def sampler(self, steps: int, size: Size | None = None, skip: int = 0) -> Sampler:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        return Sampler(scheduler, self.schedule(size), steps, skip, self.device)


def load(files: BaseFiles, device: torch.device, dtype: Any, quantize: str) -> TinyFlowBase:
    """Loads a folder that `save_flow` wrote."""
    modules = {"transformer": Transformer(), "reader": Reader()}
    for part, module in modules.items():
        module.load_state_dict(load_file(files.folder / f"{part}.safetensors"))
    return TinyFlowBase(Path(files.name).name, modules["transformer"], modules["reader"], device)


def save_flow(folder: Path) -> Path:
    """Saves a tiny random base; `FAMILIES` has to know `FLOW` when it is loaded."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for part, module in (("transformer", Transformer()), ("reader", Reader())):
            save_file(module.state_dict(), folder / f"{part}.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "TinyFlowPipeline"}')
    return folder


FAMILIES.setdefault(FLOW.name, FLOW)
