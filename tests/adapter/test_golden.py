"""Files of every released format version, in every layout, go on opening to the same picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden.__main__ import FOLDER, PROMPT, SETTINGS
from safetensors.torch import load_file

from lora_unitune.adapter.convert import open_adapter
from lora_unitune.editing.editor import Editor
from lora_unitune.families import PARTS

FILES = sorted(path for path in FOLDER.glob("v*-*") if "-image" not in path.name)


def test_there_is_one_of_each_layout_and_family() -> None:
    names = {path.stem.partition("-")[2] for path in FILES}
    assert names >= {f"{family}-{layout}" for family in PARTS for layout in ("diffusers", "kohya", "peft")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_golden_file_draws_its_picture(request: pytest.FixtureRequest, path: Path) -> None:
    family = path.name.split("-")[1]
    editor = Editor(request.getfixturevalue({"sd": "base15", "sdxl": "basexl"}[family]))
    version = path.name.partition("-")[0]
    expected = load_file(FOLDER / f"{version}-{family}-image.safetensors")["image"].float()
    adapter = open_adapter(path)
    assert adapter.rare_tokens == "zqrt ohwx" and adapter.date == "2026-11-23"
    image = editor.pixels(adapter, [PROMPT], "", adapter.photo_latents, [3], SETTINGS)
    assert (image - expected).abs().max() < 2e-3
    plain = editor.pixels(None, [PROMPT], "", adapter.photo_latents, [3], SETTINGS)
    assert (plain - expected).abs().max() > 1e-2
    assert torch.isfinite(image).all()
