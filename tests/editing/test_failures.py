"""Samples that aren't finite: refused by their seeds, and the others are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

from lora_unitune import Adapter, Edit, Editor, SettingError, read_settings
from lora_unitune.families import Base
from lora_unitune.families.sd import StableDiffusionBase


@pytest.mark.parametrize("settings", [{"residual": True}, {"details": True}, {"strength": 1.0}, {}])
def test_a_sample_that_isnt_finite_is_refused(
    editor: Editor, adapter: Adapter, settings: dict[str, Any]
) -> None:
    huge = {name: torch.full_like(tensor, 1e25) for name, tensor in adapter.tensors.items()}
    with pytest.raises(SettingError, match="image of seed 0 isn't finite; lower edit.guidance"):
        editor.edit(replace(adapter, tensors=huge), "a fox", steps=2, **settings)


def test_repeating_an_edit_that_isnt_finite_is_refused_too(editor: Editor, adapter: Adapter) -> None:
    settings = editor.edit(adapter, "a fox", steps=2).settings
    huge = replace(adapter, tensors={k: torch.full_like(t, 1e25) for k, t in adapter.tensors.items()})
    with pytest.raises(SettingError, match="image of seed 0 isn't finite"):
        editor.repeat(huge, settings | {"adapter": huge.digest})


@pytest.fixture
def second_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the second image of every batch not finite."""
    decode = StableDiffusionBase.decode

    def failing(self: StableDiffusionBase, x0: torch.Tensor) -> torch.Tensor:
        images = decode(self, x0)
        images[1:2, :, 3, 4] = torch.nan
        return images

    monkeypatch.setattr(StableDiffusionBase, "decode", failing)


@pytest.mark.parametrize("details", [True, False])
def test_the_others_of_a_batch_are_yielded_before_the_error(
    base15: Base, editor: Editor, adapter: Adapter, second_fails: None, details: bool
) -> None:
    settings: dict[str, Any] = {"steps": 2, "strength": 1.0, "details": details}
    made: list[Edit] = []
    with pytest.raises(
        SettingError, match=r"of seeds 6, 8 aren't finite \(3 of 5 are\); lower edit.guidance"
    ):
        for edit in editor.edits(adapter, "a fox", range(5, 10), batch_size=2, **settings):
            made.append(edit)
    assert [edit.settings["seed"] for edit in made] == [5, 7, 9]
    for edit in made:
        alone = editor.edit(adapter, "a fox", seed=edit.settings["seed"], **settings)
        difference = torch.tensor(list(alone.image.tobytes())) - torch.tensor(list(edit.image.tobytes()))
        assert difference.abs().max() <= 1 and alone.settings == edit.settings


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_line_saves_the_others_and_names_the_failed(
    tmp_path: Path, edit: list[str | Path], second_fails: None, as_json: bool
) -> None:
    command = (*edit, "a fox", "-o", tmp_path / "out.png", "-n", "5", "--steps", "2")
    result = run(*command, *(["--json"] if as_json else []))
    names = [f"out-{seed}.png" for seed in (0, 2, 3, 4)]
    assert result.exit_code == 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert all(read_settings(tmp_path / name)["prompt"] == "a fox" for name in names)
    line = result.stderr.splitlines()[-1]
    assert "seed 1 isn't finite (4 of 5 are); lower --guidance" in line
    assert line.endswith(f"{tmp_path / names[-1]} are written")
    if as_json:
        written = [image["path"] for image in json.loads(result.stdout)["images"]]
    else:
        written = [printed.partition(": ")[0] for printed in result.stdout.splitlines()]
    assert written == [str(tmp_path / name) for name in names]
