"""The adapter file: saving and loading is lossless, diffusers reads it, and a bad file raises one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metadata_of, room_for
from random_adapters import LORA, changed, make_adapter
from safetensors.torch import load_file, save_file

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.convert import convert
from lora_unitune.adapter.describe import describe
from lora_unitune.adapter.header import PHOTO_KEY
from lora_unitune.adapter.suits import check_fits
from lora_unitune.errors import AdapterFileError, OutputError, SettingError
from lora_unitune.families import Base
from lora_unitune.recipe import Recipe
from lora_unitune.settings import FitSettings


def test_a_saved_adapter_comes_back(adapter: Adapter, saved: Path) -> None:
    loaded = Adapter.load(saved)
    assert loaded.tensors.keys() == adapter.tensors.keys()
    for key, tensor in adapter.tensors.items():
        assert loaded.tensors[key].dtype == torch.float32
        assert torch.equal(loaded.tensors[key], tensor.half().float())
    assert adapter.photo_latents is not None and loaded.photo_latents is not None
    assert torch.equal(loaded.photo_latents, adapter.photo_latents.half().float())
    for name in ("rare_tokens", "recipe", "base", "fingerprint", "size", "seed", "seconds", "family"):
        assert getattr(loaded, name) == getattr(adapter, name)
    assert loaded.digest == adapter.digest


def test_saving_what_was_loaded_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    Adapter.load(saved).save(again)
    assert metadata_of(again) == metadata_of(saved)
    first, second = load_file(saved), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_float32_files_are_exact(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "exact.safetensors"
    adapter.save(path, dtype=torch.float32)
    loaded = Adapter.load(path)
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in adapter.tensors.items())


def test_the_digest_follows_every_tensor(adapter: Adapter) -> None:
    key = next(iter(adapter.tensors))
    changed = replace(adapter, tensors={**adapter.tensors, key: adapter.tensors[key] + 1})
    without_photo = replace(adapter, photo_latents=None)
    assert len({adapter.digest, changed.digest, without_photo.digest}) == 3


def test_the_photo_can_be_left_out(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    replace(adapter, photo_latents=None).save(path)
    assert Adapter.load(path).photo_latents is None
    assert describe(path)["photo_embedded"] is False
    assert PHOTO_KEY not in load_file(path)


def test_describe_returns_the_content_as_json(adapter: Adapter, saved: Path) -> None:
    described = json.loads(json.dumps(describe(saved)))
    assert described["base"] == adapter.base
    assert described["fingerprint"] == adapter.fingerprint
    assert described["rare_tokens"] == "zqrt ohwx"
    assert described["method"] == "lora"
    assert described["ranks"] == {"unet": 4, "text_encoder": 2}
    assert described["targets"]["unet"] == list(LORA["unet"].targets)
    assert described["steps"] == adapter.recipe.fit.steps
    assert described["photo_embedded"] is True
    assert described["format_version"] == 3
    assert described["size"] == [32, 32]
    assert described["tensors"] == len(adapter.tensors)
    assert described["parameters"] == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert described["bytes"] == saved.stat().st_size
    assert Recipe.from_dict(described["recipe"]) == adapter.recipe


def test_ranks_of_zero_and_convolutions_are_saved_too(base15: Base, tmp_path: Path) -> None:
    lora = changed(LORA, unet={"targets": ("conv1", "to_q")}, text_encoder={"rank": 0})
    path = tmp_path / "photo.safetensors"
    make_adapter(base15, lora).save(path)
    described = describe(path)
    assert described["ranks"]["text_encoder"] == 0
    assert "text_encoder" not in described["targets"]
    assert any(tensor.ndim == 4 for tensor in Adapter.load(path).tensors.values())
    assert not any("text_encoder" in key for key in json.loads(metadata_of(path)["lora_adapter_metadata"]))


def test_full_weights_are_saved_without_diffusers_metadata(base15: Base, tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    tensors = {f"unet.{name}": weight.detach() for name, weight in base15.parts["unet"].named_parameters()}
    made = make_adapter(base15, changed(LORA, text_encoder={"rank": 0}))
    recipe = replace(made.recipe, fit=FitSettings(method="full"))
    replace(made, tensors=tensors, recipe=recipe).save(path)
    loaded = Adapter.load(path)
    assert loaded.tensors.keys() == tensors.keys()
    assert loaded.recipe.fit.method == "full"
    assert "lora_adapter_metadata" not in metadata_of(path)
    assert describe(path)["ranks"] == {}


def test_check_fits_names_both_bases(base15: Base, base21: Base, adapter: Adapter) -> None:
    check_fits(adapter, base15)
    with pytest.raises(AdapterFileError, match="was made for base") as caught:
        check_fits(adapter, base21)
    assert base15.fingerprint in str(caught.value) and base21.fingerprint in str(caught.value)


def test_values_that_float16_cant_hold_are_refused_and_nothing_is_written(
    adapter: Adapter, tmp_path: Path
) -> None:
    key = next(iter(adapter.tensors))
    for value in (1e6, float("nan")):
        broken = replace(adapter, tensors={**adapter.tensors, key: torch.full((4, 16), value)})
        with pytest.raises(AdapterFileError, match="isn't finite"):
            broken.save(tmp_path / "broken.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_nothing(adapter: Adapter, tmp_path: Path) -> None:
    with room_for(4096), pytest.raises(OutputError, match="can't be written"):
        adapter.save(tmp_path / "photo.safetensors")
    assert os.listdir(tmp_path) == []


def test_an_existing_file_stays_unless_overwriting_is_allowed(adapter: Adapter, saved: Path) -> None:
    content = saved.read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        adapter.save(saved)
    assert saved.read_bytes() == content
    adapter.save(saved, overwrite=True)


def test_a_3_to_2_photo_keeps_its_size_and_its_digest(base15: Base, tmp_path: Path) -> None:
    made, path = make_adapter(base15, size=(48, 32)), tmp_path / "wide.safetensors"
    made = replace(made, photo_digest="0123456789abcdef" * 2, history=(0.3, 0.2))
    for layout in ("diffusers", "kohya"):
        made.save(path, overwrite=True, layout=layout)
        own = json.loads(metadata_of(path)["lora_unitune"])
        assert own["size"] == [48, 32] and own["photo_digest"] == made.photo_digest
        assert metadata_of(path)["modelspec.resolution"] == "48x32"
        loaded = Adapter.load(path)
        assert loaded.size == (48, 32) and loaded.photo_digest == made.photo_digest
        assert loaded.photo_latents is not None and loaded.photo_latents.shape == (1, 4, 16, 24)
        assert loaded.history == () and "history" not in own, "the losses stay in memory"
        assert "digest" in describe(path)["privacy"]


def test_a_trigger_replaces_the_rare_tokens(adapter: Adapter, saved: Path) -> None:
    assert Adapter.load(saved, " a  red   fox ").rare_tokens == "a red fox"
    assert (
        Adapter.load(saved, "  ").rare_tokens == "" and Adapter.load(saved).rare_tokens == adapter.rare_tokens
    )
    with pytest.raises(SettingError, match="trigger = "):
        Adapter.load(saved, "\x1b[2J")


def test_headers_are_read_without_torch(adapter: Adapter, tmp_path: Path) -> None:
    files = [
        tmp_path / "diffusers.safetensors",
        tmp_path / "kohya.safetensors",
        tmp_path / "bits.safetensors",
    ]
    adapter.save(files[0])
    adapter.save(files[1], layout="kohya")
    adapter.save(files[2], dtype=torch.int8)
    other = tmp_path / "other.safetensors"
    save_file(load_file(files[1]), other)  # its alphas are read from the bytes
    convert(files[0], "peft", tmp_path / "peft")
    places = [str(path) for path in (*files, other, tmp_path / "peft")]
    code = (
        "import json, sys; from lora_unitune.adapter.describe import describe;"
        "print(json.dumps([describe(place) for place in sys.argv[1:]]));"
        "print(sorted({'torch', 'numpy', 'peft', 'diffusers'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=True)
    described, loaded = result.stdout.splitlines()
    assert loaded == "[]"
    assert json.loads(described) == json.loads(json.dumps([describe(place) for place in places]))
    assert all(each["ranks"] == {"unet": 4, "text_encoder": 2} for each in json.loads(described))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_alphas_are_read_in_every_dtype(adapter: Adapter, tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "photo.safetensors"
    adapter.save(path, layout="kohya")
    tensors = {key: t.to(dtype) if key.endswith(".alpha") else t for key, t in load_file(path).items()}
    save_file(tensors, path)
    assert [Adapter.load(path).scale_of(part) for part in adapter.parts] == [2.5, 1.5]
