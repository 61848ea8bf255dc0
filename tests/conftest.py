"""Tiny random bases with the layouts of Stable Diffusion 1.5, 2.1 and XL, built in code."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from command_line import QUICK, run
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from random_adapters import make_adapter
from safetensors import safe_open
from tiny_flow import save_flow
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.layers import detach
from lora_unitune.editing.editor import Editor
from lora_unitune.families import Base, load_base
from lora_unitune.photo.framing import frame
from lora_unitune.photo.reading import Photo, load_photo

COMMON_WORDS = (
    "a an the of in on at with photo picture painting sketch fox cat dog horse house tree boat car red "
    "blue green yellow night day sunset beach forest city snow desert mountain small large"
).split()
RARE_WORDS = "beikk zqrt vkpic sksq ohwx plfz jmnq wxyv qorb tzlk".split()


def byte_alphabet() -> list[str]:
    """Returns the 256 characters that represent bytes in byte-level BPE (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [chr(256 + index) for index in range(256 - len(plain))]
    return [chr(code) for code in plain] + shifted


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns byte-pair merges that make every one of `words` a single token."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(split) > 1 for split in splits):
        counts: dict[tuple[str, str], int] = {}
        for split in splits:
            for pair in zip(split, split[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: counts[pair])
        merges.append(best)
        for split in splits:
            index = 0
            while index < len(split) - 1:
                if (split[index], split[index + 1]) == best:
                    split[index : index + 2] = ["".join(best)]
                index += 1
    return merges


def build_tokenizer(max_length: int = 16, **special: str) -> CLIPTokenizer:
    """Builds a small CLIP tokenizer with `COMMON_WORDS` and, later in its vocabulary, `RARE_WORDS`."""
    merges = learn_merges(COMMON_WORDS * 2 + RARE_WORDS)
    alphabet = byte_alphabet()
    names = [*alphabet, *(character + "</w>" for character in alphabet)]
    names += list(dict.fromkeys("".join(pair) for pair in merges))
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length, **special)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 16, kind: Any = CLIPTextModel) -> Any:
    """Builds a random two-layer CLIP text encoder for `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return kind(config).eval()


def build_vae() -> AutoencoderKL:
    """Builds a random autoencoder: factor 2, 4 latent channels."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.18215,
    )
    return vae.eval()


