"""Bases in one file: the folder's weights, fingerprint and pictures, offline; other files are named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import QUICK, refused, run
from conftest import unchanged, weights_of
from diffusers import AutoencoderKL, UNet2DConditionModel
from original_layout import original, original_vae, save_original
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_unitune import Editor
from lora_unitune.errors import BaseModelError
from lora_unitune.families import load_base
from lora_unitune.families.location import locate_base
from lora_unitune.families.single_file import CONFIGURATIONS, build_tokenizer

KINDS = {"sd15": "tiny_sd15", "sd21": "tiny_sd21", "sdxl": "tiny_sdxl"}


def picture(base: Any) -> bytes:
    with Editor(base, device="cpu") as editor:
        return editor.edit(None, "a fox", seed=3, steps=2, strength=1.0, residual=False).image.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_is_the_folder_bit_for_bit(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(KINDS[kind]), tmp_path / "folder"))
    for path in folder.rglob("*.safetensors"):
        save_file({key: each.to(dtype) for key, each in load_file(path).items()}, path, {"format": "pt"})
    file = save_original(folder, tmp_path / "dream.safetensors", kind, dtype)
    ours, theirs = load_base(str(file), "cpu"), load_base(str(folder), "cpu")
    assert ours.name == "dream" and ours.family is theirs.family
    assert ours.fingerprint == theirs.fingerprint and unchanged(ours, weights_of(theirs))
    assert picture(ours) == picture(theirs)


def test_the_command_line_takes_a_file(tiny_sd15: Path, photo: Path, tmp_path: Path) -> None:
    base = save_original(tiny_sd15, tmp_path / "dream.safetensors", "sd15")
    file, out = tmp_path / "a.safetensors", tmp_path / "o.png"
    assert run("fit", photo, "-o", file, "--base", base, *QUICK).exit_code == 0
    for where in (base, tiny_sd15):
        edited = run("edit", file, "a fox", "-o", out, "--base", where, "--overwrite", "--size", "base")
        assert edited.exit_code == 0 and "note" not in edited.stderr


# What is not in the file: configurations and the vocabulary

PARAMETERS = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd21": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sd21-v": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sdxl": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
}
"""The published models' numbers of parameters."""


@pytest.mark.parametrize("kind", PARAMETERS)
def test_the_configurations_are_those_of_the_published_models(kind: str) -> None:
    folder, counts = CONFIGURATIONS / kind, {}
    with torch.device("meta"):
        for part in PARAMETERS[kind]:
            if part.startswith("text_encoder"):
                model: Any = CLIPTextModelWithProjection if part.endswith("2") else CLIPTextModel
                built = model(CLIPTextConfig.from_pretrained(folder / part))
            else:
                model = UNet2DConditionModel if part == "unet" else AutoencoderKL
                built = model.from_config(model.load_config(folder / part))
            counts[part] = sum(each.numel() for each in built.parameters())
    assert counts == PARAMETERS[kind]


def test_the_vocabulary_is_clips() -> None:
    tokenizer = build_tokenizer(CLIPTokenizer, CONFIGURATIONS / "sd15" / "tokenizer")
    ids = tokenizer("A photo of a cat", padding="max_length").input_ids
    assert len(tokenizer) == 49408 and len(ids) == tokenizer.model_max_length == 77
    assert ids[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    padded = build_tokenizer(CLIPTokenizer, CONFIGURATIONS / "sd21" / "tokenizer")
    assert padded("a", padding="max_length").input_ids[:4] == [49406, 320, 49407, 0]
    assert (
        tokenizer.decode(tokenizer("naïve café, 12 €!").input_ids, skip_special_tokens=True)
        == "naïve café , 1 2 €!"
    )


# What a file says of itself, and what it is

WEIGHT = torch.zeros(1, 4)
CONV = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
VAE = {"first_stage_model.decoder.conv_in.weight": WEIGHT}
SD1 = {**CONV, **VAE, "cond_stage_model.transformer.text_model.final_layer_norm.weight": WEIGHT}
SD2 = {**CONV, **VAE, "cond_stage_model.model.ln_final.weight": WEIGHT}
XL = {**CONV, **VAE, "conditioner.embedders.1.model.ln_final.weight": WEIGHT}


def write(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    save_file({key: each.clone() for key, each in tensors.items()}, path, header)


def channels(count: int) -> dict[str, Tensor]:
    return SD1 | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, count, 3, 3)}


