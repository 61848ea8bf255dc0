from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click import ClickException
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from lora_unitune.pocket import world
from lora_unitune.pocket.pretraining.assembly import build_scheduler, build_tokenizer, build_unet, rare_words
from lora_unitune.pocket.pretraining.lessons import poses_and_suns
from lora_unitune.pocket.pretraining.pretrain import earlier_unet, main, weights_of_timesteps
from lora_unitune.pocket.world.drawing import SUNS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("pretrain")
    command = ["all", str(work), "--scenes", "64", "--vae-minutes", "0.01", "--unet-minutes"]
    for minutes in ("0.05", "0.15"):
        result = CliRunner().invoke(main, [*command, minutes], catch_exceptions=False)
        assert result.exit_code == 0
    return work


def test_every_word_and_rare_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for word in [w.strip(",") for w in world.words()] + rare_words():
        ids = tokenizer(word).input_ids
        assert len(ids) == 3
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == word
    assert not set(rare_words()) & set(world.words())


def test_the_schedule_ends_in_pure_noise_and_no_timestep_is_left_out() -> None:
    alphas = build_scheduler().alphas_cumprod
    assert alphas[-1] == 0
    weights = weights_of_timesteps(torch.arange(1000), alphas)
    assert weights.max() == 1
    assert weights[-1] == 1
    assert weights.min() > 0


def test_auxiliary_labels_agree_with_the_image() -> None:
    """The label of the sun is its rendered position; every pose that occurs has a label."""
    drawn = [world.draw_scene(seed) for seed in range(300)]
    labels = poses_and_suns(drawn)
    assert len(set(labels[:, 0].tolist())) == 12
    clear = [i for i, s in enumerate(drawn) if (s.time, s.look) == ("day", "plain") and labels[i, 1] >= 0]
    assert len(clear) > 30
    for i in clear:
        picture = np.asarray(world.render(drawn[i])).astype(int)
        yellow = (picture[..., 0] > 240) & (picture[..., 2] < 130)
        shares = [yellow[4:13, int(64 * x) - 3 : int(64 * x) + 3].mean() for x in SUNS]
        assert int(np.argmax(shares)) == labels[i, 1]


def test_training_resumes(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "unet.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] > rows[-2]["step"]
    assert {"right", "none", "wrong"} <= rows[-1].keys()
    vae = [json.loads(line)["step"] for line in (trained / "vae.jsonl").read_text().splitlines()]
    assert len(vae) == len(set(vae))


def test_every_part_of_the_unet_gets_a_gradient(trained: Path) -> None:
    state = torch.load(trained / "unet.pt", weights_only=True)["muon"]
    assert len(state["state"]) == len(state["param_groups"][0]["params"])
    assert all(one["momentum"].norm() > 0 for one in state["state"].values())


def test_training_does_not_start_from_weights_of_another_depth(tmp_path: Path) -> None:
    deep = UNet2DConditionModel.from_config({**build_unet().config, "layers_per_block": 2})
    deep.save_pretrained(tmp_path / "unet")
    with pytest.raises(ClickException, match="has 2 layers per block"):
        earlier_unet(tmp_path, 1)


def test_the_export_is_a_plain_diffusers_pipeline(trained: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(trained), str(tmp_path / "base"), "--scenes", "64"])
    assert result.exit_code == 0, result.output
    assert {file.suffix for file in (tmp_path / "base").rglob("*.*") if file.is_file()} <= {
        ".json",
        ".safetensors",
        ".txt",
        ".md",
        ".jsonl",
        ".png",
    }
    further = [
        "all",
        str(tmp_path / "work"),
        "--scenes",
        "64",
        "--vae-minutes",
        "0.01",
        "--unet-minutes",
        "0.01",
    ]
    result = CliRunner().invoke(main, [*further, "--start", str(tmp_path / "base")], catch_exceptions=False)
    assert result.exit_code == 0
    learned = torch.load(tmp_path / "work" / "unet.pt", weights_only=True)
    kept = CLIPTextModel.from_pretrained(tmp_path / "base" / "text_encoder").state_dict()
    assert all(torch.equal(kept[key], tensor) for key, tensor in learned["text_encoder"].items())
    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path / "base", torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a dog", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
