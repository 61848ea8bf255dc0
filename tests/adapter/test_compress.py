"""Compression: lossless where nothing is removed, smaller otherwise, with an accurate report of the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import refused, run
from random_adapters import EDIT, LORA, changed, make_adapter, make_full_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.compress import compress, effect_lost
from lora_unitune.adapter.convert import convert
from lora_unitune.adapter.int8 import SCALES_KEY
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import AdapterFileError, SettingError
from lora_unitune.families import Base

EVERYTHING = changed(LORA, unet={"targets": ("to_q", "conv1", "ff.net.2")})


def change(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Returns the adapter's change of each layer's weights."""
    changes = {}
    for key in adapter.tensors:
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            a, b = adapter.tensors[key].flatten(1), adapter.tensors[f"{path}.lora_B.weight"].flatten(1)
            changes[path] = adapter.scale_of(path.partition(".")[0]) * b @ a
    return changes


def test_keeping_everything_changes_nothing(base15: Base, editor: Editor) -> None:
    adapter = make_adapter(base15, EVERYTHING)
    result = compress(adapter, keep=1.0)
    assert result.kept == pytest.approx(1.0) and result.ranks[0] == result.ranks[1]
    before, after = change(adapter), change(result.adapter)
    assert all((before[path] - after[path]).abs().max() < 3e-3 for path in before)
    settings = replace(EDIT, strength=1.0)
    first, second = (editor.pixels(a, ["zqrt"], "", None, [0], settings) for a in (adapter, result.adapter))
    assert (first - second).abs().max() < 5e-3


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_the_kept_importance_is_what_was_reported(base15: Base, keep: float, tmp_path: Path) -> None:
    adapter = make_adapter(base15, EVERYTHING)
    result = compress(adapter, keep=keep)
    before, after = change(adapter), change(result.adapter)
    energy = sum(value.square().sum().item() for value in before.values())
    lost = sum(
        (value - after.get(path, torch.zeros(1))).square().sum().item() for path, value in before.items()
    )
    assert 1 - lost / energy == pytest.approx(result.kept, abs=2e-3) and keep <= result.kept < keep + 0.05
    adapter.save(tmp_path / "before.safetensors")
    result.adapter.save(tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").stat().st_size < (tmp_path / "before.safetensors").stat().st_size
    again = Adapter.load(tmp_path / "after.safetensors")
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in result.adapter.tensors.items())


def test_a_compressed_adapter_edits_with_layers_missing(base15: Base, editor: Editor, tmp_path: Path) -> None:
    adapter = make_adapter(base15, EVERYTHING)
    result = compress(adapter, keep=0.3).adapter
    assert len(result.tensors) < len(adapter.tensors)
    settings = replace(EDIT, strength=1.0)
    first = editor.pixels(result, ["zqrt"], "", None, [0], settings)
    editor.pixels(adapter, ["zqrt"], "", None, [0], settings)
    again = editor.pixels(result, ["zqrt"], "", None, [0], settings)  # zero-padded: rounding differs
    assert (again - first).abs().max() < 1e-5


def test_to_bytes_limits_the_size(base15: Base) -> None:
    adapter = replace(make_adapter(base15, EVERYTHING), photo_latents=None)
    sizes = []
    for limit in (3000, 6000, 12000):
        result = compress(adapter, to_bytes=limit)
        sizes.append(2 * sum(tensor.numel() for tensor in result.adapter.tensors.values()))
        assert sizes[-1] <= limit
    assert sizes == sorted(set(sizes))


def test_the_effect_lost_grows_with_what_is_cut(base15: Base) -> None:
    adapter = make_adapter(base15, EVERYTHING)
    lost = [effect_lost(base15, adapter, compress(adapter, keep=keep).adapter) for keep in (1.0, 0.9, 0.5)]
    assert lost[0] < 0.01 < lost[1] < lost[2] < 1.5
    bare = replace(adapter, photo_latents=None)
    assert effect_lost(base15, bare, bare) == 0


def test_importance_by_the_base_loses_less_of_the_effect(base15: Base, basexl: Base) -> None:
    for base in (base15, basexl):
        adapter = make_adapter(base, EVERYTHING)
        half = sum(tensor.numel() for tensor in adapter.tensors.values())
        blind, weighed = (compress(adapter, to_bytes=half, base=known).adapter for known in (None, base))
        assert effect_lost(base, adapter, weighed) < effect_lost(base, adapter, blind)


