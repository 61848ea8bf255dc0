"""LoRA files of other tools on a base that they aren't for, and the names of base models."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_adapters import kohya_pair, make_adapter
from safetensors.torch import save_file

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.suits import check_fits
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import AdapterFileError
from lora_unitune.families import FAMILIES, Base

WRONG: list[tuple[str, dict[str, str], str]] = [
    ("sd", {"ss_base_model_version": "sdxl_base_v1-0"}, "for Stable Diffusion XL"),
    ("sd", {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "for Stable Diffusion XL"),
    ("sdxl", {"ss_base_model_version": "sd_v1"}, "for Stable Diffusion 1.x"),
    ("sdxl", {}, "Stable Diffusion XL"),
]


@pytest.mark.parametrize(("family", "metadata", "message"), WRONG)
def test_a_file_for_another_base_says_so(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, metadata: dict[str, str], message: str
) -> None:
    base = request.getfixturevalue({"sd": "base15", "sdxl": "basexl"}[family])
    path = tmp_path / "foreign.safetensors"
    save_file(
        kohya_pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"), path, metadata
    )
    with pytest.raises(AdapterFileError, match=message) as caught:
        check_fits(Adapter.load(path, ""), base)
    assert "fit the photo again" not in str(caught.value) and "targets" not in str(caught.value)


@pytest.mark.parametrize(
    ("width", "prediction", "names"),
    [
        (768, "", ("sd_v1", "stable-diffusion-v1")),
        (1024, "epsilon", ("sd_v2", "stable-diffusion-v2-512")),
        (1024, "v_prediction", ("sd_v2_v", "stable-diffusion-v2-768-v")),
        (1024, "", ("sd_v2", "stable-diffusion-v2")),
    ],
)
def test_a_base_is_named_by_its_width_and_prediction(
    width: int, prediction: str, names: tuple[str, str]
) -> None:
    shapes = {"unet.mid_block.attn2.to_k.lora_A.weight": (4, width)}
    assert FAMILIES["sd"].names.kind_of(shapes, prediction) == names
    assert FAMILIES["sd"].owns(shapes) and not FAMILIES["sdxl"].owns(shapes)


def test_an_sdxl_file_of_ambiguous_layers_fits_the_base_that_is_given(basexl: Base, tmp_path: Path) -> None:
    kept = {k: t for k, t in make_adapter(basexl).tensors.items() if ".attn1." in k and k.startswith("unet.")}
    path = tmp_path / "noxattn.safetensors"
    save_file(kept, path)
    editor = Editor(basexl)
    image = editor.edit(Adapter.load(path, "zqrt"), "a fox", strength=1.0, steps=2).image
    plain = editor.edit(Adapter.load(path, "zqrt"), "a fox", strength=1.0, steps=2, adapter_scale=0.0).image
    editor.release()
    assert image.tobytes() != plain.tobytes()