def build_unet(**changes: Any) -> UNet2DConditionModel:
    """Builds a random UNet of widths (16, 32) on 16 x 16 latents, with cross-attention on the lower level."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(settings | changes)).eval()


def save_pipeline(folder: Path, seed: int, scheduler: Any, **unet_changes: Any) -> Path:
    """Builds a tiny random Stable Diffusion pipeline from `seed` and saves it under `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=build_vae(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=build_unet(**unet_changes),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)  # prints a progress bar; pytest captures it
    return folder


BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def save_sd15(folder: Path) -> Path:
    """Saves a tiny pipeline with the layout of Stable Diffusion 1.5."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return save_pipeline(folder, 15, scheduler)


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of Stable Diffusion 1.5: epsilon prediction, PNDM, convolution projections."""
    return save_sd15(tmp_path_factory.mktemp("bases") / "tiny-sd15")


@pytest.fixture(scope="session")
def tiny_sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of Stable Diffusion 2.1: v-prediction, linear projections, heads per level."""
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    unet = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    return save_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd21", 21, scheduler, **unet)


XL_UNET: dict[str, Any] = {
    "block_out_channels": (16, 16, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 16 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
"""The blocks of Stable Diffusion XL's UNet, narrow."""


def save_sdxl(folder: Path) -> Path:
    """Saves a tiny pipeline with the layout of Stable Diffusion XL."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(30)
        tokenizers = (build_tokenizer(), build_tokenizer(pad_token="!"))
        pipeline = StableDiffusionXLPipeline(
            vae=build_vae(),
            text_encoder=build_text_encoder(tokenizers[0]),
            text_encoder_2=build_text_encoder(tokenizers[1], 24, CLIPTextModelWithProjection),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=build_unet(**XL_UNET),
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        )
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of Stable Diffusion XL: two text encoders, and size conditioning."""
    return save_sdxl(tmp_path_factory.mktemp("bases") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of another family: a flow-matching transformer on pixels."""
    return save_flow(tmp_path_factory.mktemp("bases") / "tiny-flow")


@pytest.fixture(scope="session")
def shared_baseflow(tiny_flow: Path) -> Base:
    """The flow transformer, loaded once; use `baseflow`, which checks that a test leaves it unchanged."""
    return load_base(str(tiny_flow), device="cpu")


@pytest.fixture(scope="session")
def shared_basexl(tiny_sdxl: Path) -> Base:
    """The SDXL layout, loaded once; use `basexl`, which checks that a test leaves it unchanged."""
    return load_base(str(tiny_sdxl), device="cpu")


@pytest.fixture(scope="session")
def shared_base15(tiny_sd15: Path) -> Base:
    """The SD 1.5 layout, loaded once; use `base15`, which checks that a test leaves it unchanged."""
    return load_base(str(tiny_sd15), device="cpu")


@pytest.fixture(scope="session")
def shared_base21(tiny_sd21: Path) -> Base:
    """The SD 2.1 layout, loaded once; use `base21`, which checks that a test leaves it unchanged."""
    return load_base(str(tiny_sd21), device="cpu")


def weights_of(base: Base) -> dict[str, torch.Tensor]:
    """Returns a copy of every tensor of the base's parts, by "<part>.<name>"."""
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in base.parts.items()
        for name, tensor in module.state_dict().items()
    }


def has_adapters(base: Base) -> bool:
    """Returns whether any part of the base carries an adapter."""
    return any("lora_A" in name for module in base.parts.values() for name, _ in module.named_modules())


def unchanged(base: Base, before: dict[str, torch.Tensor]) -> bool:
    """Returns whether the base's tensors are those of `weights_of` before, bit for bit."""
    after = weights_of(base)
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def _lend(base: Base) -> Iterator[Base]:
    before = weights_of(base)
    yield base
    detach(base)
    after = weights_of(base)
    assert before.keys() == after.keys(), "the test left tensors behind in the base"
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"the test changed the base: {changed[:3]}"


def _lent(shared: str) -> Any:
    """Makes a fixture of a base that is loaded once; a test that uses it fails if it changes the base's weights."""

    @pytest.fixture
    def lend(request: pytest.FixtureRequest) -> Iterator[Base]:
        yield from _lend(request.getfixturevalue(shared))

    return lend


baseflow = _lent("shared_baseflow")
basexl = _lent("shared_basexl")
base15 = _lent("shared_base15")
base21 = _lent("shared_base21")
basepocket = _lent("shared_basepocket")


@pytest.fixture(scope="session")
def shared_basepocket() -> Base:
    """Pocket, loaded once; use `basepocket`, which checks that a test leaves it unchanged."""
    return load_base("pocket", device="cpu")


@pytest.fixture(scope="session")
def photo_image() -> Image.Image:
    """A 48 x 40 RGB image with structure: two gradients and a bright square."""
    image = Image.new("RGB", (48, 40))
    image.putdata([(5 * x % 256, 6 * y % 256, 90) for y in range(40) for x in range(48)])
    image.paste((250, 220, 40), (14, 10, 28, 24))
    return image


def at(photo: Image.Image, width: int, height: int = 0) -> Photo:
    """Reads a photo and frames it to a size; a square one for a width alone."""
    return frame(load_photo(photo), (width, height or width))


@pytest.fixture
def adapter(base15: Base) -> Adapter:
    """A random adapter for the SD 1.5 layout."""
    return make_adapter(base15)


@pytest.fixture
def saved(adapter: Adapter, tmp_path: Path) -> Path:
    """The file of that adapter."""
    path = tmp_path / "photo.safetensors"
    adapter.save(path)
    return path


def saved_and_loaded(adapter: Adapter, path: Path) -> Adapter:
    """Returns the adapter that a saved file holds."""
    adapter.save(path)
    return Adapter.load(path)


def metadata_of(path: Path) -> dict[str, str]:
    """Returns the header's own entries of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@pytest.fixture
def editor(base15: Base) -> Iterator[Editor]:
    """An editor on the SD 1.5 layout, which restores its base."""
    editor = Editor(base15)
    yield editor
    editor.release()


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> tuple[Path, Result]:
    """An adapter file fitted by the command line, next to its photo, and the command's output."""
    folder = tmp_path_factory.mktemp("fitted")
    Image.radial_gradient("L").convert("RGB").save(folder / "photo.png")
    file = folder / "photo.safetensors"
    result = run("fit", folder / "photo.png", "-o", file, "--base", tiny_sd15, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    return file, result


@pytest.fixture
def adapter_file(fitted: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of the fitted file, alone in its folder, to be changed by a test."""
    return Path(shutil.copy(fitted[0], tmp_path / "photo.safetensors"))


@pytest.fixture
def edit(adapter_file: Path, tiny_sd15: Path) -> list[str | Path]:
    """The beginning of a command that edits the fitted photo."""
    return ["edit", "--base", tiny_sd15, adapter_file]


@pytest.fixture
def photo(fitted: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of the photo."""
    return Path(shutil.copy(fitted[0].with_name("photo.png"), tmp_path / "photo.png"))


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Limits files of this process to `size` bytes, to simulate a full disk."""
    resource = pytest.importorskip("resource", reason="limits on file sizes need POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
