"""The command line: error messages."""

from __future__ import annotations

import io
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import QUICK, refused, run
from conftest import room_for
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

# Photos, bases, settings and places.


def no_image(path: Path) -> None:
    path.write_text("not an image")


def cut_off(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def bomb(path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(content))


def tiny(path: Path) -> None:
    Image.new("RGB", (9, 9)).save(path, "PNG")


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (no_image, "isn't an image"),
        (cut_off, "damaged or incomplete"),
        (bomb, "million pixels"),
        (tiny, "give a larger photo"),
        (nothing, "doesn't exist"),
    ],
)
def test_bad_photos(tmp_path: Path, tiny_sd15: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "bad")
    arguments = ("fit", tmp_path / "bad", "-o", tmp_path / "a.safetensors", "--base", tiny_sd15, *QUICK)
    assert message in refused(*arguments, folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "fit.stepz=3"], "did you mean 'steps'"),
        (["--set", "fit.steps=0"], "--set fit.steps=0 isn't allowed; give a whole number from 1"),
        (["--set", "prompt.rare_tokens=é€"], "rare token"),
        (["--set", "lora.unet.targets=to_nowhere"], "to_nowhere"),
        (["--set", "fit.optimizer=adamx"], "adamx"),
        (["--set", "photo.size=33x33"], "--set photo.size=33x33"),
        (["--recipe", "sd15/7gb"], "unknown recipe"),
        (["--recipe", "none.toml"], "doesn't exist"),
        (["--seed", str(2**63)], f"--seed {2**63} isn't allowed"),
        (["--base", "no such base"], "unknown base"),
    ],
)
def test_bad_settings_of_a_fit(
    tmp_path: Path, tiny_sd15: Path, photo: Path, arguments: list[str], message: str
) -> None:
    command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", tiny_sd15, *QUICK, *arguments)
    assert message in refused(*command, folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "tpu"),
        (["--method", "half"], "half"),
        (["--seed", "-1"], "-1"),
        (["--tokens", "zqrt"], "No such option"),
    ],
)
def test_wrong_options_of_a_fit(tmp_path: Path, photo: Path, arguments: list[str], message: str) -> None:
    command = ("fit", photo, "-o", tmp_path / "a.safetensors", *arguments)
    assert message in refused(*command, folder=tmp_path, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    command = (
        "fit",
        photo,
        "-o",
        tmp_path / "a.safetensors",
        "--base",
        tiny_sd15,
        *QUICK,
        "--device",
        "cuda",
    )
    assert "cuda" in refused(*command, folder=tmp_path)


def test_folders_that_are_no_base(tmp_path: Path, photo: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name, message in (("empty", "model_index.json"), ("other", "FluxPipeline"), ("broken", "broken")):
        command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", tmp_path / name)
        assert message in refused(*command, folder=tmp_path)


def test_a_hub_id_without_a_network_is_one_line(tmp_path: Path, photo: Path) -> None:
    command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", "nobody/nothing-of-this-name")
    assert "nobody/nothing-of-this-name" in refused(*command, folder=tmp_path)


def test_outputs_that_cannot_be_written(
    tmp_path: Path, tiny_sd15: Path, edit: list[str | Path], photo: Path, adapter_file: Path
) -> None:
    fit = ("fit", photo, "--base", tiny_sd15, *QUICK)
    assert "--overwrite" in refused(*fit, "-o", adapter_file, folder=tmp_path)
    assert "none doesn't exist" in refused(*fit, "-o", tmp_path / "none" / "a.safetensors", folder=tmp_path)
    assert "isn't a file" in refused(*fit, "-o", tmp_path, folder=tmp_path)
    edit = (*edit, "a fox")
    (tmp_path / "out-1.png").write_bytes(b"mine")
    assert "--overwrite" in refused(*edit, "-o", tmp_path / "out.png", "-n", "2", folder=tmp_path)
    assert "end in .png" in refused(*edit, "-o", tmp_path / "out.gif", folder=tmp_path, code=2)
    assert "none doesn't exist" in refused(*edit, "-o", tmp_path / "none" / "out.png", folder=tmp_path)
    assert run(*edit, "-o", tmp_path / "out-1.png", "--overwrite").exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path, tiny_sd15: Path, photo: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    command = ("fit", photo, "-o", tmp_path / "locked" / "a.safetensors", "--base", tiny_sd15, *QUICK)
    assert "read-only" in refused(*command, folder=tmp_path)


def test_no_disk_space(
    tmp_path: Path,
    tiny_sd15: Path,
    edit: list[str | Path],
    photo: Path,
) -> None:
    with room_for(1000):
        command = ("fit", photo, "-o", tmp_path / "a.safetensors", "--base", tiny_sd15, *QUICK)
        assert "can't be written" in refused(*command, folder=tmp_path)
        command = (*edit, "a fox", "-o", tmp_path / "out.png")
        assert "can't be written" in refused(*command, folder=tmp_path)
        command = (*edit, "a fox", "-o", tmp_path / "out.png", "-n", "2")
        assert "can't be written" in refused(*command, folder=tmp_path)


# Adapter files and edits.


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Changes the tensors or the header of an adapter file."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def one_key(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(key for key in tensors if key.startswith("unet.") and key.endswith("lora_A.weight"))[0]


def missing(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del tensors[one_key(tensors)]


def whole_module_missing(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    key = one_key(tensors)
    del tensors[key], tensors[key.replace("lora_A", "lora_B")]


def surplus(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["unet.surplus.lora_A.weight"] = torch.zeros(8, 4)


def wrong_shape(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors[one_key(tensors)] = torch.zeros(8, 5)


def not_finite(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors[one_key(tensors)][0, 0] = float("nan")


def without_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del metadata["lora_unitune"], metadata["modelspec.trigger_phrase"]


def from_the_future(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["lora_unitune"] = json.dumps({**json.loads(metadata["lora_unitune"]), "format_version": 99})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "lora_A"),
        (whole_module_missing, "lora_A"),
        (surplus, "surplus"),
        (wrong_shape, "shape"),
        (not_finite, "finite"),
        (without_header, "--trigger"),
        (from_the_future, "99"),
    ],
)
def test_bad_adapter_files(
    tmp_path: Path,
    adapter_file: Path,
    change: Callable[[dict, dict], None],
    message: str,
    edit: list[str | Path],
) -> None:
    rewrite(adapter_file, change)
    assert message in refused(*edit, "a fox", "-o", tmp_path / "out.png", folder=tmp_path)


def test_files_that_are_no_adapter(tmp_path: Path, adapter_file: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "opened"),)

    pickled, zipped, cut = tmp_path / "a.bin", tmp_path / "a.pt", tmp_path / "cut.safetensors"
    pickled.write_bytes(pickle.dumps(Bad()))
    torch.save({"weight": torch.zeros(2)}, zipped)
    cut.write_bytes(adapter_file.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (
        ("a.bin", "pickle"),
        ("a.pt", "pickle"),
        ("cut.safetensors", "incomplete"),
        ("text.safetensors", "isn't a complete adapter file"),
        ("none.safetensors", "doesn't exist"),
    ):
        assert message in refused("inspect", tmp_path / name, folder=tmp_path)
        assert message in refused(
            "edit", tmp_path / name, "a fox", "-o", tmp_path / "out.png", folder=tmp_path
        )


def test_a_base_that_only_the_file_names_is_not_loaded(tmp_path: Path, adapter_file: Path) -> None:
    line = refused("edit", adapter_file, "a fox", "-o", tmp_path / "out.png", folder=tmp_path)
    assert "--base" in line


def test_an_adapter_made_for_another_base(tmp_path: Path, adapter_file: Path, tiny_sd21: Path) -> None:
    command = ("edit", adapter_file, "a fox", "-o", tmp_path / "out.png", "--base", tiny_sd21)
    assert "was made for base" in refused(*command, folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0"], "0<x<=1"),
        (["--strength", "1.5"], "0<x<=1"),
        (["--strength", "nan"], "0<x<=1"),
        (["--guidance", "-1"], "1<=x<=100"),
        (["--guidance-rescale", "2"], "0<=x<=1"),
        (["--adapter-scale", "-1"], "0<=x<=4"),
        (["--steps", "0"], "1<=x<=1000"),
        (["--steps", "many"], "many"),
        (["--unconditional", "neither"], "neither"),
        (["--seed", "-1"], "-1"),
        (["-n", "0"], "0"),
    ],
)
def test_values_out_of_range(
    tmp_path: Path, arguments: list[str], message: str, edit: list[str | Path]
) -> None:
    command = (*edit, "a fox", "-o", tmp_path / "out.png", *arguments)
    assert message in refused(*command, folder=tmp_path, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0.01"], "--strength 0.01 leaves none of"),
        (["--seed", str(2**63)], f"--seed {2**63} isn't allowed"),
        (["--photo", "none.png"], "doesn't exist"),
        (["--photo", "steps=2.png"], "steps=2.png doesn't exist"),
    ],
)
def test_values_that_do_not_go(
    tmp_path: Path, arguments: list[str], message: str, edit: list[str | Path]
) -> None:
    command = (*edit, "a fox", "-o", tmp_path / "out.png", *arguments)
    assert message in refused(*command, folder=tmp_path)


def test_an_empty_prompt(tmp_path: Path, edit: list[str | Path]) -> None:
    for prompt in ("", "  "):
        assert "empty" in refused(*edit, prompt, "-o", tmp_path / "out.png", folder=tmp_path)


def test_wrong_usage_is_one_line_too(tmp_path: Path) -> None:
    assert "No such command" in refused("fitt", folder=tmp_path, code=2)
    assert "No such option" in refused("--versoin", folder=tmp_path, code=2)
    assert "Missing argument" in refused("inspect", folder=tmp_path, code=2)
    assert "No such option" in refused("inspect", "a", "--jsn", folder=tmp_path, code=2)


def test_demo_refuses_a_folder_with_files_in_it(tmp_path: Path, tiny_sd15: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "--overwrite" in refused("demo", "-o", tmp_path, "--base", tiny_sd15, folder=tmp_path)
