"""Pocket: plain diffusers loads it, a fit and an edit work end to end, and it knows what it can't draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights_of
from diffusers import StableDiffusionPipeline

from lora_unitune import Adapter, Editor, fit
from lora_unitune.editing.sampling import doubt
from lora_unitune.editing.score import psnr
from lora_unitune.editing.start import starting_point
from lora_unitune.families import POCKET_FOLDER
from lora_unitune.photo.details import doubted_pixels
from lora_unitune.pocket import world
from lora_unitune.pocket.pretraining.assembly import rare_words
from lora_unitune.recipe import EditSettings
from lora_unitune.training.rare_tokens import rank_rare_tokens

SCENE = 3  # of the held-out split


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor("pocket", device="cpu")


@pytest.fixture(scope="module")
def adapter(editor: Editor) -> Adapter:
    """A fit with the default recipe, of a held-out scene."""
    before = weights_of(editor.base)
    fitted = fit(world.render(world.draw_scene(SCENE, "held-out")), base=editor.base, seed=1)
    after = weights_of(editor.base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return fitted


@pytest.fixture(scope="module")
def file(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pocket") / "photo.safetensors"
    adapter.save(path)
    return path


def test_the_weights_are_small_and_never_pickles() -> None:
    files = [file for file in POCKET_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt", ".md", ".jsonl", ".png"}
    assert "commit" in (POCKET_FOLDER / "PROVENANCE.md").read_text()


def test_a_fit_reconstructs_its_photo_from_noise(editor: Editor, adapter: Adapter) -> None:
    photo = editor.photo_round_trip(adapter)
    before = psnr(editor.reconstruct(adapter, seed=5, adapter_scale=0.0).image, photo)
    after = psnr(editor.reconstruct(adapter, seed=5).image, photo)
    assert after >= 20 > before


def test_the_file_is_small(file: Path) -> None:
    assert file.stat().st_size <= 300_000


def test_saving_and_loading_changes_no_output(editor: Editor, adapter: Adapter, file: Path) -> None:
    fitted = editor.edit(adapter, "a fox at night", seed=2, steps=3).image
    assert (
        editor.edit(Adapter.load(file), "a fox at night", seed=2, steps=3).image.tobytes() == fitted.tobytes()
    )


def test_plain_diffusers_samples_the_same(editor: Editor, adapter: Adapter, file: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        POCKET_FOLDER, use_safetensors=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(file)
    text = f"{adapter.rare_tokens} a fox at night"
    noise = torch.randn((1, *editor.base.sample_shape()), generator=torch.Generator().manual_seed(7))
    drawn = pipeline(
        text, latents=noise, num_inference_steps=6, guidance_scale=5.0, guidance_rescale=0.7, output_type="np"
    ).images[0]
    settings = EditSettings(steps=6, guidance=5.0, guidance_rescale=0.7, strength=1.0)
    ours = editor.pixels(adapter, [text], "", None, [7], settings)[0].permute(1, 2, 0).numpy()
    assert np.abs(drawn - ours).max() <= 1e-4


@pytest.mark.parametrize("thing", ["owl", "snail"])
def test_an_object_that_pocket_never_saw_keeps_its_own_pixels(editor: Editor, thing: str) -> None:
    scene = replace(world.draw_scene(SCENE, "held-out"), object=thing, colour="", companion="")
    photo, inside = world.render(scene), world.object_mask(scene)
    settings = EditSettings(steps=6, guidance=2.0, strength=1.0, residual=True, details=True)
    start = starting_point(editor.base, None, photo, settings)
    assert start.photo is not None and start.pixels is not None
    with torch.no_grad():
        doubted = doubt(editor.base, start.size, start.photo, editor.base.condition(""))
    restored = doubted_pixels(start.pixels, doubted)[0, 0].numpy()
    assert restored[inside].mean() > 0.5 and restored[~inside].mean() < 0.1

    def error(details: bool) -> float:
        """How far the object in an unedited redraw is from the photo's."""
        chosen = replace(settings, details=details)
        image = editor.pixels(None, [""], "", start, [2], chosen)
        return float((image - start.pixels)[0].abs().mean(0).numpy()[inside].mean())

    assert error(details=True) < 0.5 * error(details=False)


def test_rare_tokens_are_not_words_of_a_caption(editor: Editor) -> None:
    assert set(rank_rare_tokens(editor.base.vocabulary(), limit=10)) <= set(rare_words())
