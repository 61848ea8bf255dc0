"""The doctor reports the resources of the machine, and what is insufficient."""

from __future__ import annotations

import json

import torch
from command_line import run

from lora_unitune import Recipe
from lora_unitune.cli.doctor import _notes, recipes_for
from lora_unitune.families import FAMILIES
from lora_unitune.recipe import available_recipes


def test_this_machine_as_json() -> None:
    report = json.loads(run("doctor", "--json", "--device", "cpu").stdout)
    assert report["device"] == "cpu" and report["versions"]["torch"] == torch.__version__
    assert report["recipes"] == recipes_for(None)
    assert 0 < report["free_bytes"] < report["total_bytes"]
    assert report["bf16"] == torch.cpu._is_avx512_bf16_supported()


def test_a_person_reads_lines() -> None:
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 0 and "GiB" in result.stdout and "pocket/default" in result.stdout
    assert "without a CUDA GPU" in result.stderr


def test_a_device_that_isnt_there_is_one_line() -> None:
    if not torch.cuda.is_available():
        result = run("doctor", "--device", "cuda")
        assert result.exit_code == 1 and "isn't available" in result.stderr


def test_the_recipe_follows_the_free_memory() -> None:
    sizes = {4: None, 6: "sd15/6gb", 7.6: "sd15/8gb", 8: "sd15/8gb", 11.6: "sd15/12gb", 24: "sd15/12gb"}
    assert {size: recipes_for(int(size * 2**30))["sd15"] for size in sizes} == sizes
    notes = _notes(torch.device("cuda"), 4 * 2**30, recipes_for(4 * 2**30))
    assert "4.0 GiB" in notes[0] and "sd15" in notes[0] and "pocket" not in notes[0]


def test_every_recipe_that_is_recommended_ships() -> None:
    for free in (None, 0, *(gigabytes * 2**30 for gigabytes in range(1, 100))):
        recipes = recipes_for(free)
        assert set(recipes) == {name.partition("/")[0] for name in available_recipes()}
        assert recipes["pocket"] == "pocket/default"
        for name in filter(None, recipes.values()):
            Recipe.load(name)
    assert {row.recipe for row in FAMILIES.values()} <= set(recipes_for(None).values())
