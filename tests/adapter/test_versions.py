"""Migration of version 1 headers preserves their meaning, for random headers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.describe import describe
from lora_unitune.adapter.header import METADATA_KEY
from lora_unitune.errors import AdapterFileError

PARTS = {"sd": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2")}
TARGETS = {"unet": ("to_q", "conv1"), "text_encoder": ("q_proj", "fc1"), "text_encoder_2": ("q_proj", "fc1")}


def first_header(rng: random.Random, family: str) -> dict[str, Any]:
    """Returns a random header as version 1 wrote it: with every setting of every part of any base."""
    lora: dict[str, Any] = {}
    for part in PARTS["sdxl"]:
        lora[f"{part}_rank"] = rng.randint(part == "unet", 6)
        lora[f"{part}_alpha"] = rng.choice([0.5, 4.0, 7.25, 4096.0])
        lora[f"{part}_targets"] = list(TARGETS[part])[: rng.randint(1, 2)]
    fit = {
        "method": "lora",
        "steps": rng.randint(1, 99),
        "unet_learning_rate": rng.choice([1e-12, 3e-4, 1.0]),
        "text_encoder_learning_rate": rng.choice([1e-9, 2e-4, 0.5]),
        "optimizer": "adamw",
    }
    side = rng.choice([64, 128, 512])
    return {
        "base": "tiny", "family": family, "fingerprint": "0123456789abcdef", "format_version": 1,
        "rare_tokens": "zqrt", "resolution": side, "seconds": 1.5, "seed": rng.randrange(2**63),
        "recipe": {
            "photo": {"resolution": rng.choice([0, side])}, "lora": lora, "fit": fit,
            "prompt": {"rare_tokens": "", "rare_token_count": 2}, "edit": {"steps": rng.randint(1, 50)},
        },
    }  # fmt: skip


def write(path: Path, header: dict[str, Any]) -> None:
    """Writes a file with such a header and its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    lora = header["recipe"]["lora"]
    for part in PARTS[header["family"]]:
        for target in lora[f"{part}_targets"]:
            rank = lora[f"{part}_rank"]
            if rank:
                tensors[f"{part}.layers.0.{target}.lora_A.weight"] = torch.ones(rank, 3)
                tensors[f"{part}.layers.0.{target}.lora_B.weight"] = torch.ones(2, rank)
    save_file(tensors, path, {METADATA_KEY: json.dumps(header)})


def test_random_headers_of_version_1_keep_their_meaning(tmp_path: Path) -> None:
    rng, path, again = random.Random(0), tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    for family in ["sd", "sdxl"] * 20:
        header = first_header(rng, family)
        write(path, header)
        adapter, described = Adapter.load(path), describe(path)
        first, side = header["recipe"], header["resolution"]
        assert described["format_version"] == 1 and adapter.size == (side, side)
        photo = first["photo"]["resolution"]
        assert adapter.recipe.photo.exact == ((photo, photo) if photo else None)
        assert set(adapter.recipe.lora) == set(PARTS[family])
        for part, settings in adapter.recipe.lora.items():
            rank, alpha = (first["lora"][f"{part}_{name}"] for name in ("rank", "alpha"))
            assert (settings.rank, settings.alpha) == (rank, alpha)
            assert settings.targets == tuple(first["lora"][f"{part}_targets"])
            assert settings.scale == (alpha / rank if rank else 0)
            shared = part.removesuffix("_2")
            assert settings.learning_rate == first["fit"][f"{shared}_learning_rate"]
        for section in ("fit", "edit", "prompt"):
            now = adapter.recipe.to_dict()[section]
            assert all(
                now[key] == value for key, value in first[section].items() if "learning_rate" not in key
            )
        for name in ("base", "fingerprint", "rare_tokens", "seed", "seconds", "family"):
            assert getattr(adapter, name) == header[name]
        adapter.save(again, overwrite=True)
        assert describe(again)["format_version"] == 3
        assert Adapter.load(again).recipe == adapter.recipe, "what is saved again is of the newest version"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("recipe", "lora", "unet_rank"), "4", r"lora.unet.rank = '4'"),
        (("recipe", "lora", "unet_rank"), 5000, r"lora.unet.rank = 5000"),
        (("recipe", "lora", "unet_depth"), 4, r"lora.unet_depth = 4"),
        (("recipe", "lora", "tower_rank"), 4, r"lora.tower_rank = 4"),
        (("recipe", "lora"), [], "lora has to be a section"),
        (("recipe", "fit"), 3, "fit has to be a section"),
        (("recipe", "fit", "unet_learning_rate"), -1, "lora.unet.learning_rate = -1"),
        (("recipe", "fit", "unet_learning_speed"), 1, "unet_learning_speed"),
        (("recipe", "photo", "resolution"), 0.5, "photo.size = 0.5"),
        (("recipe", "photo", "sides"), 3, "sides"),
        (("recipe", "photo"), None, "photo has to be a section"),
        (("recipe",), 7, "'recipe' .* is wrong"),
        (("resolution",), "64", "'size' .* is wrong"),
        (("resolution",), 0, "'size' .* is wrong"),
        (("family",), ["sd"], "'family' .* is wrong"),
        (("format_version",), True, "'format_version' .* is wrong"),
        (("format_version",), 0, "'format_version' .* is wrong"),
    ],
)
def test_what_version_1_never_wrote_is_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any, message: str
) -> None:
    path = tmp_path / "first.safetensors"
    header = first_header(random.Random(1), "sd")
    write(path, header)
    inner = header
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, path, {METADATA_KEY: json.dumps(header)})
    for opened in (describe, Adapter.load):
        with pytest.raises(AdapterFileError, match=message):
            opened(path)
