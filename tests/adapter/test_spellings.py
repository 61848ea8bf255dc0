"""LoRA files of other tools: every spelling opens, with the change that diffusers' own loader makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from random_adapters import EVERYTHING, KOHYA_LAYER, LORA, kohya_pair, make_adapter
from safetensors.torch import save_file
from torch import Tensor

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.describe import describe
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.adapter.spelling import split
from lora_unitune.adapter.suits import check_fits
from lora_unitune.editing.editor import Editor
from lora_unitune.errors import AdapterFileError
from lora_unitune.families import FAMILIES, Base

Tensors = dict[str, Tensor]


def changes(tensors: Mapping[str, Tensor], scale: Callable[[str], float] = lambda layer: 1.0) -> Tensors:
    """Returns each layer's change of its weights, flattened to a matrix."""
    layers = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        layer: scale(layer)
        * tensors[f"{layer}.lora_B.weight"].float().flatten(1)
        @ tensors[f"{layer}.lora_A.weight"].float().flatten(1)
        for layer in layers
    }


def ours(path: Path) -> Tensors:
    adapter = Adapter.load(path, "")
    return changes(adapter.tensors, lambda layer: adapter.scale_of(layer.partition(".")[0]))


def diffusers_changes(folder: Path, path: Path) -> Tensors:
    """Returns the changes that a plain pipeline makes with a file."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.load_lora_weights(path)
    result: Tensors = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, layer in getattr(pipeline, part, torch.nn.Module()).named_modules():
            for adapter, a in getattr(layer, "lora_A", {}).items() if isinstance(layer, LoraLayer) else ():
                b: Any = layer.lora_B[adapter]
                product = b.weight.detach().flatten(1) @ a.weight.detach().flatten(1)
                result[f"{part}.{name}"] = layer.scaling[adapter] * product
    return result


def assert_same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys() and first
    for layer, change in first.items():
        assert torch.allclose(change, second[layer], atol=1e-5, rtol=1e-4), layer


def respelled(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def spell(key: str) -> str:
        for pattern, replacement in pairs:
            key = re.sub(pattern, replacement, key)
        return key

    return spell


SIDES = ((r"\.lora_A\.", ".lora.down."), (r"\.lora_B\.", ".lora.up."))
LINEAR = (
    (r"^(text.*)\.lora_A\.", r"\1.lora_linear_layer.down."),
    (r"^(text.*)\.lora_B\.", r"\1.lora_linear_layer.up."),
)
OLD = (
    (r"\.(to_[qkv]|to_out)(\.0)?\.lora_A\.", r".processor.\1_lora.down."),
    (r"\.(to_[qkv]|to_out)(\.0)?\.lora_B\.", r".processor.\1_lora.up."),
    (r"\.(q|k|v|out)_proj\.lora_A\.", r".to_\1_lora.down."),
    (r"\.(q|k|v|out)_proj\.lora_B\.", r".to_\1_lora.up."),
)
INNER = (r"^text_encoder\.encoder", "text_encoder.text_model.encoder")
BARE = ((r"^unet\.", ""), (r"^text_encoder\.", "text_model."))


def kohya(prefix: str) -> Callable[[str], str]:
    def spell(key: str) -> str:
        layer, side, _ = key.rsplit(".", 2)
        name = FAMILIES["sd"].names.to_kohya(layer, "unet").replace("lora_te_", prefix)
        return f"{name}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"

    return spell


SPELLINGS: dict[str, tuple[Callable[[str], str], bool]] = {
    "peft": (respelled(), True),
    "diffusers' training scripts": (respelled(*LINEAR, *SIDES), True),
    "the same with text_model": (respelled(INNER, *LINEAR, *SIDES), True),
    "attention processors of 2023": (respelled(*OLD), True),
    "the same without prefixes": (respelled(*BARE, *OLD), False),
    "kohya": (kohya("lora_te_"), True),
    "kohya, with SDXL's name of the encoder": (kohya("lora_te1_"), True),
    "kohya, without text_model": (respelled((r"te_text_model_", "te_")), True),
    "raw peft": (respelled(*BARE, (r"^", "base_model.model.")), False),
    "peft with an adapter's name": (respelled((r"(lora_[AB])", r"\1.default")), False),
    "comfyui": (
        respelled(
            (r"^unet", "diffusion_model"), (r"^text_encoder", "text_encoders.clip_l.transformer.text_model")
        ),
        False,
    ),
    "onetrainer": (
        respelled((r"^unet", "lora_unet"), (r"^text_encoder", "clip_l.text_model"), *SIDES),
        False,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_opens_with_the_same_change(
    base15: Base, tiny_sd15: Path, tmp_path: Path, name: str
) -> None:
    spell, diffusers_opens = SPELLINGS[name]
    made = make_adapter(base15, LORA)
    tensors = made.tensors
    if "kohya, without" in name:
        tensors = {kohya("lora_te_")(key): tensor for key, tensor in tensors.items()}
    path = tmp_path / "foreign.safetensors"
    save_file({spell(key): tensor for key, tensor in tensors.items()}, path)
    assert_same(ours(path), changes(made.tensors))
    if diffusers_opens:
        assert_same(ours(path), diffusers_changes(tiny_sd15, path))
    check_fits(Adapter.load(path, ""), base15)


@pytest.mark.parametrize("start", ["diffusion_model.", "", "lora_unet_"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_original_codes_names_are_read(family: str, start: str) -> None:
    """As ComfyUI, OneTrainer and kohya's scripts for SDXL name blocks; SD 1.x has its own four levels."""
    names, between = FAMILIES[family].names, "_" if start.endswith("_") else "."
    for ours, theirs in names.blocks.items():
        inside = names.block_parts if ".resnets." in ours else {}
        inside = {"proj_in": "proj_in"} if ".attentions." in ours else inside
        for module, name in inside.items() if inside else [("", "")]:
            path = (
                start + theirs.replace(".", between) + (between + name.replace(".", between) if name else "")
            )
            assert names.layer(path, "unet") == ".".join(filter(None, ["unet", ours, module]))


