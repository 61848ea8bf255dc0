"""Every benchmark can be imported, and the settings that it changes exist."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks
from benchmarks.counterfactual.methods import METHODS, UniTune
from benchmarks.frontier import SETTINGS
from lora_unitune.families import FAMILIES, default_recipe

MODULES = [each.name for each in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_it_can_be_imported(name: str) -> None:
    importlib.import_module(name)


UNITUNE = [method.overrides for method in METHODS.values() if isinstance(method, UniTune)]


@pytest.mark.parametrize("overrides", [*SETTINGS.values(), *UNITUNE], ids=" ".join)
def test_the_settings_exist(overrides: tuple[str, ...]) -> None:
    recipe = default_recipe("pocket", FAMILIES["sd"])
    assert (recipe.override(overrides) == recipe) == (not overrides)