@pytest.mark.parametrize(
    ("tensors", "header", "folder", "changes"),
    [
        (SD1, {}, "sd15", {}),
        (SD1, {"modelspec.prediction_type": "v"}, "sd15", {"prediction_type": "v_prediction"}),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-512"}, "sd21", {"prediction_type": "epsilon"}),
        (
            SD2,
            {"modelspec.architecture": "stable-diffusion-v2-768-v"},
            "sd21-v",
            {"prediction_type": "v_prediction"},
        ),
        (SD2, {"modelspec.prediction_type": "epsilon"}, "sd21", {"prediction_type": "epsilon"}),
        (XL, {}, "sdxl", {}),
        (XL | {"v_pred": WEIGHT}, {}, "sdxl", {"prediction_type": "v_prediction"}),
    ],
)
def test_family_and_prediction_come_from_the_file(
    tmp_path: Path, tensors: dict[str, Tensor], header: dict[str, str], folder: str, changes: dict[str, str]
) -> None:
    write(tensors, tmp_path / "a.safetensors", header)
    files = locate_base(str(tmp_path / "a.safetensors"))
    assert files.folder == CONFIGURATIONS / folder and dict(files.scheduler) == changes


def test_a_doubtful_prediction_is_asked_for(tmp_path: Path, photo: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(SD2, file)
    command = ("fit", photo, "-o", tmp_path / "o.safetensors", "--base", file)
    assert "--prediction epsilon" in refused(*command, folder=tmp_path)
    refused(*command, "--prediction", "v", folder=tmp_path, code=2)
    assert locate_base(str(file), prediction="epsilon").folder.name == "sd21"
    assert locate_base(str(file), prediction="v_prediction").folder.name == "sd21-v"
    write(XL | {"v_pred": WEIGHT, "ztsnr": WEIGHT}, file)
    assert locate_base(str(file)).scheduler["rescale_betas_zero_snr"]


def test_the_prediction_reaches_the_schedule(tiny_sd15: Path, tmp_path: Path) -> None:
    file = save_original(tiny_sd15, tmp_path / "a.safetensors", "sd15")
    for where in (file, tiny_sd15):
        base = load_base(locate_base(str(where), prediction="v_prediction"), "cpu")
        assert base.schedule().prediction == "v_prediction"
    with pytest.raises(BaseModelError, match="'v' isn't allowed"):
        locate_base(str(tiny_sd15), prediction="v")


OTHERS = {
    "a LoRA": "lora_unet_down_blocks_0.lora_down.weight unet.a.lora.up.weight unet.a.lora_A.weight x.hada_w1_a",
    "a ControlNet": "control_model.zero_convs.0.0.weight controlnet_cond_embedding.conv_in.weight",
    "a VAE": "first_stage_model.encoder.conv_in.weight decoder.conv_in.weight",
    "the UNet of a diffusers folder": "down_blocks.0.resnets.0.conv1.weight",
    "a UNet alone": "model.diffusion_model.input_blocks.0.0.weight",
    "a text encoder": "text_model.embeddings.position_embedding.weight",
    "a FLUX.1 model": "double_blocks.0.img_attn.norm.key_norm.scale",
    "a FLUX.2 model": "model.diffusion_model.single_stream_modulation.lin.weight",
    "a Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",
    "a Z-Image model": "model.diffusion_model.layers.0.adaLN_modulation.0.weight",
    "a Chroma model": "distilled_guidance_layer.in_proj.bias",
    "a Qwen-Image model": "transformer_blocks.0.attn.add_q_proj.weight,txt_norm.weight",
    "a Krea 2 model": "txtfusion.projector.weight",
    "an EDM model": "edm_mean",
    "the refiner": "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias",
    "a textual inversion": "emb_params clip_l",
    "unknown kind": "something",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_named(tmp_path: Path, photo: Path, kind: str) -> None:
    for names in OTHERS[kind].split():
        save_file({name: torch.zeros(4, 4) for name in names.split(",")}, tmp_path / "a.safetensors")
        command = ("fit", photo, "-o", tmp_path / "o.safetensors", "--base", tmp_path / "a.safetensors")
        assert kind in refused(*command, folder=tmp_path)


@pytest.mark.parametrize(
    ("count", "kind"), [(9, "inpainting"), (8, "InstructPix2Pix"), (5, "depth-to-image")]
)
def test_files_with_other_channels_are_named(tmp_path: Path, count: int, kind: str) -> None:
    write(channels(count), tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=f"{kind}.*takes {count} channels"):
        load_base(str(tmp_path / "a.safetensors"), "cpu")


def test_broken_files_are_one_line(tiny_sd15: Path, tmp_path: Path) -> None:
    file = save_original(tiny_sd15, tmp_path / "a.safetensors", "sd15")
    whole = original(tiny_sd15, "sd15")
    name = "model.diffusion_model.time_embed.0.weight"
    for broken, message in (
        ({key: each for key, each in whole.items() if key != name}, "its unet can't be loaded.*lacks"),
        (whole | {name: torch.zeros(3, 3)}, "its unet can't be loaded"),
    ):
        save_file(broken, file)
        with pytest.raises(BaseModelError, match=message) as caught:
            load_base(str(file), "cpu")
        assert "\n" not in str(caught.value)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match="can't be read"):
        load_base(str(file), "cpu")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(BaseModelError, match="isn't a .safetensors file"):
        load_base(str(tmp_path / "a.ckpt"), "cpu")


# Another VAE


def other_vae(tiny_sd15: Path, folder: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(tiny_sd15, subfolder="vae")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.1)
    vae.save_pretrained(folder)
    return vae


def test_another_vae_from_a_folder_or_a_file(tiny_sd15: Path, tmp_path: Path, photo: Path) -> None:
    vae, plain = other_vae(tiny_sd15, tmp_path / "other"), load_base(str(tiny_sd15), "cpu")
    whole = Path(shutil.copytree(tiny_sd15, tmp_path / "whole"))
    vae.save_pretrained(whole / "vae")
    save_file(original_vae(tmp_path / "other", ""), tmp_path / "original.safetensors")
    dream = save_original(tiny_sd15, tmp_path / "dream.safetensors", "sd15")
    without = {
        key: each for key, each in load_file(dream).items() if not key.startswith("first_stage_model.")
    }
    save_file(without, tmp_path / "without.safetensors")
    shutil.copytree(tmp_path / "dream", tmp_path / "without")
    expected = load_base(str(whole), "cpu")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert not torch.equal(plain.encode(pixels)[0], expected.encode(pixels)[0])
    weights = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    for base in (tiny_sd15, dream, tmp_path / "without.safetensors"):
        for place in (tmp_path / "other", whole, weights, tmp_path / "original.safetensors", whole / "vae"):
            loaded = load_base(locate_base(str(base), vae=str(place)), "cpu")
            assert loaded.fingerprint == expected.fingerprint != plain.fingerprint
            assert torch.equal(loaded.encode(pixels)[0], expected.encode(pixels)[0])
            assert torch.equal(
                loaded.decode(torch.ones(1, 4, 16, 16)), expected.decode(torch.ones(1, 4, 16, 16))
            )
    with pytest.raises(BaseModelError, match="without its VAE"):
        load_base(str(tmp_path / "without.safetensors"), "cpu")
    command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", tiny_sd15, *QUICK, "--vae")
    assert run(*command, tmp_path / "other").exit_code == 0
    edit = ("edit", tmp_path / "a.safetensors", "a fox", "-o", tmp_path / "o.png", "--base", tiny_sd15)
    assert run(*edit, "--vae", weights).exit_code == 0
    command = (*command[:3], tmp_path / "b.safetensors", *command[4:])
    assert "--vae" in refused(*command, tmp_path / "none", folder=tmp_path)
    assert "vae can't be loaded" in refused(*command, tiny_sd15 / "unet", folder=tmp_path)
    assert "vae can't be loaded" in refused(*command, tmp_path / "a.safetensors", folder=tmp_path)


def test_a_prompt_and_a_photo_leave_nothing_of_the_file_open(tiny_sd15: Path, tmp_path: Path) -> None:
    file = save_original(tiny_sd15, tmp_path / "dream.safetensors", "sd15")
    before = file.read_bytes()
    base = load_base(str(file), "cpu")
    with torch.no_grad():
        for part in base.parts.values():
            for parameter in part.parameters():
                parameter.add_(1)
    assert file.read_bytes() == before, "training in memory must not reach the file"
    assert np.isfinite(picture(base)[0])
