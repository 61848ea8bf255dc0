"""Earlier layers of CLIP text encoders, in A1111's count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from lora_unitune import Editor, fit
from lora_unitune.errors import SettingError
from lora_unitune.families import Base


@torch.no_grad()
def test_a_layer_goes_through_the_last_norm_as_in_diffusers(base15: Base) -> None:
    """diffusers' own `clip_skip` doesn't run with transformers 5, so its formula stands here."""
    encoder: Any = base15.parts["text_encoder"]
    states = encoder(base15.tokenize("a red fox")[0], output_hidden_states=True).hidden_states
    earlier = base15.condition("a red fox", 2)["encoder_hidden_states"]
    assert torch.equal(earlier, encoder.final_layer_norm(states[-2]))
    assert not torch.equal(earlier, base15.condition("a red fox")["encoder_hidden_states"])


@pytest.mark.parametrize(("name", "most"), [("base15", 2), ("basexl", 1)])
def test_a_layer_that_is_not_there_is_one_line(request: pytest.FixtureRequest, name: str, most: int) -> None:
    base: Base = request.getfixturevalue(name)
    base.condition("a red fox", most)
    with pytest.raises(SettingError, match="clip_skip .* has 2 layers"):
        base.condition("a red fox", most + 1)


def test_a_fit_and_its_edits_use_the_same_layer(base15: Base, photo_image: Image.Image) -> None:
    overrides = ["fit.steps=3", "edit.clip_skip=2", "edit.steps=4"]
    adapter = fit(photo_image, overrides=overrides, base=base15)
    ups = {
        key: t for key, t in adapter.tensors.items() if key.startswith("text_encoder.") and "lora_B" in key
    }
    learned = {key.split(".layers.")[1][0] for key, tensor in ups.items() if tensor.any()}
    assert learned == {"0"} and any(".layers.1." in key for key in ups)
    with Editor(base15) as editor:
        edit = editor.edit(adapter, "a fox")
        assert edit.settings["clip_skip"] == 2
        assert editor.repeat(adapter, edit.settings).image == edit.image
        assert editor.edit(adapter, "a fox", clip_skip=1).image != edit.image
