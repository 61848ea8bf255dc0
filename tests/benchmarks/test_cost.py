"""The cost benchmark: random bases have real shapes, and every method runs through all phases."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cost.bases import _components
from benchmarks.cost.floor import operations
from benchmarks.cost.steps import METHODS, measure, summarise


@pytest.mark.parametrize(("name", "weights"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_random_bases_have_the_real_numbers_of_weights(name: str, weights: int) -> None:
    with torch.device("meta"):
        unet = _components(name)["unet"]
    assert sum(parameter.numel() for parameter in unet.parameters()) == weights


def test_operations_are_two_for_each_multiply_and_add() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert operations(lambda: a @ b) == 2 * 3 * 5 * 7


def test_every_method_is_measured_and_compared() -> None:
    rows = [measure("pocket", method, "", 2, 1, "cpu") for method in METHODS]
    for row in rows:
        assert len(row["step_seconds"]) == 1 and row["fit_peak_bytes"] > 0
    summary = summarise(rows, list(METHODS))
    assert summary["trained_parameters"]["full"]["times_lora"] > 50
    assert summary["step_operations"]["lora"]["median"] < summary["step_operations"]["full"]["median"]
    assert summary["step_seconds"].keys() == set(METHODS)
