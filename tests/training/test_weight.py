"""The weight of a part: it is multiplied into the saved file, and undone wherever a fit's own strength is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import QUICK, refused, run
from PIL import Image

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.compress import compress
from lora_unitune.adapter.convert import convert, strip
from lora_unitune.adapter.describe import describe
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import RecipeError
from lora_unitune.families import Base
from lora_unitune.recipe import Recipe
from lora_unitune.settings import LoraSettings
from lora_unitune.training.fit import fit

STRONG = (
    "fit.steps=8",
    "fit.batch_size=2",
    "lora.unet.learning_rate=5e-2",
    "lora.text_encoder.learning_rate=1e-2",
)
WEIGHTS = {"unet": 0.3, "text_encoder": 0.7}
WEIGHTED = tuple(f"lora.{part}.weight={weight}" for part, weight in WEIGHTS.items())
STILL = (
    "fit.steps=1",
    "fit.batch_size=1",
    "lora.unet.learning_rate=1e-12",
    "lora.text_encoder.learning_rate=1e-12",
)


def fitted(base: Base, photo: Image.Image, *overrides: str, **settings: Any) -> Adapter:
    return fit(photo, base=base, recipe=Recipe(), overrides=overrides, **settings)


def farthest(first: Image.Image, second: Image.Image) -> int:
    """The largest difference between two images, in levels of 255."""
    pixels = [np.asarray(image).astype(int) for image in (first, second)]
    return int(np.abs(pixels[0] - pixels[1]).max())


def assert_multiplied(before: Adapter, after: Adapter, factors: dict[str, float]) -> None:
    """Checks that each part's B is multiplied, to within rounding to float16, and that A is the same."""
    assert before.tensors.keys() == after.tensors.keys()
    for key, tensor in before.tensors.items():
        factor = factors[key.partition(".")[0]] if key.endswith("lora_B.weight") else 1.0
        assert torch.allclose(after.tensors[key], factor * tensor, rtol=2e-3, atol=2e-7), key


@pytest.fixture
def plain(base15: Base, photo_image: Image.Image) -> Adapter:
    return fitted(base15, photo_image, *STRONG)


@pytest.fixture
def weighted(base15: Base, photo_image: Image.Image) -> Adapter:
    return fitted(base15, photo_image, *STRONG, *WEIGHTED)


def test_the_file_holds_each_part_at_its_weight(plain: Adapter, weighted: Adapter, tmp_path: Path) -> None:
    assert_multiplied(plain, weighted, WEIGHTS)
    assert plain.history == weighted.history, "training is the same"
    assert all(plain.scale_of(part) == weighted.scale_of(part) for part in WEIGHTS)
    weighted.save(tmp_path / "photo.safetensors")
    lora = describe(tmp_path / "photo.safetensors")["recipe"]["lora"]
    assert {part: lora[part]["weight"] for part in lora} == WEIGHTS
    strip(tmp_path / "photo.safetensors", tmp_path / "bare.safetensors")
    assert Adapter.load(tmp_path / "bare.safetensors").trained_scale(1.0) == weighted.trained_scale(1.0)


def test_a_reconstruction_has_the_trained_strength_and_an_edit_that_in_the_file(
    editor: Editor, plain: Adapter, weighted: Adapter
) -> None:
    for scale in (1.0, 0.5):
        first, second = (
            editor.reconstruct(each, seed=2, steps=5, adapter_scale=scale) for each in (plain, weighted)
        )
        assert farthest(first.image, second.image) <= 2
    as_edits, full = (
        [editor.edit(each, "a fox", strength=1.0, steps=5, guidance=3.0).image for each in (plain, weighted)],
        editor.reconstruct(weighted, seed=2, steps=5),
    )
    assert farthest(*as_edits) > 10, "the weights have to matter for this test to mean anything"
    again = editor.repeat(weighted, full.settings)
    assert again.image.tobytes() == full.image.tobytes()
    nothing = editor.reconstruct(weighted, seed=2, steps=5, adapter_scale=0.0)
    assert farthest(nothing.image, full.image) > 2
    assert farthest(nothing.image, editor.reconstruct(plain, seed=2, steps=5, adapter_scale=0.0).image) == 0


