"""The tuning of the counterfactual benchmark: the same budget and the same search space for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.counterfactual import __main__ as command
from benchmarks.counterfactual import tune
from benchmarks.counterfactual.method import edges
from benchmarks.counterfactual.methods import METHODS
from benchmarks.counterfactual.ours import UniTune
from benchmarks.counterfactual.pairs import TUNING

TUNED_METHODS = [name for name, method in METHODS.items() if method.grid]


@pytest.mark.parametrize("name", TUNED_METHODS)
def test_every_method_is_tuned_by_the_same_number_of_trials(name: str) -> None:
    grid, tried = METHODS[name].grid, tune.settings_to_try(METHODS[name], 32)
    assert len(tried) == 32 and tried[0] == {dial: values[0] for dial, values in grid.items()}
    assert all(value in grid[dial] for dials in tried for dial, value in dials.items())


@pytest.mark.parametrize("name", [name for name in TUNED_METHODS if name != "ledits++"])
def test_every_sampling_method_can_have_the_values_of_ours(name: str) -> None:
    ours, grid = METHODS["lora"].grid, METHODS[name].grid
    shared = {"guidance", "guidance_start", "guidance_stop"}
    for dial in shared if name == "text-to-image" else shared | {"strength"}:
        assert set(ours[dial]) <= set(grid[dial]), dial
    if isinstance(METHODS[name], UniTune):
        assert ours.keys() - {"adapter_scale"} <= grid.keys()


def test_an_edge_is_an_end_of_the_space_without_a_natural_bound() -> None:
    grid: dict[str, tuple[Any, ...]] = {
        "guidance": (2.0, 1.5, 10.0),
        "strength": (0.95, 0.3, 1.0),
        "guidance_start": (0.4, 0.0, 0.6),
        "residual": (True, False),
        "unconditional": ("base",),
        "steps": (25,),
    }
    inside = {"guidance": 2.0, "strength": 1.0, "guidance_start": 0.0, "residual": True, "steps": 25}
    assert edges(grid, inside) == {}
    assert edges(grid, {"guidance": 10.0, "strength": 0.3}) == {"guidance": 10.0, "strength": 0.3}
    assert edges(grid, {"guidance_start": 0.6}) == {"guidance_start": 0.6}


@pytest.mark.parametrize(("strength", "is_edge"), [(1.0, True), (0.95, True), (0.9, False), (0.5, False)])
def test_guidance_that_stops_before_sampling_begins_is_no_edge(strength: float, is_edge: bool) -> None:
    grid: dict[str, tuple[Any, ...]] = {"guidance_stop": (0.1, 0.2, 1.0), "strength": (0.3, 1.0, 0.9)}
    assert bool(edges(grid, {"guidance_stop": 0.1, "strength": strength})) == is_edge


class Painter:
    """A method whose only hyperparameter is the color that it paints."""

    grid = {"guidance": (3, 1, 2, 4, 5, 6, 7, 8)}

    def fit(self, editor: Any, photo: Any, seed: int, dials: dict[str, Any]) -> None:
        pass

    def edit(self, editor: Any, fitted: Any, pairs: Any, seeds: Any, dials: dict[str, Any]) -> Any:
        return np.full((len(pairs), 64, 64, 3), dials["guidance"], dtype=np.uint8)


def test_tuning_halves_the_settings_and_reports_an_edge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists weigh the same, and each method has its own file, so that processes can't lose each other's."""

    def measure(pairs: Any, pictures: np.ndarray) -> list[dict[str, float]]:
        known = len(pairs) == 6
        return [
            {
                "success": min(float(value), 7.0) if known else 0.0,
                "psnr_truth": float(value),
                "same_thing": float("nan") if known else 1.0,
            }
            for value in pictures[:, 0, 0, 0]
        ]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "MEASURES", ("success", "psnr_truth", "same_thing"))
    monkeypatch.setitem(METHODS, "painter", Painter())
    monkeypatch.setattr(command, "TUNED", tmp_path)
    words = ["tune", "--methods", "painter", "--pairs", "24", "--trials", "8"]
    result = CliRunner().invoke(command.main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "edge: guidance=8" in result.output.splitlines()
    assert [file.name for file in tmp_path.iterdir()] == ["painter.json"]
    kept = json.loads((tmp_path / "painter.json").read_text())
    assert kept["space"] == {"guidance": [3, 1, 2, 4, 5, 6, 7, 8]}
    assert kept["dials"] == kept["edges"] == {"guidance": 8}  # 7 is as successful, with a lower PSNR
    trials = kept["trials"]
    assert [trial["dials"]["guidance"] for trial in trials] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert trials[0]["success"] == 3.5 and trials[0]["unknown"]["same_thing"] == 1
    assert "same_thing" not in trials[0]["known"]
    for trial, known, unknown in [(trials[1], 24, 24), (trials[2], 6, 8)]:  # a quarter of 4 and of 6 photos
        assert {which: trial[which]["pairs"] for which in TUNING} == {"known": known, "unknown": unknown}


def test_tuning_goes_on_from_the_best_setting_to_its_neighbors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(pairs: Any, pictures: np.ndarray) -> list[dict[str, float]]:
        return [{"success": -abs(5.0 - float(value)), "psnr_truth": 0.0} for value in pictures[:, 0, 0, 0]]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "MEASURES", ("success",))
    monkeypatch.setitem(METHODS, "painter", Painter())
    monkeypatch.setattr(tune, "settings_to_try", lambda method, trials: [{"guidance": 4}])
    kept = tune.tune("painter", 4, 1, "pocket", "cpu")
    assert [trial["dials"]["guidance"] for trial in kept["trials"]] == [5, 4, 3]
    assert tune.neighbors(Painter(), {"guidance": 8}) == [{"guidance": 7}]