@pytest.mark.parametrize("start", ["lora_te2_", "text_encoders.clip_g.transformer.", "text_encoder_2."])
def test_the_second_text_encoders_projection_is_read(start: str) -> None:
    assert FAMILIES["sdxl"].names.layer(f"{start}text_projection", "unet") == "text_encoder_2.text_projection"


def test_sdxl_files_of_original_names_open_as_diffusers_opens_them(
    basexl: Base, tiny_sdxl: Path, tmp_path: Path
) -> None:
    made, path, names = make_adapter(basexl, LORA), tmp_path / "xl.safetensors", FAMILIES["sdxl"].names
    tensors = {}
    for key, tensor in made.tensors.items():
        layer, side, _ = key.rsplit(".", 2)
        tensors[f"{names.to_kohya(layer, 'unet')}.lora_{'down' if side[-1] == 'A' else 'up'}.weight"] = tensor
    save_file(tensors, path)
    assert_same(ours(path), changes(made.tensors))
    assert_same(ours(path), diffusers_changes(tiny_sdxl, path))


OURS = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV, OUR_CONV = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_any_float_weights_open(tmp_path: Path, tiny_sd15: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in kohya_pair().items()}, path)
    rounded = changes(
        {f"{OURS}.lora_{'AB'['up' in k]}.weight": t.to(dtype).float() for k, t in pair_of(path).items()}
    )
    assert_same(ours(path), rounded)
    if dtype.itemsize > 1:  # products of fp8 need another device
        assert ours(path).keys() == diffusers_changes(tiny_sd15, path).keys()


def pair_of(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("value", [4, 2, 0, -2, 0.5])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_any_number_is_an_alpha(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    alpha = torch.tensor(value).to(dtype)
    if float(alpha) != value:
        alpha = torch.tensor([[value]], dtype=torch.float32)  # one that the dtype can't hold: another shape
    path, tensors = tmp_path / "foreign.safetensors", kohya_pair()
    save_file({**tensors, f"{KOHYA_LAYER}.alpha": alpha}, path)
    (change,) = changes({f"{OURS}.lora_{'AB'['up' in k]}.weight": t for k, t in tensors.items()}).values()
    assert_same(ours(path), {OURS: change * value / 4})


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (8.0, 8.0), (0.0, 4.0), (1.0, 8.0)])
def test_each_layer_has_its_own_alpha(tiny_sd15: Path, tmp_path: Path, alphas: tuple[float, float]) -> None:
    """diffusers takes one for all layers of a kohya file, so it is compared only where they are equal."""
    path, layers = tmp_path / "foreign.safetensors", (KOHYA_LAYER, KOHYA_LAYER.replace("to_q", "to_v"))
    tensors = kohya_pair(layers[0]) | kohya_pair(layers[1])
    numbers = {f"{layer}.alpha": torch.tensor(a) for layer, a in zip(layers, alphas, strict=True)}
    save_file(tensors | numbers, path)
    expected = {
        OURS[:-1] + layer[-1]: a
        / 4
        * tensors[f"{layer}.lora_up.weight"]
        @ tensors[f"{layer}.lora_down.weight"]
        for layer, a in zip(layers, alphas, strict=True)
    }
    assert_same(ours(path), expected)
    if alphas[0] == alphas[1]:
        assert_same(ours(path), diffusers_changes(tiny_sd15, path))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_file_of_one_part_opens_and_fits(base15: Base, editor: Editor, tmp_path: Path, part: str) -> None:
    tensors = {k: t for k, t in make_adapter(base15).tensors.items() if k.startswith(f"{part}.")}
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, path)
    adapter = Adapter.load(path, "")
    assert [name for name, each in adapter.recipe.lora.items() if each.rank] == [part]
    assert editor.edit(adapter, "a fox", strength=1.0, steps=2).prompt == "a fox"
    for layout in ("kohya", "diffusers"):
        adapter.save(tmp_path / f"{layout}.safetensors", dtype=torch.float32, layout=layout)  # type: ignore[arg-type]
        assert_same(ours(tmp_path / f"{layout}.safetensors"), changes(tensors))


