"""The doctor tells what is there, and says plainly what is too little."""

from __future__ import annotations

import json

import torch
from command_line import run

from lora_unitune.cli.doctor import _recipe, examine


def test_this_machine_is_told_as_json() -> None:
    told = json.loads(run("doctor", "--json", "--device", "cpu").stdout)
    assert told["device"] == "cpu" and told["versions"]["torch"] == torch.__version__
    assert told["recipes"]["pocket"] == "pocket/default"
    assert 0 < told["free_bytes"] < told["total_bytes"]
    assert told["bf16"] == torch.cpu._is_avx512_bf16_supported()


def test_a_person_reads_lines() -> None:
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 0 and "GiB" in result.stdout and "pocket/default" in result.stdout
    assert "without a CUDA GPU" in result.stderr


def test_a_device_that_isnt_there_is_one_line() -> None:
    if not torch.cuda.is_available():
        result = run("doctor", "--device", "cuda")
        assert result.exit_code == 2 and "isn't available" in result.stderr


def test_the_recipe_follows_the_free_memory() -> None:
    card = torch.device("cuda")
    sizes = {4: None, 6: "sd15/6gb", 8: "sd15/8gb", 12: "sd15/12gb", 24: "sd15/12gb"}
    assert {size: _recipe(card, size * 2**30)[0] for size in sizes} == sizes
    assert "4.0 GiB" in _recipe(card, 4 * 2**30)[1][0]
    assert examine("cpu")["recipes"]["stable_diffusion_1"] == "sd15/8gb"
