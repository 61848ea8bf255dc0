"""Only what a file says is stated; conversions keep what another tool's file says, in words its readers take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from conftest import metadata_of
from random_adapters import EVERYTHING, LORA, changed, make_adapter
from safetensors.torch import load_file, save_file

from lora_unitune.adapter import hub
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.convert import convert, strip
from lora_unitune.adapter.describe import describe
from lora_unitune.adapter.header import open_source
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.adapter.tools import TOOLS, check_tool, problems
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import AdapterFileError, PromptError, SettingError
from lora_unitune.families import Base
from lora_unitune.families.tools import KNOWN_KEYS
from lora_unitune.settings import FitSettings

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CREDITS = {
    "modelspec.author": "A. Stranger",
    "modelspec.license": "CC-BY-4.0",
    "modelspec.tags": "style, vintage",
    "modelspec.trigger_phrase": "vintage look",
    "modelspec.title": "Vintage: a style",
}
TRAINING = {
    "ss_steps": "2400",
    "ss_seed": "1234",
    "ss_learning_rate": "1e-4",
    "ss_sd_model_name": "v1-5-pruned.safetensors",
    "ss_training_started_at": "1700000000.5",
    "ss_training_finished_at": "1700000600.5",
    "ss_resolution": "(512, 768)",
    "ss_output_name": "vintage:look (v2), final",
    "ss_tag_frequency": '{"img": {"cat": 3}}',
}


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A style LoRA of another tool, with its header."""
    path = tmp_path / "stranger.safetensors"
    tensors = {f"{LAYER}.lora_down.weight": torch.randn(4, 32), f"{LAYER}.lora_up.weight": torch.randn(32, 4)}
    hashes = {"modelspec.hash_sha256": "0x12", "sshs_model_hash": "12", "ss_network_dim": "99"}
    save_file({**tensors, f"{LAYER}.alpha": torch.tensor(2)}, path, {**CREDITS, **TRAINING, **hashes})
    return path


@pytest.fixture
def bare_stranger(tmp_path: Path) -> Path:
    path = tmp_path / "bare-stranger.safetensors"
    save_file(
        {f"{LAYER}.lora_down.weight": torch.randn(4, 32), f"{LAYER}.lora_up.weight": torch.randn(32, 4)}, path
    )
    return path


UNKNOWN = ("seed", "seconds", "steps", "size", "recipe", "family", "rare_tokens")


def test_a_file_that_says_nothing_is_described_by_its_tensors_alone(bare_stranger: Path) -> None:
    said = describe(bare_stranger)
    assert [said[name] for name in UNKNOWN] == [None] * len(UNKNOWN)
    assert said["base"] == "unknown" and said["ranks"]["unet"] == 4 and said["targets"] == {"unet": ["to_q"]}
    assert "redraw" not in said["privacy"] and said["entries"] == {}
    shown = run("inspect", bare_stranger).stdout
    assert "learning_rate" not in shown and "0.0004" not in shown and "transformer_blocks" not in shown
    for name in ("seed", "steps", "size", "recipe"):
        assert re.search(rf"^{name} +unknown$", shown, re.MULTILINE), name


def test_what_another_tool_says_is_read(stranger: Path) -> None:
    said = describe(stranger)
    assert (said["steps"], said["seed"], said["seconds"], said["size"]) == (2400, 1234, 600.0, [512, 768])
    assert (said["date"], said["base"]) == ("2023-11-14", "v1-5-pruned.safetensors")
    assert said["rare_tokens"] == "vintage look" and said["entries"]["author"] == "A. Stranger"
    assert said["entries"]["learning_rate"] == "1e-4" and said["recipe"] is None
    assert "Stranger" in run("inspect", stranger).stdout


def test_numbers_that_are_none_are_unknown(bare_stranger: Path) -> None:
    lies = {"ss_steps": "many", "ss_seed": "None", "ss_training_started_at": "1e99", "ss_resolution": "big"}
    save_file(load_file(bare_stranger), bare_stranger, lies | {"modelspec.author": "\x1b[2J"})
    said = describe(bare_stranger)
    assert [said[name] for name in ("steps", "seed", "seconds", "size")] == [None] * 4 and said[
        "entries"
    ] == {}


