"""Where a base's files are: variants, folders of other pipelines, the hub's cache; the hub is asked once."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUICK, refused, run
from conftest import unchanged, weights_of
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import constants

from lora_unitune import Editor
from lora_unitune.errors import BaseModelError
from lora_unitune.families import FAMILIES, load_base
from lora_unitune.families.location import locate_base


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_every_way_to_save_a_folder_opens(
    request: pytest.FixtureRequest, tmp_path: Path, kind: Any, variant: str | None, sharded: bool
) -> None:
    base = request.getfixturevalue("tiny_sdxl" if "XL" in kind.__name__ else "tiny_sd15")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(variant), torch.float32)
    pipeline = kind.from_pretrained(base, torch_dtype=dtype)
    size = {"max_shard_size": "30KB"} if sharded else {}
    pipeline.save_pretrained(tmp_path / "base", variant=variant, **size)
    assert sharded == any(tmp_path.rglob("*-of-*.safetensors"))
    loaded, whole = load_base(str(tmp_path / "base"), "cpu"), load_base(str(base), "cpu")
    expected = {key: each.to(dtype).float() for key, each in weights_of(whole).items()}
    assert unchanged(loaded, expected) and loaded.dtype == torch.float32


def test_plain_weights_go_before_variants(tiny_sd15: Path, tmp_path: Path) -> None:
    StableDiffusionPipeline.from_pretrained(tiny_sd15).save_pretrained(tmp_path / "base")
    half = StableDiffusionPipeline.from_pretrained(tiny_sd15, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "base", variant="fp16")
    assert (
        load_base(str(tmp_path / "base"), "cpu").fingerprint == load_base(str(tiny_sd15), "cpu").fingerprint
    )


PIPELINES = [
    (family.name, kind) for family in FAMILIES.values() for kind in family.pipelines if "Stable" in kind
]


@pytest.mark.parametrize(("family", "kind"), PIPELINES)
def test_folders_of_pipelines_with_the_same_models_open(
    tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path, family: str, kind: str
) -> None:
    base = tiny_sdxl if family == "sdxl" else tiny_sd15
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": kind}))
    assert load_base(str(tmp_path / "base"), "cpu").fingerprint == load_base(str(base), "cpu").fingerprint


# The hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sd15: Path) -> Path:
    """A hub cache with the base me/tiny; the folder of its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return Path(shutil.copytree(tiny_sd15, repository / "snapshots" / revision))


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine without a network; the hosts that were asked for."""
    asked: list[str] = []

    def fail(host: Any, *more: Any, **options: Any) -> Any:
        asked.append(str(host))
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    yield asked


def test_a_cached_base_never_asks_the_hub(
    cache: Path, lookups: list[str], photo: Path, tmp_path: Path, tiny_sd15: Path
) -> None:
    file = tmp_path / "a.safetensors"
    assert run("fit", photo, "-o", file, "--base", "me/tiny", *QUICK).exit_code == 0
    edited = run("edit", file, "a fox", "-o", tmp_path / "o.png", "--base", "me/tiny")
    assert edited.exit_code == 0 and lookups == []
    base = load_base("me/tiny", "cpu")
    assert base.name == "me/tiny" and base.fingerprint == load_base(str(tiny_sd15), "cpu").fingerprint


@pytest.mark.parametrize(
    "lost", ["unet/diffusion_pytorch_model.safetensors", "tokenizer", "model_index.json"]
)
def test_an_incomplete_cache_asks_the_hub_once(cache: Path, lookups: list[str], lost: str) -> None:
    path = cache / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(BaseModelError, match="'me/tiny'.*can't be downloaded") as caught:
        load_base("me/tiny", "cpu")
    assert len(lookups) <= 2 and "\n" not in str(caught.value)  # the client itself asks once a process


def test_a_typo_is_told_at_once(
    cache: Path,
    lookups: list[str],
    tiny_sd15: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_sd15, tmp_path / "models" / "sd-15")
    for name in ("models/sd15", "./models/sd15", str(tmp_path / "models" / "sd15")):
        command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", name, *QUICK)
        assert "did you mean" in refused(*command, folder=tmp_path / "models")
    assert "nothing/here.safetensors" in refused(*command[:5], "nothing/here.safetensors", folder=tmp_path)
    assert lookups == []
    assert "owner/modle" in refused(*command[:5], "owner/modle", folder=tmp_path)
    assert 1 <= len(lookups) <= 2


def test_a_folder_without_an_index_names_the_file_it_holds(tmp_path: Path) -> None:
    (tmp_path / "dream.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match="no model_index.json, but the file dream.safetensors"):
        locate_base(str(tmp_path))


def test_the_index_is_read_once(
    tiny_sdxl: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    plain = Path.read_text

    def spy(path: Path, *arguments: Any, **options: Any) -> str:
        read.extend([path] if path.name == "model_index.json" else [])
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", spy)
    fit = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", tiny_sdxl, *QUICK)
    assert run(*fit).exit_code == 0 and len(read) == 1
    with Editor(str(tiny_sdxl), device="cpu"):
        assert len(read) == 2
