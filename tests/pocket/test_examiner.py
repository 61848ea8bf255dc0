from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_unitune.pocket import world
from lora_unitune.pocket.pretraining import train_examiner
from lora_unitune.pocket.world import examiner
from lora_unitune.pocket.world.pictures import renders


def held_out(count: int) -> tuple[np.ndarray, list[world.Scene]]:
    drawn = [world.draw_scene(seed + 20_000, "held-out") for seed in range(count)]
    return renders(drawn), drawn


def test_it_reads_scenes_it_never_saw() -> None:
    pictures, drawn = held_out(300)
    scores = train_examiner.score(examiner.load(), pictures, drawn)
    for field in examiner.CHOICES:
        assert scores[field] >= 0.96, field  # 98 % on 1,500; 300 scatter more
        assert scores[f"{field}_calibration"] <= 0.03, field
    assert scores["x_error"] < 0.02
    assert scores["size_error"] < 0.03


def test_it_is_small_and_no_pickle() -> None:
    assert examiner.FILE.suffix == ".safetensors"
    assert examiner.FILE.stat().st_size <= 4_000_000


def test_probabilities_add_up_and_name_the_values() -> None:
    pictures, drawn = held_out(4)
    reading = examiner.read(pictures)
    for field, values in examiner.CHOICES.items():
        assert reading.probabilities[field].shape == (4, len(values))
        assert np.allclose(reading.probabilities[field].sum(1), 1, atol=1e-5)
        assert set(reading.likeliest(field)) <= set(values)
    assert reading.x.shape == reading.size.shape == (len(drawn),)


def test_a_colour_that_cannot_be_seen_is_not_asked_for() -> None:
    car = world.Scene("car", "meadow", colour="red")
    assert examiner.has_colour(car)
    assert not examiner.has_colour(replace(car, look="sepia"))
    assert not examiner.has_colour(world.Scene("dog", "meadow"))
    numbers, places = train_examiner.labels([car, replace(car, look="sketch")])
    assert numbers[:, -1].tolist() == [0, train_examiner.IGNORED]
    assert torch.equal(places, torch.tensor([[car.x, car.size]] * 2))


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 32, 32, 3\).*\(n, 64, 64, 3\)"):
        examiner.read(np.zeros((1, 32, 32, 3), np.uint8))


def test_training_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = dict(examiner.Network().named_parameters())
    network = train_examiner.train(tmp_path, 64, 0.005, batch=16)
    trained = [weight for name, weight in network.named_parameters() if not torch.equal(weight, start[name])]
    assert len(trained) > 0.9 * len(start) and all(weight.isfinite().all() for weight in trained)
    pictures, drawn = held_out(8)
    assert 0 <= train_examiner.score(network, pictures, drawn)["object"] <= 1