@pytest.mark.parametrize("keep_photo", [False, True])
def test_a_stripped_file_doesnt_claim_the_defaults(
    adapter: Adapter, tmp_path: Path, keep_photo: bool
) -> None:
    path, bare = tmp_path / "photo.safetensors", tmp_path / "bare.safetensors"
    recipe = replace(adapter.recipe, fit=FitSettings(steps=12))
    replace(adapter, recipe=recipe, seed=7).save(path)
    shown = run("strip", path, "-o", bare, *(["--keep-photo"] if keep_photo else [])).stdout
    assert ("--photo" in shown) is not keep_photo
    said = describe(bare)
    assert (said["seed"], said["seconds"], said["steps"]) == (None, None, None)
    assert said["recipe"].keys() == {"lora", "fit", "edit"} and said["recipe"]["fit"] == {"method": "lora"}
    assert all("learning_rate" not in section for section in said["recipe"]["lora"].values())
    shown = run("inspect", bare).stdout
    assert "64" not in re.sub(r"0x\S+|/\S+|\b[0-9a-f]{16}\b", "", shown.split("[edit]")[0]), (
        "no default of a fit"
    )
    card = hub.prepare_push(bare, "me/x").card
    assert " steps" not in card and "`unknown`" in card and "--base unknown" not in card
    assert (" --photo " in card) is not keep_photo


@pytest.mark.parametrize(
    "layouts", [["diffusers"], ["kohya"], ["peft"], ["diffusers", "kohya"], ["peft", "kohya"]]
)
def test_conversions_keep_what_another_tools_file_says(
    stranger: Path, tmp_path: Path, layouts: list[Any]
) -> None:
    place = stranger
    for number, layout in enumerate(layouts):
        convert(place, layout, tmp_path / f"{number}-{layout}.safetensors")
        place = tmp_path / f"{number}-{layout}.safetensors"
    kept = open_source(place).metadata
    assert {key: kept.get(key) for key in CREDITS} == CREDITS
    assert kept["ss_tag_frequency"] == TRAINING["ss_tag_frequency"] and kept["ss_steps"] == "2400"
    assert kept.get("modelspec.hash_sha256") != "0x12" and kept.get("ss_network_dim", "4") == "4"
    before, after = Adapter.load(stranger), Adapter.load(place)
    assert after.rare_tokens == "vintage look"
    assert all(torch.equal(after.tensors[key], tensor) for key, tensor in before.tensors.items())
    strip(stranger, tmp_path / "stripped.safetensors")
    assert not any(
        "Stranger" in text or "2400" in text
        for text in metadata_of(tmp_path / "stripped.safetensors").values()
    )


def test_the_alias_survives_the_syntax_of_a1111(stranger: Path, adapter: Adapter, tmp_path: Path) -> None:
    names = {}
    for tokens in ("zqrt ohwx", "a: <b>, (c)"):
        replace(adapter, rare_tokens=tokens).save(tmp_path / "k.safetensors", overwrite=True, layout="kohya")
        names[tokens] = metadata_of(tmp_path / "k.safetensors")["ss_output_name"]
    convert(stranger, "kohya", tmp_path / "s.safetensors")
    names["stranger"] = metadata_of(tmp_path / "s.safetensors")["ss_output_name"]
    assert names == {"zqrt ohwx": "zqrt_ohwx", "a: <b>, (c)": "a_b_c", "stranger": "vintage_look_v2_final"}
    for name in names.values():
        match = re.fullmatch(r"<(\w+):([^>]+)>", f"<lora:{name}:1>")  # as A1111 reads it
        assert match and match[2].split(":") == [name, "1"]