def test_eight_bits_are_half_the_bytes_and_similar(base15: Base, tmp_path: Path) -> None:
    adapter = make_adapter(base15, EVERYTHING)
    result = compress(adapter, eight_bit=True).adapter
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    adapter.save(whole)
    result.save(half, dtype=torch.int8)
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    assert effect_lost(base15, adapter, result) < 0.02
    again = Adapter.load(half)
    assert again.digest == result.digest and again.tensors.keys() == result.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in result.tensors.items())
    again.save(tmp_path / "twice.safetensors", dtype=torch.int8)
    once, twice = load_file(half), load_file(tmp_path / "twice.safetensors")
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)
    convert(half, "kohya", tmp_path / "kohya.safetensors")  # in 16 bits, which other tools read
    wide = Adapter.load(tmp_path / "kohya.safetensors").tensors
    assert all((wide[key] - tensor).abs().max() < 2e-3 for key, tensor in result.tensors.items())
    with pytest.raises(SettingError, match="8 bits"):
        result.save(tmp_path / "x", dtype=torch.int8, layout="kohya")


def test_files_in_eight_bits_with_the_wrong_scales_are_refused(base15: Base, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    make_adapter(base15).save(path, dtype=torch.int8)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    first = next(key for key in tensors if key.endswith(".int8"))
    wrong = {
        "has shape": {SCALES_KEY: tensors[SCALES_KEY][1:]},
        "isn't a matrix in 8 bits": {first.replace(".int8", ".weight"): tensors[first].half()},
        "allowed are I8": {first: tensors[first].half()},
        "allowed are F16": {SCALES_KEY: tensors[SCALES_KEY].to(torch.int8)},
    }
    for message, change in wrong.items():
        save_file(tensors | change, path, metadata)
        with pytest.raises(AdapterFileError, match=message):
            Adapter.load(path)


def test_impossible_limits_are_refused(base15: Base, adapter: Adapter) -> None:
    for limits, message in (({}, "give one limit"), ({"keep": 0.5, "to_bytes": 9}, "give one limit"),
                            ({"keep": 0.0}, "keep = 0"), ({"to_bytes": 1}, "would leave no rank")):  # fmt: skip
        with pytest.raises(SettingError, match=message):
            compress(adapter, **limits)
    with pytest.raises(SettingError, match="method 'lora'"):
        compress(make_full_adapter(base15), keep=0.9)


def test_compress_on_the_command_line(adapter_file: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    summary = json.loads(run("compress", adapter_file, "--keep", "0.9", "-o", small, "--json").stdout)
    assert summary["bytes"] == small.stat().st_size < adapter_file.stat().st_size
    eighth = ("--eight-bit", "-o", small, "--overwrite", "--json")
    summary = json.loads(run("compress", adapter_file, *eighth).stdout)
    assert summary["kept"] == pytest.approx(1) and summary["bytes"] < 0.8 * adapter_file.stat().st_size
    wrong = ("compress", small, "--keep", "1.9", "-o", tmp_path / "x")
    assert "0<x<=1" in refused(*wrong, folder=tmp_path, code=2)


@pytest.mark.parametrize("name", ["base15", "basexl"])
def test_layers_that_learned_nothing_are_left_out(request: pytest.FixtureRequest, name: str) -> None:
    """In Stable Diffusion XL the last layer of each text encoder has no effect, so its B stays zero."""
    base: Base = request.getfixturevalue(name)
    adapter = make_adapter(base)
    idle = sorted(key for key in adapter.tensors if key.endswith(".lora_B.weight"))[::3]
    zeros = {key: torch.zeros_like(adapter.tensors[key]) for key in idle}
    adapter = replace(adapter, tensors={**adapter.tensors, **zeros})
    small = compress(adapter, keep=1.0, base=base).adapter
    assert not small.tensors.keys() & set(idle)
    assert effect_lost(base, adapter, small) < 1e-2
    nothing = {key: torch.zeros_like(tensor) for key, tensor in adapter.tensors.items()}
    with pytest.raises(SettingError, match="nothing to compress"):
        compress(replace(adapter, tensors=nothing), keep=0.9, base=base)


def test_a_photo_of_another_size_is_refused(base15: Base) -> None:
    adapter = replace(make_adapter(base15), photo_latents=torch.ones(1, 4, 3, 3))
    with pytest.raises(AdapterFileError, match="latents in the adapter have shape"):
        compress(adapter, keep=0.9, base=base15)
