"""Every optimizer minimizes, and raises a clear error if it is unavailable."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from lora_unitune.errors import DeviceError, SettingError
from lora_unitune.training.optimizers import OPTIMIZERS, best_for, make_optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")  # the paged optimizer warns that it isn't paged on a CPU
def test_every_optimizer_descends(name: str) -> None:
    target = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))  # large enough for 8-bit state
    weight = torch.nn.Parameter(torch.zeros(128, 64))
    optimizer = make_optimizer(name, [{"params": [weight], "lr": 0.05}])
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = 0.5 * (weight - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_groups_keep_their_own_learning_rates() -> None:
    slow, fast = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = make_optimizer("sgd", [{"params": [slow], "lr": 0.1}, {"params": [fast], "lr": 1.0}])
    (slow.sum() + fast.sum()).backward()
    optimizer.step()
    assert torch.allclose(slow, torch.full((3,), -0.1)) and torch.allclose(fast, torch.full((3,), -1.0))


def test_adamw_is_pytorchs_and_fused() -> None:
    weights = [torch.nn.Parameter(torch.ones(5, 5)) for _ in range(2)]
    ours = make_optimizer("adamw", [{"params": [weights[0]], "lr": 0.01}], weight_decay=0.1)
    theirs = torch.optim.AdamW([weights[1]], lr=0.01, weight_decay=0.1, fused=False, foreach=False)
    for _ in range(5):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()
            optimizer.step()
    assert ours.defaults["fused"] is True
    assert torch.allclose(*weights)


def test_auto_takes_8_bits_for_many_weights_on_a_gpu_only() -> None:
    full, adapter = 860_000_000, 1_600_000
    assert best_for({"cuda"}, full) == "adamw8bit"
    for devices, count in (({"cuda"}, adapter), ({"cpu"}, full), ({"mps"}, full), ({"cuda", "cpu"}, full)):
        assert best_for(devices, count) == "adamw"


def test_auto_without_bitsandbytes_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert best_for({"cuda"}, 860_000_000) == "adamw"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SettingError, match="'adam9' is unknown; choose one of auto, adamw, adamw8bit"):
        make_optimizer("adam9", [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1}])


def test_8_bit_without_its_library_or_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = torch.nn.Parameter(torch.zeros(1, device="meta"))
    with pytest.raises(DeviceError, match="'adamw8bit' doesn't run on 'meta'; use fit.optimizer=adamw"):
        make_optimizer("adamw8bit", [{"params": [elsewhere], "lr": 0.1}])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SettingError, match="needs bitsandbytes"):
        make_optimizer("adamw8bit", [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1}])