def test_a_kohya_file_fills_other_tools_dialogs(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "photo.safetensors"
    adapter.save(path)
    result = run("convert", path, "--to", "kohya", "-o", tmp_path / "k.safetensors", "--sidecar")
    assert result.exit_code == 0, result.output
    beside = json.loads((tmp_path / "k.json").read_text())
    assert beside["activation text"] == "zqrt ohwx" and beside["preferred weight"] == 1.0
    metadata = metadata_of(tmp_path / "k.safetensors")
    assert json.loads(metadata["ss_tag_frequency"]) == {"photo": {"zqrt ohwx": 1}}
    assert metadata["ss_sd_model_name"] == adapter.base and metadata["ss_resolution"] == "(32, 32)"
    assert "ss_base_model_version" not in metadata, "the width of this base is no model's"
    assert "already exists" in refused(
        "convert", path, "--to", "kohya", "-o", tmp_path / "k.safetensors", "--sidecar", folder=tmp_path
    )
    with pytest.raises(SettingError, match="sidecar"):
        convert(path, "diffusers", tmp_path / "d", sidecar=True)


def resized(path: Path, rank: int, header: bool = True) -> Path:
    """Writes a copy of a kohya file as kohya's resize_lora.py does: other ranks and alphas, the same header."""
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        layer = key.removesuffix(".alpha")
        up, down = (tensors[f"{layer}.lora_{side}.weight"].double() for side in ("up", "down"))
        left, values, right = torch.linalg.svd(up.flatten(1) @ down.flatten(1), full_matrices=False)
        scale = tensors[key].item() / down.shape[0]
        kept = min(rank, len(values))
        tensors[f"{layer}.lora_up.weight"] = (
            (left[:, :kept] * values[:kept]).float().reshape(-1, kept, *up.shape[2:]).contiguous()
        )
        tensors[f"{layer}.lora_down.weight"] = (
            right[:kept].float().reshape(kept, *down.shape[1:]).contiguous()
        )
        tensors[key] = torch.tensor(scale * kept)
    save_file(tensors, path.with_name("resized.safetensors"), metadata_of(path))
    return path.with_name("resized.safetensors")


def test_tensors_decide_over_a_header_that_another_tool_left(
    base15: Base, editor: Editor, tmp_path: Path
) -> None:
    made = make_adapter(base15, EVERYTHING)
    made.save(tmp_path / "k.safetensors", dtype=torch.float32, layout="kohya")
    path = resized(tmp_path / "k.safetensors", 8)  # all ranks that there are, so that nothing is lost
    opened = Adapter.load(path)
    assert opened.fingerprint == made.fingerprint and opened.rare_tokens == made.rare_tokens
    assert opened.recipe.lora["unet"].rank == 8 and "another tool" in opened.notes[0]
    mount, predictions = Mount(base15), []
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([300]), base15.condition("a fox")
    for adapter in (made, opened):
        mount.use(adapter, 1.0)
        predictions.append(base15.predict(*inputs))
    mount.release()
    assert (predictions[0] - predictions[1]).abs().max() < 1e-3
    assert (predictions[0] - base15.predict(*inputs)).abs().max() > 1e-2
    assert "another tool" in " ".join(editor.edit(opened, "a fox", steps=2).notes)
    assert "another tool" in describe(path)["notes"][0]
    convert(path, "diffusers", tmp_path / "again.safetensors")
    assert Adapter.load(tmp_path / "again.safetensors").notes == ()


def test_changed_alphas_decide_too_and_missing_tensors_are_still_refused(
    adapter: Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "k.safetensors"
    adapter.save(path, layout="kohya")
    tensors, metadata = load_file(path), metadata_of(path)
    save_file({key: t / 2 if key.endswith(".alpha") else t for key, t in tensors.items()}, path, metadata)
    assert Adapter.load(path).scale_of("unet") == 1.25 and adapter.scale_of("unet") == 2.5
    del tensors[min(key for key in tensors if "lora_up" in key)]
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match="is missing"):
        Adapter.load(path)


def test_trigger_words_may_be_none(
    bare_stranger: Path, editor: Editor, tiny_sd15: Path, tmp_path: Path
) -> None:
    with pytest.raises(PromptError, match="trigger=''"):
        editor.edit(Adapter.load(bare_stranger), "a fox", strength=1.0)
    assert editor.edit(Adapter.load(bare_stranger, ""), "a fox", strength=1.0, steps=2).prompt == "a fox"
    edit = (
        "edit",
        bare_stranger,
        "a fox",
        "-o",
        tmp_path / "o.png",
        "--base",
        tiny_sd15,
        "--steps",
        "2",
        "--strength",
        "1",
    )
    assert "--trigger" in refused(*edit, folder=tmp_path)
    assert run(*edit, "--trigger", "").exit_code == 0


READERS = {
    ("kohya", "same"): {"diffusers", "comfyui", "a1111"},
    ("kohya", "other"): {"diffusers", "comfyui", "a1111"},
    ("diffusers", "same"): {"diffusers"},
    ("diffusers", "other"): {"diffusers"},
}


@pytest.mark.parametrize(("layout", "alphas"), READERS)
@pytest.mark.parametrize("base", ["base15", "basexl"])
def test_inspect_says_which_tools_read_a_file(
    request: pytest.FixtureRequest, tmp_path: Path, layout: Any, alphas: str, base: str
) -> None:
    lora = LORA if alphas == "other" else changed(LORA, **{part: {"alpha": 0.0} for part in LORA})
    path = tmp_path / "photo.safetensors"
    make_adapter(request.getfixturevalue(base), lora).save(path, layout=layout)
    assert set(describe(path)["read_by"]) == READERS[layout, alphas]
    for tool in TOOLS:
        reads = tool in READERS[layout, alphas]
        assert bool(problems(tool, open_source(path))) is not reads
        assert ("convert --to kohya" in run("inspect", path).output) is (layout != "kohya")
        result = run("inspect", path, "--for", tool)
        assert result.exit_code == (0 if reads else 1) and ("kohya's layout" in result.stderr) is not reads
    adapter = Adapter.load(path)
    adapter.save(tmp_path / "eight.safetensors", dtype=torch.int8)
    for tool in TOOLS:
        with pytest.raises(AdapterFileError, match="8 bits"):
            check_tool(tool, open_source(tmp_path / "eight.safetensors"))


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("tool", "keys", "reads"),
    [
        ("a1111", ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",), True),
        ("a1111", ("lora_te2_text_projection.lora_down.weight",), False),
        ("comfyui", ("lora_te2_text_projection.lora_down.weight", "unet.conv_in.lora_A.weight"), True),
        ("comfyui", (f"unet.{ATTENTION}.to_q.lora_A.weight",), False),
        (
            "comfyui",
            (f"{ATTENTION}.processor.to_q_lora.down.weight", f"unet.{ATTENTION}.norm.lora_A.weight"),
            True,
        ),
        ("comfyui", ("base_model.model.conv_in.lora_A.weight",), False),
        ("comfyui", ("base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight",), False),
        ("comfyui", ("diffusion_model.out.2.lora_A.weight", "text_encoders.clip_l.x.lora_A.weight"), True),
    ],
)
def test_the_tools_know_these_names(tool: str, keys: tuple[str, ...], reads: bool) -> None:
    """As their own code was seen to do."""
    assert all(bool(KNOWN_KEYS[tool].fullmatch(key)) is reads for key in keys)


def test_comfyui_reads_alphas_only_beside_the_tensors(tmp_path: Path) -> None:
    key = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{key}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    for alpha, reads in ((2, True), (1, False)):
        path = tmp_path / "a.safetensors"
        entry = json.dumps({"unet.r": 2, "unet.lora_alpha": alpha})
        save_file(tensors, path, {"lora_adapter_metadata": entry})
        assert ("comfyui" in describe(path)["read_by"]) is reads


def test_text_encoder_keys_are_those_that_every_transformers_loads(fitted: tuple[Path, Any]) -> None:
    keys = [key for key in load_file(fitted[0]) if key.startswith("text_encoder.")]
    assert keys and all(key.startswith("text_encoder.text_model.encoder.") for key in keys)


def test_a_fit_stores_what_its_base_predicts(fitted: tuple[Path, Any], base21: Base, tmp_path: Path) -> None:
    assert Adapter.load(fitted[0]).prediction == base_prediction(fitted[0]) == "epsilon"
    assert metadata_of(fitted[0])["modelspec.prediction_type"] == "epsilon"
    made = replace(make_adapter(base21), prediction=base21.schedule().prediction)
    made.save(tmp_path / "v.safetensors", layout="kohya")
    assert metadata_of(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"


def base_prediction(path: Path) -> str:
    prediction: str = describe(path)["prediction"]
    return prediction