def test_convolutions_as_matrices_and_linear_layers_as_convolutions_are_used(
    base15: Base, tmp_path: Path
) -> None:
    made = make_adapter(base15, EVERYTHING)
    flat = {
        key: tensor.flatten(1) if tensor.ndim == 4 else tensor[:, :, None, None]
        for key, tensor in made.tensors.items()
    }
    path, mount = tmp_path / "foreign.safetensors", Mount(base15)
    save_file(flat, path)
    condition = base15.condition("a fox")
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([300]), condition
    predictions = []
    for adapter in (made, Adapter.load(path, "")):
        mount.use(adapter, {part: 1 / adapter.scale_of(part) for part in adapter.recipe.lora})
        predictions.append(base15.predict(*inputs))
    mount.release()
    assert (predictions[0] - predictions[1]).abs().max() < 1e-5
    assert (predictions[0] - base15.predict(*inputs)).abs().max() > 1e-3


def test_factors_that_are_exactly_a_lora_are_one(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    down, mid, up = torch.randn(3, 32, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(32, 3, 1, 1)
    locon = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    save_file({f"{CONV}.{k}.weight": t for k, t in locon.items()} | {f"{CONV}.alpha": torch.tensor(6)}, path)
    photo = torch.randn(1, 32, 8, 8)
    conv = torch.nn.functional.conv2d
    expected = 2 * conv(conv(conv(photo, down), mid, padding=1), up)
    assert torch.allclose(
        conv(photo, ours(path)[OUR_CONV].view(32, 32, 3, 3), padding=1), expected, atol=1e-3
    )
    a1, b1, a2, b2 = (torch.randn(shape) for shape in ((32, 3), (3, 32), (32, 2), (2, 32)))
    loha = {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2}
    save_file(
        {f"{KOHYA_LAYER}.hada_{k}": t for k, t in loha.items()} | {f"{KOHYA_LAYER}.alpha": torch.tensor(1.5)},
        path,
    )
    assert_same(ours(path), {OURS: (a1 @ b1) * (a2 @ b2) / 2})
    cores = [torch.randn(3, 3, 3, 3) for _ in range(2)]
    a1, b1, a2, b2 = (torch.randn(3, 32) for _ in range(4))
    tucker = {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2, "t1": cores[0], "t2": cores[1]}
    save_file({f"{CONV}.hada_{k}": t for k, t in tucker.items()}, path)
    rebuilt = [
        torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, a, b in zip(cores, (a1, a2), (b1, b2), strict=True)
    ]
    assert_same(ours(path), {OUR_CONV: (rebuilt[0] * rebuilt[1]).flatten(1)})
    a1, a2 = (torch.randn(32, 2, 1, 1) for _ in range(2))
    b1, b2 = (torch.randn(2, 32, 3, 3) for _ in range(2))
    four = {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2}  # as OneTrainer stores convolutions
    save_file({f"{CONV}.hada_{k}": t for k, t in four.items()}, path)
    rebuilt = [a.flatten(1) @ b.flatten(1) for a, b in ((a1, b1), (a2, b2))]
    assert_same(ours(path), {OUR_CONV: rebuilt[0] * rebuilt[1]})


def test_a_loha_whose_rank_is_too_high_as_a_lora_is_refused_with_both_ranks(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    for rank in (32, 33):
        shapes = {"w1_a": (32, rank), "w1_b": (rank, 32), "w2_a": (32, rank), "w2_b": (rank, 32)}
        save_file({f"{KOHYA_LAYER}.hada_{k}": torch.ones(shape) for k, shape in shapes.items()}, path)
        if rank == 32:
            assert Adapter.load(path, "").recipe.lora["unet"].rank == 1024
            continue
        with pytest.raises(
            AdapterFileError, match="LoHa of rank 33, .* a LoRA of rank 1089, .* rank 32 or lower"
        ):
            Adapter.load(path, "")


OTHERS: dict[str, tuple[str, str]] = {
    "LoKr": (f"{KOHYA_LAYER}.lokr_w1", "LoKr"),
    "SimpleTuner's LoKr": (f"{KOHYA_LAYER.replace('lora_unet', 'lycoris')}.lokr_w2_a", "LoKr"),
    "OFT": (f"{KOHYA_LAYER}.oft_blocks", "OFT"),
    "diag-OFT of lycoris": (f"{KOHYA_LAYER}.oft_diag", "OFT"),
    "BOFT": (f"{OURS}.boft_R", "OFT"),
    "GLoRA": (f"{KOHYA_LAYER}.a1.weight", "GLoRA"),
    "IA3": (f"{KOHYA_LAYER}.on_input", "IA3"),
    "norms": ("lora_unet_mid_block_resnets_0_norm1.w_norm", "norms"),
    "differences": (f"{KOHYA_LAYER}.diff", "whole weight differences"),
    "biases": (f"{OURS}.lora_B.bias", "biases"),
    "textual inversion": ("emb_params", "textual inversion"),
    "FLUX": ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "FLUX"),
    "SD 3": ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "Stable Diffusion 3"),
    "Wan": ("diffusion_model.blocks.0.cross_attn.q.lora_A.weight", "doesn't have"),
    "Z-Image": ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "doesn't have"),
    "ControlNet": ("control_model.input_blocks.0.0.weight", "ControlNet"),
    "a whole model": ("model.diffusion_model.out.2.weight", "whole model"),
    "cloneofsimo's": ("lora_unet:0:up", "cloneofsimo"),
    "AdaLoRA": (f"base_model.model.{OURS}.lora_E", "AdaLoRA"),
    "MiSS of peft": (f"base_model.model.{OURS}.miss_block", "another kind of PEFT's"),
    "norms of peft": ("base_model.model.mid_block.resnets.0.norm1.ln_tuning_layers.bias", "another kind"),
    "layers that peft stores whole": ("base_model.model.conv_in.weight", "whole weights"),
    "biases of the base": ("unet.conv_in.bias", "whole weights"),
    "ControlNet-LLLite": ("lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight", "ControlNet"),
    "IP-Adapter": ("image_proj.norm.weight", "IP-Adapter"),
    "AnimateDiff": ("down_blocks.0.motion_modules.0.proj_in.lora_A.weight", "motion module"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str) -> None:
    key, title = OTHERS[name]
    path = tmp_path / "foreign.safetensors"
    save_file({**kohya_pair(), key: torch.randn(4, 4)}, path)
    for read in (lambda: Adapter.load(path, ""), lambda: describe(path)):
        with pytest.raises(AdapterFileError, match=title) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_embeddings_beside_a_lora_are_skipped_with_a_note(
    base15: Base, editor: Editor, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({**kohya_pair(), "bundle_emb.style.clip_l": torch.randn(2, 16)}, path)
    adapter = Adapter.load(path, "")
    assert len(adapter.tensors) == 2 and "bundle_emb" in adapter.notes[0]
    assert "bundle_emb" in " ".join(editor.edit(adapter, "a fox", strength=1.0, steps=2).notes)


def test_a_header_that_says_dora_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    entry = json.dumps({"unet.r": 4, "unet.lora_alpha": 4, "unet.use_dora": True})
    save_file(kohya_pair(), path, {"lora_adapter_metadata": entry})
    with pytest.raises(AdapterFileError, match="DoRA"):
        Adapter.load(path, "")


def test_one_key_has_one_reading() -> None:
    for end, what in {
        "lora_A.weight": "lora_A.weight",
        "lora_down.weight": "lora_A.weight",
        "lora.up.weight": "lora_B.weight",
        "lora_linear_layer.down.weight": "lora_A.weight",
        "lora_B.default_0.weight": "lora_B.weight",
        "lora_A": "lora_A.weight",
        "lora_mid.weight": "lora_mid.weight",
        "alpha": "alpha",
        "lora.down.weight.alpha": "alpha",
    }.items():
        assert split(f"unet.x.{end}") == ("unet.x", what)
        assert split(f"base_model.model.x.{end}") == ("x", what)
    assert split("unet.x.weight") is None and split("unet.x.lora_B.bias") is None