def test_one_weight_for_all_parts_is_a_lower_adapter_scale(
    base15: Base, photo_image: Image.Image, editor: Editor, plain: Adapter
) -> None:
    weak = fitted(base15, photo_image, *STRONG, "lora.unet.weight=0.3", "lora.text_encoder.weight=0.3")
    settings = {"strength": 1.0, "steps": 5, "guidance": 3.0}
    first = editor.edit(plain, "a fox", adapter_scale=0.3, **settings)
    assert farthest(first.image, editor.edit(weak, "a fox", adapter_scale=1.0, **settings).image) <= 2


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft", "int8"])
@pytest.mark.parametrize("new", [(), ("lora.unet.weight=0.6", "lora.text_encoder.weight=0.35")])
def test_a_fit_continues_from_the_trained_strength_with_its_own_weights(
    base15: Base,
    photo_image: Image.Image,
    plain: Adapter,
    weighted: Adapter,
    tmp_path: Path,
    layout: Any,
    new: Sequence[str],
) -> None:
    path = tmp_path / "first.safetensors"
    if layout == "int8":
        weighted = compress(weighted, eight_bit=True).adapter
        weighted.save(path, dtype=torch.int8)
    else:
        weighted.save(tmp_path / "ours.safetensors")
        convert(tmp_path / "ours.safetensors", layout, path)
    start = Adapter.load(path)
    assert start.digest == weighted.digest
    continued = fitted(base15, photo_image, *STILL, *new, start=start)
    weights = {part: settings.weight for part, settings in continued.recipe.lora.items()}
    assert weights == ({"unet": 0.6, "text_encoder": 0.35} if new else {"unet": 1.0, "text_encoder": 1.0})
    assert_multiplied(weighted, continued, {part: weights[part] / WEIGHTS[part] for part in weights})
    if layout != "int8":
        from_plain = fitted(base15, photo_image, *STILL, start=plain)
        assert continued.history[0] == pytest.approx(from_plain.history[0], rel=1e-3)
        unchanged = fitted(base15, photo_image, *STILL, start=start, embed_photo=False).history[0]
        assert continued.history[0] == unchanged, "the loss doesn't depend on the weights"


def test_compression_keeps_the_strength(editor: Editor, plain: Adapter, weighted: Adapter) -> None:
    small = compress(weighted, keep=1.0).adapter
    assert small.trained_scale(1.0) == weighted.trained_scale(1.0)
    first, second = (editor.reconstruct(each, steps=5).image for each in (plain, small))
    assert farthest(first, second) <= 4


def test_all_weights_of_the_model_are_saved_as_trained(
    base15: Base, photo_image: Image.Image, editor: Editor
) -> None:
    quick = ("fit.method=full", "fit.steps=2", "fit.batch_size=1")
    first, second = fitted(base15, photo_image, *quick), fitted(base15, photo_image, *quick, *WEIGHTED)
    assert all(torch.equal(second.tensors[key], tensor) for key, tensor in first.tensors.items())
    images = [editor.reconstruct(each, steps=2).image for each in (first, second)]
    assert images[0].tobytes() == images[1].tobytes()


@pytest.mark.parametrize("weight", ["0", "-1", "4.5", "nan", "inf", "strong", "true"])
def test_other_weights_are_refused(weight: str) -> None:
    with pytest.raises(RecipeError, match=r"lora.unet.weight = .*give a number above 0 and up to 4"):
        Recipe(lora={"unet": LoraSettings(2)}).override([f"lora.unet.weight={weight}"])


def test_a_weight_on_the_command_line(photo: Path, tiny_sd15: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    command = ["fit", photo, "--base", tiny_sd15, *QUICK]
    message = refused(*command, "-o", first, "--set", "lora.unet.weight=0", folder=tmp_path)
    assert "--set lora.unet.weight=0" in message and "above 0 and up to 4" in message
    assert run(*command, "-o", first, "--set", "lora.unet.weight=0.3").exit_code == 0
    assert "weight = 0.3" in run("inspect", first).stdout
    more = run(*command, "-o", second, "--from", first, "--set", "lora.unet.weight=0.5")
    assert more.exit_code == 0, more.output
    assert Adapter.load(second).recipe.lora["unet"].weight == 0.5
