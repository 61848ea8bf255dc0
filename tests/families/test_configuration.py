"""Configurations of bases: our sample is the pipeline's, or the base is refused in one line when it is loaded."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from command_line import QUICK, refused, run
from conftest import BETAS, save_pipeline
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from lora_unitune import Editor
from lora_unitune.errors import BaseModelError, SettingError, UnituneError
from lora_unitune.families import load_base

PROMPT = "a fox at night"


def with_scheduler(base: Path, folder: Path, kind: str, config: dict[str, Any]) -> Path:
    """Returns a copy of a base with a scheduler's class and configuration as a file may have them."""
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    written = {"_class_name": kind, "_diffusers_version": "0.10.0", **config}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(written))
    return folder


def changed(base: Path, folder: Path, part: str, **changes: Any) -> Path:
    """Returns a copy of a base with changes of a part's config.json."""
    shutil.copytree(base, folder)
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def difference(folder: Path, steps: int = 10, kind: Any = StableDiffusionPipeline) -> float:
    """Returns the mean difference of our picture to the pipeline's for the same noise, of 255."""
    with Editor(str(folder), device="cpu") as editor:
        settings: dict[str, Any] = {
            "guidance": 4.0,
            "guidance_rescale": 0.0,
            "strength": 1.0,
            "residual": False,
        }
        ours = np.asarray(editor.edit(None, PROMPT, seed=5, steps=steps, **settings).image) / 255.0
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        width=32,
        height=32,
    ).images[0]
    return float(np.abs(ours - theirs).mean() * 255)


SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type)
)
SUPPORTED = (
    "DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete "
    "EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM SASolver TCD UniPCMultistep"
).split()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_of_diffusers_samples_as_the_pipeline_does_or_is_refused(
    tiny_sd15: Path, tmp_path: Path, kind: str
) -> None:
    taken = inspect.signature(getattr(diffusers, kind).__init__).parameters
    config = {name: value for name, value in BETAS.items() if name in taken}
    folder = with_scheduler(tiny_sd15, tmp_path / "base", kind, config)
    try:
        assert difference(folder) < 1
    except BaseModelError as error:
        assert kind.removesuffix("Scheduler") not in SUPPORTED
        assert kind in str(error) and "\n" not in str(error)


