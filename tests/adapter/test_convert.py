"""Other layouts: round trips are lossless, other tools read them, and files of other tools can be loaded."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUICK, refused, run
from conftest import metadata_of
from diffusers import DiffusionPipeline
from peft import PeftModel
from random_adapters import EDIT, EVERYTHING, LORA, changed, make_adapter
from safetensors.torch import load_file, save_file
from test_spellings import assert_same, diffusers_changes, ours

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.convert import convert, strip
from lora_unitune.adapter.describe import describe
from lora_unitune.adapter.header import PHOTO_KEY
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import AdapterFileError, PromptError, SettingError
from lora_unitune.families import POCKET_FOLDER, Base
from lora_unitune.settings import FitSettings
from lora_unitune.training.fit import fit


def with_low_ranks(adapter: Adapter) -> Adapter:
    """Returns the adapter with rank 1 in every other layer."""
    low = {key.rsplit(".", 2)[0] for key in sorted(adapter.tensors)[::4]}
    cut = {
        key: tensor
        if key.rsplit(".", 2)[0] not in low
        else (tensor[:1] if ".lora_A." in key else tensor[:, :1]).contiguous()
        for key, tensor in adapter.tensors.items()
    }
    return replace(adapter, tensors=cut)


@pytest.fixture(params=["15", "21", "xl", "pocket"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(f"base{request.param}")


@pytest.fixture(params=["plain", "everything", "low ranks"])
def made(request: pytest.FixtureRequest, base: Base) -> Adapter:
    """An adapter of attention only, of all kinds of layers, or of different ranks."""
    adapter = replace(make_adapter(base, EVERYTHING if request.param != "plain" else LORA), date="2026-01-02")
    return with_low_ranks(adapter) if request.param == "low ranks" else adapter


@pytest.mark.parametrize("layout", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_round_trip_is_the_same_file(
    made: Adapter, tmp_path: Path, layout: Any, dtype: torch.dtype
) -> None:
    first, other, again = (
        tmp_path / name for name in ("first.safetensors", "other.safetensors", "again.safetensors")
    )
    made.save(first, dtype=dtype)
    convert(first, layout, other)
    convert(other, "diffusers", again)
    before, after = load_file(first), load_file(again)
    assert before.keys() == after.keys() and metadata_of(first) == metadata_of(again)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == dtype for key in before)


def plain_image(folder: Path, prepare: Any) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    images: torch.Tensor = pipeline(
        "zqrt ohwx a fox", num_inference_steps=3, guidance_scale=4.0, latents=noise, output_type="pt"
    ).images
    return images


@pytest.mark.parametrize("low", [False, True])
def test_plain_diffusers_and_peft_sample_the_same_from_every_layout(
    request: pytest.FixtureRequest, tmp_path: Path, base: Base, low: bool
) -> None:
    is_pocket = base.name == "pocket"
    folder = POCKET_FOLDER if is_pocket else request.getfixturevalue(base.name.replace("-", "_"))
    adapter = make_adapter(base, EVERYTHING)
    if is_pocket:  # it is larger, so that changes add up
        adapter = replace(adapter, tensors={key: tensor / 4 for key, tensor in adapter.tensors.items()})
    adapter = with_low_ranks(adapter) if low else adapter
    adapter.save(tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", "kohya", tmp_path / "kohya.safetensors")
    convert(tmp_path / "ours.safetensors", "peft", tmp_path / "peft")

    def from_peft(pipeline: Any) -> None:
        for part in base.parts:
            adapted = PeftModel.from_pretrained(getattr(pipeline, part), tmp_path / "peft" / part)
            setattr(pipeline, part, adapted)

    ours = plain_image(folder, lambda pipeline: pipeline.load_lora_weights(tmp_path / "ours.safetensors"))
    theirs = plain_image(folder, lambda pipeline: pipeline.load_lora_weights(tmp_path / "kohya.safetensors"))
    plain = plain_image(folder, lambda pipeline: None)
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours - plain_image(folder, from_peft)).abs().max() <= 1e-4
    assert (ours - plain).abs().max() > 1e-2, "the adapter has to matter for this test to mean anything"


def test_the_header_follows_modelspec(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    replace(adapter, date="2026-01-02").save(path)
    content, metadata = path.read_bytes(), metadata_of(path)
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.trigger_phrase"] == adapter.rare_tokens
    assert metadata["modelspec.date"] == "2026-01-02"
    assert metadata["modelspec.resolution"] == "32x32"
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"


@pytest.mark.parametrize("base", ["15", "xl"], indirect=True)
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_matrices_of_convolutions_are_written_as_diffusers_opens_them(
    request: pytest.FixtureRequest, base: Base, tmp_path: Path, layout: Any
) -> None:
    """Also those of 1 x 1, which only Stable Diffusion 1.x has around its attention."""
    adapter = make_adapter(base, EVERYTHING)
    flat = {key: tensor.flatten(1) for key, tensor in adapter.tensors.items()}
    stated = {"ss_base_model_version": "sd_v1" if base.name == "tiny-sd15" else "sdxl_base_v1-0"}
    save_file(flat, tmp_path / "flat.safetensors", stated)
    convert(tmp_path / "flat.safetensors", layout, tmp_path / "a.safetensors")
    folder = request.getfixturevalue(base.name.replace("-", "_"))
    assert_same(ours(tmp_path / "flat.safetensors"), diffusers_changes(folder, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_another_tools_file_opens_with_a_trigger(
    base15: Base, editor: Editor, tmp_path: Path, layout: Any
) -> None:
    adapter, settings = make_adapter(base15, EVERYTHING), replace(EDIT, strength=1.0)
    adapter.save(tmp_path / "ours.safetensors", dtype=torch.float32, layout=layout)
    metadata = metadata_of(tmp_path / "ours.safetensors")
    kept = {key: value for key, value in metadata.items() if key.startswith(("ss_", "lora_adapter"))}
    tensors = load_file(tmp_path / "ours.safetensors")
    tensors.pop(PHOTO_KEY, None)
    foreign = tmp_path / "foreign.safetensors"
    save_file(tensors, foreign, kept)
    with pytest.raises(PromptError, match="trigger"):
        editor.edit(Adapter.load(foreign), "a fox", strength=1.0)
    opened = Adapter.load(foreign, "zqrt  ohwx")
    assert opened.rare_tokens == "zqrt ohwx" and describe(foreign)["fingerprint"] == ""
    ours, theirs = (
        editor.pixels(each, ["zqrt a fox"], "", None, [0], settings) for each in (adapter, opened)
    )
    assert (ours - theirs).abs().max() <= 1e-5
    plain = editor.pixels(None, ["zqrt a fox"], "", None, [0], settings)
    assert (ours - plain).abs().max() > 1e-2
    assert editor.edit(opened, "a fox", strength=1.0, steps=2).prompt == "zqrt ohwx a fox"
    convert(foreign, "diffusers", tmp_path / "again.safetensors")
    again = Adapter.load(tmp_path / "again.safetensors")
    assert again.tensors.keys() == opened.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in opened.tensors.items())


def test_alphas_that_differ_from_layer_to_layer_are_kept(
    base15: Base, editor: Editor, tmp_path: Path
) -> None:
    adapter, path = make_adapter(base15), tmp_path / "foreign.safetensors"
    adapter.save(path, dtype=torch.float32, layout="kohya")
    tensors = load_file(path)
    alphas = sorted(key for key in tensors if key.endswith(".alpha") and key.startswith("lora_unet"))
    expected = dict(adapter.tensors)
    for number, key in enumerate(alphas):
        tensors[key] *= 1 + number % 3
        layer = adapter.kind.names.from_kohya(key.removesuffix(".alpha"), adapter.kind.denoiser)
        expected[f"{layer}.lora_B.weight"] = (1 + number % 3) * expected[f"{layer}.lora_B.weight"]
    save_file(tensors, path)
    settings = replace(EDIT, strength=1.0)
    ours = editor.pixels(replace(adapter, tensors=expected), ["zqrt"], "", None, [0], settings)
    theirs, with_one_alpha = (
        editor.pixels(each, ["zqrt"], "", None, [0], settings) for each in (Adapter.load(path), adapter)
    )
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - with_one_alpha).abs().max() > 1e-2


def test_layers_of_lower_rank_equal_zero_padded_ones(base15: Base, editor: Editor) -> None:
    low = with_low_ranks(make_adapter(base15))
    full = {key: torch.zeros_like(tensor) for key, tensor in make_adapter(base15).tensors.items()}
    for key, tensor in low.tensors.items():
        full[key][tuple(slice(side) for side in tensor.shape)] = tensor
    settings = replace(EDIT, strength=1.0)
    other = editor.pixels(make_adapter(base15, seed=5), ["zqrt"], "", None, [0], settings)
    first, second = (
        editor.pixels(each, ["zqrt"], "", None, [0], settings) for each in (low, replace(low, tensors=full))
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_strip_takes_out_what_an_edit_doesnt_need(adapter: Adapter, tmp_path: Path) -> None:
    path, bare = tmp_path / "photo.safetensors", tmp_path / "bare.safetensors"
    recipe = replace(adapter.recipe, fit=FitSettings(steps=77))
    recipe = replace(recipe, lora=changed(recipe.lora, unet={"learning_rate": 0.0123}))
    known = {"seed": 123456, "seconds": 98.7, "date": "2026-01-02", "photo_digest": "abcd" * 8}
    replace(adapter, recipe=recipe, **known).save(path)
    strip(path, bare)
    text = json.dumps(metadata_of(bare))
    for secret in ("123456", "98.7", "2026-01-02", "77", "0.0123", "abcd" * 8, adapter.base):
        assert secret in json.dumps(metadata_of(path)) and secret not in text
    assert "2026-01-02" in describe(path)["privacy"] and "latents" in describe(path)["privacy"]
    assert "latents" not in describe(bare)["privacy"] and "can redraw" in describe(bare)["privacy"]
    before, after = Adapter.load(path), Adapter.load(bare)
    assert after.photo_latents is None
    assert all(torch.equal(after.tensors[key], tensor) for key, tensor in before.tensors.items())
    assert after.recipe.edit == before.recipe.edit and after.fingerprint == before.fingerprint
    strip(path, tmp_path / "kept.safetensors", keep_photo=True)
    assert Adapter.load(tmp_path / "kept.safetensors").photo_latents is not None


def test_convert_and_strip_on_the_command_line(adapter_file: Path, edit: list[Any], tmp_path: Path) -> None:
    folder, bare = tmp_path / "peft", tmp_path / "bare.safetensors"
    assert run("convert", adapter_file, "--to", "peft", "-o", folder).exit_code == 0
    assert json.loads(run("strip", folder, "-o", bare, "--json").stdout)["bytes"] == bare.stat().st_size
    assert "already exists" in refused("convert", bare, "--to", "peft", "-o", folder, folder=tmp_path)
    assert run("convert", bare, "--to", "peft", "-o", folder, "--overwrite").exit_code == 0
    out = tmp_path / "out.png"
    assert run(*edit[:-1], folder, "a fox", "-o", out, "--strength", "1").exit_code == 0
    (folder / "unet" / "adapter_config.json").write_text("[" * 100_000)
    assert "can't be read" in refused(
        "convert", folder, "--to", "kohya", "-o", tmp_path / "out.safetensors", folder=tmp_path
    )
    (folder / "unet" / "adapter_config.json").unlink()
    (folder / "text_encoder" / "adapter_config.json").unlink()
    out = tmp_path / "out.safetensors"
    assert "adapter_config.json" in refused("convert", folder, "--to", "kohya", "-o", out, folder=tmp_path)


def test_full_weights_have_no_other_layout(base15: Base, tmp_path: Path) -> None:
    tensors = {f"unet.{name}": weight.detach() for name, weight in base15.parts["unet"].named_parameters()}
    made = make_adapter(base15, changed(LORA, text_encoder={"rank": 0}))
    path = tmp_path / "full.safetensors"
    recipe = replace(made.recipe, fit=FitSettings(method="full"))
    replace(made, tensors=tensors, recipe=recipe).save(path)
    for layout in ("kohya", "peft"):
        with pytest.raises(SettingError, match="method 'full'"):
            convert(path, layout, tmp_path / "out.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["full.safetensors"]


def test_a_peft_folder_with_wrong_tensors_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "photo.safetensors")
    convert(tmp_path / "photo.safetensors", "peft", tmp_path / "peft")
    weights = tmp_path / "peft" / "unet" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = min(tensors)
    save_file({**tensors, key: tensors[key][:, :0].contiguous()}, weights)
    with pytest.raises(AdapterFileError, match="has shape") as caught:
        Adapter.load(tmp_path / "peft")
    assert str(caught.value).startswith(str(tmp_path / "peft"))


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_a_fit_continues_from_an_adapter_of_any_layout(
    base15: Base, photo_image: Any, tmp_path: Path, layout: Any
) -> None:
    steps = ["fit.steps=2", "fit.batch_size=1", "lora.unet.learning_rate=1e-12"]
    steps += ["lora.text_encoder.learning_rate=1e-12"]
    make_adapter(base15, EVERYTHING).save(tmp_path / "first.safetensors", dtype=torch.float32)
    convert(tmp_path / "first.safetensors", layout, tmp_path / "other.safetensors")
    start = Adapter.load(tmp_path / "other.safetensors")
    continued = fit(photo_image, base=base15, overrides=steps, start=start)
    same = [
        [(part, each.rank, each.scale, each.targets) for part, each in made.recipe.lora.items()]
        for made in (start, continued)
    ]
    assert same[0] == same[1] and continued.rare_tokens == start.rare_tokens
    assert all((continued.tensors[key] - tensor).abs().max() < 1e-3 for key, tensor in start.tensors.items())
    with pytest.raises(SettingError, match="method 'lora' only"):
        fit(photo_image, base=base15, overrides=["fit.method=full"], start=start)


def test_the_command_line_continues_too(
    adapter_file: Path, photo: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "more.safetensors", ["--base", tiny_sd15, *QUICK]
    assert run("fit", photo, "-o", out, "--from", adapter_file, *base).exit_code == 0
    before, after = Adapter.load(adapter_file), Adapter.load(out)
    assert before.tensors.keys() == after.tensors.keys() and before.digest != after.digest


def test_a_peft_folder_is_described_as_the_file_is(adapter: Adapter, tmp_path: Path) -> None:
    path, folder = tmp_path / "photo.safetensors", tmp_path / "peft"
    adapter.save(path)
    convert(path, "peft", folder)
    file, parts = describe(path), describe(folder)
    assert parts["bytes"] == sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    differs = {"path": 0, "bytes": 0, "read_by": 0}
    assert {**parts, **differs} == {**file, **differs} and parts["read_by"] == ["peft"]
    assert re.search("^read by +PEFT; for diffusers, ", run("inspect", folder).stdout, re.MULTILINE)
    (folder / "lora_unitune.safetensors").unlink()  # as PEFT alone writes it
    bare = describe(folder)
    assert (bare["ranks"], bare["fingerprint"], bare["size"]) == (file["ranks"], "", None)
    assert Adapter.load(folder, "zqrt ohwx").rare_tokens == "zqrt ohwx"
    opened = Adapter.load(folder / "unet", "zqrt")  # the denoiser's folder alone
    assert opened.recipe.lora["text_encoder"].rank == 0 and opened.scale_of("unet") == 2.5


def test_a_family_of_another_kind_has_every_layout(baseflow: Base, tmp_path: Path) -> None:
    lora = dict(baseflow.family.parts)
    first, other, again = (
        tmp_path / name for name in ("first.safetensors", "other.safetensors", "again.safetensors")
    )
    made = make_adapter(baseflow, lora, size=(24, 16))
    made.save(first)
    for layout in ("kohya", "peft"):
        convert(first, layout, other, overwrite=True)
        convert(other, "diffusers", again, overwrite=True)
        assert metadata_of(again) == metadata_of(first)
        other.rename(tmp_path / layout)
    tensors = load_file(tmp_path / "kohya")
    save_file(tensors, tmp_path / "kohya")
    opened = Adapter.load(tmp_path / "kohya", "zqr")
    assert opened.kind is baseflow.family and opened.tensors.keys() == made.tensors.keys()
