"""Edits equal those of plain diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import saved_and_loaded
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from peft import PeftModel
from PIL import Image
from random_adapters import EDIT, make_adapter

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.convert import convert
from lora_unitune.editing.editor import Editor
from lora_unitune.editing.start import Start
from lora_unitune.families import Base, load_base
from lora_unitune.recipe import Recipe
from lora_unitune.settings import EditSettings
from lora_unitune.training.fit import fit

# Agreement with plain diffusers


def plain_pipeline(kind: Any, base: Base, folder: Path, file: Path) -> Any:
    pipeline = kind.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = base.make_scheduler(skip=int("Img2Img" in kind.__name__))
    pipeline.load_lora_weights(file)
    return pipeline


@pytest.mark.parametrize("layout", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize(
    ("negative_prompt", "size"), [("", (32, 32)), ("a red car", (32, 32)), ("", (48, 32))]
)
def test_a_plain_pipeline_gives_the_same_image(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    layout: str,
    negative_prompt: str,
    size: tuple[int, int],
) -> None:
    base, folder = request.getfixturevalue(f"base{layout[2:]}"), request.getfixturevalue(f"tiny_{layout}")
    path = tmp_path / "photo.safetensors"
    adapter = saved_and_loaded(make_adapter(base, size=size), path)
    settings = replace(EDIT, strength=1.0, guidance=5.0, guidance_rescale=0.7)
    ours = Editor(base).pixels(adapter, ["zqrt ohwx a fox"], negative_prompt, None, [3], settings)
    capfd.readouterr()
    kind = StableDiffusionXLPipeline if layout == "sdxl" else StableDiffusionPipeline
    pipeline = plain_pipeline(kind, base, folder, path)
    written = capfd.readouterr()
    noise = torch.randn((1, *base.sample_shape(size)), generator=torch.Generator().manual_seed(3))
    arguments: dict[str, Any] = {
        "prompt": "zqrt ohwx a fox",
        "negative_prompt": negative_prompt or None,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "guidance_rescale": settings.guidance_rescale,
        "width": size[0],
        "height": size[1],
        "latents": noise,
        "output_type": "pt",
    }
    theirs = pipeline(**arguments).images
    assert (ours - theirs).abs().max() <= 1e-4
    assert "lora" not in written.err.lower() and "key" not in written.err.lower()
    pipeline.unload_lora_weights()
    plain = pipeline(**arguments).images
    assert (plain - theirs).abs().max() > 1e-2, "the adapter has to matter for this test to mean anything"


def sampled(pipeline: Any, settings: EditSettings, **others: Any) -> torch.Tensor:
    """Returns what a pipeline samples with an edit's steps and guidance and the noise of seed 3."""
    images: torch.Tensor = pipeline(
        "zqrt ohwx a fox",
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **others,
    ).images
    return images


@pytest.mark.parametrize("layout", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("strength", [0.95, 0.5])
def test_a_plain_image_to_image_pipeline_gives_the_same_image(
    request: pytest.FixtureRequest, tmp_path: Path, layout: str, strength: float
) -> None:
    base, folder = request.getfixturevalue(f"base{layout[2:]}"), request.getfixturevalue(f"tiny_{layout}")
    path = tmp_path / "photo.safetensors"
    adapter = saved_and_loaded(make_adapter(base), path)
    settings = replace(EDIT, strength=strength, guidance_rescale=0.0)
    ours = Editor(base).pixels(
        adapter, ["zqrt ohwx a fox"], "", Start(adapter.size, adapter.photo_latents), [3], settings
    )
    kind = StableDiffusionXLImg2ImgPipeline if layout == "sdxl" else StableDiffusionImg2ImgPipeline
    pipeline = plain_pipeline(kind, base, folder, path)
    theirs = sampled(pipeline, settings, image=adapter.photo_latents, strength=strength)
    assert (ours - theirs).abs().max() <= 1e-4
    plain = Editor(base).pixels(
        None, ["zqrt ohwx a fox"], "", Start(adapter.size, adapter.photo_latents), [3], settings
    )
    assert (ours - plain).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_a_fit_of_any_weight_is_the_same_in_plain_pipelines_at_weight_1(
    base15: Base, tiny_sd15: Path, photo_image: Image.Image, tmp_path: Path, layout: Any
) -> None:
    quick = ["fit.steps=8", "fit.batch_size=2", "lora.unet.learning_rate=5e-2", "lora.text_encoder.rank=2"]
    weights = ["lora.unet.weight=0.3", "lora.text_encoder.weight=0.7"]
    size = ["photo.size=32x32"]
    fit(photo_image, base=base15, recipe=Recipe(), overrides=[*quick, *weights, *size]).save(
        tmp_path / "ours.safetensors"
    )
    file = tmp_path / "photo.safetensors"
    convert(tmp_path / "ours.safetensors", layout, file)
    adapter, settings = Adapter.load(file), replace(EDIT, strength=1.0, adapter_scale=1.0)
    text = f"{adapter.rare_tokens} a fox"
    ours = Editor(base15).pixels(adapter, [text], "", None, [3], settings)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = base15.make_scheduler()
    arguments: dict[str, Any] = {
        "prompt": text,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "guidance_rescale": settings.guidance_rescale,
        "output_type": "pt",
    }
    shape = (1, *base15.sample_shape((32, 32)))

    def theirs() -> torch.Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        images: torch.Tensor = pipeline(**arguments, latents=noise, width=32, height=32).images
        return images

    plain = theirs()
    if layout == "peft":
        for part in base15.parts:
            setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), file / part))
    else:
        pipeline.load_lora_weights(file)
    assert (ours - theirs()).abs().max() <= 1e-4
    assert (ours - plain).abs().max() > 1e-2, "the adapter has to matter for this test to mean anything"
    trained = Editor(base15).pixels(adapter, [text], "", None, [3], settings, trained=True)
    assert (ours - trained).abs().max() > 1e-2, "and so do its weights"


@pytest.mark.parametrize("kind", [EulerAncestralDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_other_samplers_agree_too(tiny_sd15: Path, tmp_path: Path, kind: Any, strength: float) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, use_safetensors=True)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), device="cpu")
    assert isinstance(base.make_scheduler(), kind)
    path = tmp_path / "photo.safetensors"
    adapter = saved_and_loaded(make_adapter(base), path)
    settings = replace(EDIT, strength=strength, guidance_rescale=0.0)
    start = adapter.photo_latents if strength < 1 else None
    ours = Editor(base).pixels(adapter, ["zqrt ohwx a fox"], "", Start(adapter.size, start), [3], settings)
    image_to_image = {"image": start, "strength": strength} if strength < 1 else {}
    plain = StableDiffusionImg2ImgPipeline if strength < 1 else StableDiffusionPipeline
    theirs = sampled(plain_pipeline(plain, base, tmp_path / "base", path), settings, **image_to_image)
    assert (ours - theirs).abs().max() <= 1e-4