ZERO_SNR = {"rescale_betas_zero_snr": True}
OLD = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"steps_offset": 0, "clip_sample": True, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"} | ZERO_SNR),
    ("DDIMScheduler", {"thresholding": True}),
    ("DDIMScheduler", {"prediction_type": "sample"}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDPMScheduler", {"clip_sample": True, "predict_epsilon": False}),
    ("HeunDiscreteScheduler", {"clip_sample": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 0, "set_alpha_to_one": True}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear", "use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "solver_order": 3, "euler_at_final": True}),
    ("UniPCMultistepScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("LMSDiscreteScheduler", {"num_train_timesteps": 500}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), OLD)
def test_old_configurations_are_corrected_as_the_pipeline_does(
    tiny_sd15: Path, tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    assert difference(with_scheduler(tiny_sd15, tmp_path / "base", kind, BETAS | config)) < 1


@pytest.mark.parametrize("config", [{}, {"clip_sample": True, "steps_offset": 0}])
def test_stable_diffusion_xl_corrects_nothing_as_its_pipeline(
    tiny_sdxl: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = with_scheduler(tiny_sdxl, tmp_path / "base", "DDIMScheduler", BETAS | config)
    assert difference(folder, kind=StableDiffusionXLPipeline) < 1


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("EDMEulerScheduler", {}, "an EDM model"),
        ("EDMDPMSolverMultistepScheduler", {}, "an EDM model"),
        ("FlowMatchEulerDiscreteScheduler", {}, "a flow-matching model"),
        ("UniPCMultistepScheduler", {**BETAS, **FLOW}, "a flow-matching model.*predicts the flow"),
        ("IPNDMScheduler", {}, "IPNDMScheduler"),
        (
            "EulerDiscreteScheduler",
            {**BETAS, "timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timesteps",
        ),
    ],
)
def test_schedulers_of_other_processes_are_named(
    tiny_sd15: Path, tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    folder = with_scheduler(tiny_sd15, tmp_path / "base", kind, config)
    with pytest.raises(BaseModelError, match=message):
        load_base(str(folder), "cpu")


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
def test_more_steps_than_a_scheduler_takes_are_one_line(
    tiny_sd15: Path, tmp_path: Path, photo: Path, kind: str
) -> None:
    folder, file = with_scheduler(tiny_sd15, tmp_path / "base", kind, BETAS), tmp_path / "a.safetensors"
    assert difference(folder, 4) < 1
    with (
        Editor(str(folder), device="cpu") as editor,
        pytest.raises(SettingError, match=f"steps = 60.*{kind}"),
    ):
        editor.edit(None, PROMPT, steps=60, strength=1.0, residual=False)
    assert run("fit", photo, "-o", file, "--base", folder, *QUICK).exit_code == 0
    edit = ("edit", file, PROMPT, "-o", tmp_path / "o.png", "--base", folder, "--steps", "60")
    assert "--steps 60" in refused(*edit, folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "inpainting"),
        ({"in_channels": 8}, "InstructPix2Pix"),
        ({"in_channels": 7}, "upscaler"),
        ({"in_channels": 5}, "depth-to-image"),
        ({"in_channels": 16}, "other latents"),
        ({"out_channels": 8}, "predicts more than noise"),
        ({"time_cond_proj_dim": 8}, "distilled for guidance"),
        ({"class_embed_type": "timestep"}, "unCLIP"),
        ({"num_class_embeds": 10}, "upscaler"),
        ({"cross_attention_dim": 24}, "text encoders give 16"),
    ],
)
def test_other_kinds_of_unet_are_named(
    tmp_path: Path, photo: Path, changes: dict[str, Any], message: str
) -> None:
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    folder = save_pipeline(tmp_path / "base", 15, scheduler, **changes)
    command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", folder, *QUICK)
    line = refused(*command, folder=tmp_path)
    assert message in line and next(iter(changes)) in line


def test_a_vae_that_normalizes_its_latents(tiny_sd15: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    normal = {"latents_mean": [-1.66, 1.89, -1.38, 2.52], "latents_std": [8.49, 5.9, 6.55, 5.23]}
    folder = changed(tiny_sdxl, tmp_path / "xl", "vae", **normal, scaling_factor=0.5)
    assert difference(folder, kind=StableDiffusionXLPipeline) < 1
    base = load_base(str(folder), "cpu")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    posterior = base.frozen["vae"].encode(pixels).latent_dist.mean  # type: ignore[operator]
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in normal.values())
    torch.testing.assert_close(base.encode(pixels)[0], (posterior - mean) * 0.5 / std)
    with pytest.raises(BaseModelError, match="latents_mean"):
        load_base(str(changed(tiny_sd15, tmp_path / "sd", "vae", **normal)), "cpu")
    with pytest.raises(BaseModelError, match="shift_factor"):
        load_base(str(changed(tiny_sd15, tmp_path / "shift", "vae", shift_factor=0.1)), "cpu")


def test_a_small_sample_size_of_a_very_old_file_is_an_error_for_64(tiny_sd15: Path, tmp_path: Path) -> None:
    old = changed(tiny_sd15, tmp_path / "old", "unet", _diffusers_version="0.6.0")
    assert load_base(str(old), "cpu").size == (128, 128)
    assert load_base(str(tiny_sd15), "cpu").size == (32, 32)


@pytest.mark.parametrize("change", [lambda index: index.pop("scheduler"), lambda index: index.pop("vae")])
def test_an_index_without_a_part_is_one_line(
    tiny_sd15: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    shutil.copytree(tiny_sd15, tmp_path / "base")
    path = tmp_path / "base" / "model_index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UnituneError) as caught:
        load_base(str(tmp_path / "base"), "cpu")
    assert "\n" not in str(caught.value)
