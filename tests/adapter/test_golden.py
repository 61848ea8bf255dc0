"""Files of every released format version, in every layout, still give the same image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden.__main__ import FOLDER, PROMPT, SETTINGS
from safetensors.torch import load_file

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.describe import describe
from lora_unitune.editing.editor import Editor
from lora_unitune.editing.start import Start

FILES = sorted(path for path in FOLDER.glob("v*-*") if "-image" not in path.name)


def test_there_is_one_of_each_layout_and_family() -> None:
    first = ("diffusers", "kohya", "peft")
    layouts = {"v1": first, "v2": (*first, "int8"), "v3": (*first, "int8")}
    assert {path.stem for path in FILES} == {
        f"{version}-{family}-{layout}"
        for version, names in layouts.items()
        for family in ("sd", "sdxl")
        for layout in names
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_golden_file_gives_its_image(request: pytest.FixtureRequest, path: Path) -> None:
    family = path.name.split("-")[1]
    editor = Editor(request.getfixturevalue({"sd": "base15", "sdxl": "basexl"}[family]))
    version = path.name.partition("-")[0]
    expected = load_file(FOLDER / f"{version}-{family}-image.safetensors")["image"].float()
    adapter = Adapter.load(path)
    assert adapter.rare_tokens == "zqrt ohwx" and adapter.date == "2026-11-23"
    image = editor.pixels(adapter, [PROMPT], "", Start(adapter.size, adapter.photo_latents), [3], SETTINGS)
    assert (image - expected).abs().max() < 2e-3
    plain = editor.pixels(None, [PROMPT], "", Start(adapter.size, adapter.photo_latents), [3], SETTINGS)
    assert (plain - expected).abs().max() > 1e-2
    assert torch.isfinite(image).all()
    assert f"v{describe(path)['format_version']}" == version


def test_versions_say_the_same_of_the_fits_they_share() -> None:
    """The files of version 1 were fitted at 32 x 32, those of later ones at 48 x 32."""
    for path in FILES:
        described = describe(path)
        lora = described["recipe"]["lora"]
        assert (lora["unet"]["rank"], lora["unet"]["alpha"]) == (2, 10.0)
        assert {each["learning_rate"] for each in lora.values()} == {4e-4, 1e-4}
        weights = (lora["unet"]["weight"], lora["text_encoder"]["weight"])
        assert weights == ((0.5, 1.0) if path.name.startswith("v3-") else (1.0, 1.0))
        assert described["size"] == ([32, 32] if path.name.startswith("v1-") else [48, 32])
