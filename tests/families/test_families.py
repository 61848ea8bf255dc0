"""Loading of bases, and the protocol that every base implements."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import at
from diffusers import StableDiffusionPipeline
from PIL import Image

from lora_unitune.errors import BaseModelError, DeviceError, RecipeError
from lora_unitune.families import FAMILIES, Base, expanded, load_base
from lora_unitune.families.loading import resolve_device
from lora_unitune.families.sd import fingerprint
from lora_unitune.photo.reading import photo_to_tensor


def pipeline_of(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(
        folder,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
    )


@pytest.fixture(params=["15", "21", "xl"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(f"base{request.param}")


def test_a_base_implements_the_protocol(base: Base) -> None:
    assert isinstance(base, Base)
    assert (
        list(base.parts) == list(base.family.parts)
        and base.family.name in FAMILIES
        and len(base.fingerprint) == 16
        and int(base.fingerprint, 16) >= 0
    )
    assert (
        base.size == (32, 32)
        and base.sample_shape() == (4, 16, 16)
        and base.sample_shape((64, 48)) == (4, 24, 32)
    )
    assert base.dtype == torch.float32 and base.device.type == "cpu"
    schedule = base.schedule()
    assert len(schedule) == 1000 and schedule.alpha.dtype == schedule.sigma.dtype == torch.float32


def test_the_modules_are_frozen_and_in_eval_mode(base: Base) -> None:
    for module in [*base.parts.values(), *base.frozen.values()]:
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(child.training for child in module.modules())


def test_the_layouts_differ_as_sd_15_and_21_do(base15: Base, base21: Base) -> None:
    predictions = (base15.schedule().prediction, base21.schedule().prediction)
    assert predictions == ("epsilon", "v_prediction")
    assert base15.fingerprint != base21.fingerprint


def test_prompt_and_unet_agree_with_a_plain_pipeline(tiny_sd15: Path, base15: Base) -> None:
    pipeline = pipeline_of(tiny_sd15)
    expected, _ = pipeline.encode_prompt("a red fox", "cpu", 1, do_classifier_free_guidance=False)
    condition = base15.condition("a red fox")
    assert base15.tokenize("a red fox")[1] == ""
    assert torch.equal(condition["encoder_hidden_states"], expected)
    latents, steps = torch.randn(2, 4, 16, 16), torch.tensor([3, 900])
    with torch.no_grad():
        plain = pipeline.unet(latents, steps, encoder_hidden_states=expected.expand(2, -1, -1)).sample
        assert torch.equal(base15.predict(latents, steps, expanded(condition, 2)), plain)


def test_photo_round_trip_is_the_vaes(tiny_sd21: Path, base21: Base, photo_image: Image.Image) -> None:
    vae = pipeline_of(tiny_sd21).vae
    pixels = photo_to_tensor(at(photo_image, 32))
    mean, std = base21.encode(pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        restored = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    assert mean.shape == std.shape == (1, 4, 16, 16)
    assert torch.equal(mean, posterior.mean * vae.config.scaling_factor)
    assert torch.allclose(std, posterior.std * vae.config.scaling_factor)
    assert torch.allclose(base21.decode(mean), restored, atol=1e-5)


def test_a_prompt_that_is_too_long_says_what_was_cut(base15: Base) -> None:
    text = "a red fox at night in the snow on a mountain with the house and beikk boat"
    ids, cut = base15.tokenize(text)
    assert ids.shape == (1, base15.tokenizer.model_max_length) and ids.dtype == torch.int64
    assert cut and text.endswith(cut)
    assert base15.tokenize(text[: -len(cut)])[1] == ""


def test_the_fingerprint_follows_the_weights_but_not_the_place_or_dtype(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    original = load_base(str(tiny_sd15), "cpu").fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd15, copy)
    assert load_base(str(copy), "cpu").fingerprint == original
    assert load_base(str(copy), "cpu", torch.bfloat16).fingerprint == original
    pipeline = pipeline_of(copy)
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    pipeline.save_pretrained(copy)
    assert load_base(str(copy), "cpu").fingerprint != original


def test_the_fingerprint_follows_the_noise_schedule_but_not_a_processors_rounding(base15: Base) -> None:
    parts, scheduler = {**base15.parts, **base15.frozen}, base15.make_scheduler()
    original = fingerprint(scheduler=scheduler, **parts)
    scheduler.alphas_cumprod *= 1 + 2**-22
    assert fingerprint(scheduler=scheduler, **parts) == original
    other = type(scheduler).from_config(scheduler.config, beta_end=0.02)
    assert fingerprint(scheduler=other, **parts) != original


def test_pockets_fingerprint_is_the_same_on_every_computer(basepocket: Base) -> None:
    assert basepocket.fingerprint == "7921d994b5434dc1"


def test_each_scheduler_is_fresh_and_has_the_bases_schedule(base15: Base, base21: Base) -> None:
    for base in (base15, base21):
        first, second = base.make_scheduler(), base.make_scheduler()
        first.set_timesteps(5)
        assert first is not second and second.num_inference_steps is None
        assert torch.equal(first.alphas_cumprod.sqrt(), base.schedule().alpha)
        assert not first.config.get("clip_sample") and first.config.steps_offset == 1
    assert type(base15.make_scheduler()).__name__ == "PNDMScheduler"
    assert type(base15.make_scheduler(skip=1)).__name__ == "DDIMScheduler", "PNDM can't start from a photo"


def test_zero_terminal_snr_reaches_the_training_schedule(tiny_sd21: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zero-snr"
    shutil.copytree(tiny_sd21, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    base = load_base(str(folder), "cpu")
    assert base.schedule().alpha[-1].abs() < 1e-3
    assert base.make_scheduler().config.timestep_spacing == "trailing"


@pytest.mark.parametrize("size", [(30, 32), (32, 33), (2, 32), (-32, 32)])
def test_a_size_the_base_cannot_take_is_refused(base15: Base, size: tuple[int, int]) -> None:
    with pytest.raises(RecipeError, match=f"photo.size = {size[0]}x{size[1]}.*multiples of 4"):
        base15.sample_shape(size)


def test_unknown_names_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="unknown base 'no such thing'"):
        load_base("no such thing", "cpu")
    with pytest.raises(BaseModelError, match="has no model_index.json"):
        load_base(str(tmp_path), "cpu")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(BaseModelError, match="can't be read"):
        load_base(str(tmp_path), "cpu")
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(BaseModelError, match="names no pipeline class"):
        load_base(str(tmp_path), "cpu")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(BaseModelError, match="FluxPipeline, which isn't supported"):
        load_base(str(tmp_path), "cpu")


def test_a_hub_id_that_cannot_be_downloaded_is_one_line() -> None:
    with pytest.raises(BaseModelError, match="can't be downloaded") as caught:
        load_base("nobody/no-such-model", "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(tiny_sd15: Path, tmp_path: Path, component: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_sd15, folder)
    shutil.rmtree(folder / component)
    with pytest.raises(BaseModelError, match=f"its {component} can't be loaded") as caught:
        load_base(str(folder), "cpu")
    assert "\n" not in str(caught.value)


def test_pickled_and_truncated_weights_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_sd15, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError, match="its unet can't be loaded"):
        load_base(str(folder), "cpu")
    weights.unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError, match="its unet can't be loaded.*safetensors"):
        load_base(str(folder), "cpu")


def test_a_component_of_another_class_is_named(tiny_sd15: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_sd15, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for component, kind in (("unet", "SanaTransformer2DModel"), ("scheduler", "NoSuchScheduler")):
        changed = index | {component: ["diffusers", kind]}
        (folder / "model_index.json").write_text(json.dumps(changed))
        with pytest.raises(BaseModelError, match=kind):
            load_base(str(folder), "cpu")


def test_loading_writes_nothing(tiny_sd15: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(str(tiny_sd15), "cpu")
    assert capfd.readouterr() == ("", "")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(DeviceError, match="'tpu' is unknown; choose one of auto, cpu, cuda, mps"):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="'cuda' isn't available"):
            resolve_device("cuda")
