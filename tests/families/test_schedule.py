"""Noise schedules, compared with diffusers' schedulers and with the papers."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from lora_unitune.errors import BaseModelError
from lora_unitune.families.sampler import Sampler
from lora_unitune.families.schedule import NoiseSchedule, Prediction

CPU = torch.device("cpu")
Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def schedule_of(kind: str, scheduler: Any = None) -> NoiseSchedule:
    if kind == "flow":
        return NoiseSchedule.flow(torch.arange(1, 1001) / 1000)
    scheduler = scheduler or DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return NoiseSchedule.diffusion(scheduler.alphas_cumprod, kind)  # type: ignore[arg-type]


@pytest.fixture
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture
def drawn() -> Drawn:
    generator = seeded()
    clean = torch.randn(4, 4, 8, 8, generator=generator)
    return clean, torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([0, 250, 700, 999])


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16])
def test_each_stratum_gets_one_level(batch: int) -> None:
    schedule = schedule_of("epsilon")
    for seed in range(20):
        index = schedule.draw(batch, seeded(seed))
        assert index.shape == (batch,) and index.dtype == torch.int64
        edges = torch.arange(batch) * 1000 / batch
        ordered = index.sort().values
        assert (ordered >= edges.floor()).all() and (ordered < (edges + 1000 / batch).ceil()).all()


def test_levels_are_uniform_in_every_place_of_the_batch() -> None:
    generator, schedule = seeded(), schedule_of("epsilon").at(torch.arange(10))
    drawn = torch.stack([schedule.draw(4, generator) for _ in range(4000)])
    for place in range(4):
        shares = torch.bincount(drawn[:, place], minlength=10) / 4000
        assert (shares - 0.1).abs().max() < 0.02


def test_same_generator_same_levels_and_more_strata_than_levels() -> None:
    schedule = schedule_of("flow")
    assert torch.equal(schedule.draw(8, seeded(3)), schedule.draw(8, seeded(3)))
    assert schedule.at(torch.arange(3)).draw(50, seeded()).unique().tolist() == [0, 1, 2]


def test_noise_and_velocity_are_those_of_diffusers(scheduler: DDIMScheduler, drawn: Drawn) -> None:
    clean, noise, index = drawn
    schedule = schedule_of("v_prediction")
    noisy = schedule.add_noise(clean, noise, index)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, index), atol=1e-6)
    velocity = schedule.target(clean, noise, index)
    assert torch.allclose(velocity, scheduler.get_velocity(clean, noise, index), atol=1e-6)


def test_the_flow_is_that_of_diffusers(drawn: Drawn) -> None:
    clean, noise, _ = drawn
    sampler = Sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), schedule_of("flow"), 5, 2, CPU)
    started = sampler.start(noise, clean)
    ours = sampler.levels.add_noise(clean, noise, torch.zeros(4, dtype=torch.int64))
    assert len(sampler.levels) == 3 and torch.allclose(started, ours, atol=1e-6)
    assert sampler.shares == sorted(sampler.shares) and 0 < sampler.shares[0] < 1


@pytest.mark.parametrize("kind", get_args(Prediction))
def test_the_target_leads_back_to_the_clean_picture(drawn: Drawn, kind: str) -> None:
    clean, noise, index = drawn
    schedule = schedule_of(kind)
    noisy, target = (formula(clean, noise, index) for formula in (schedule.add_noise, schedule.target))
    assert torch.allclose(schedule.clean(target, noisy, index), clean, atol=1e-4)


@pytest.mark.parametrize("kind", get_args(Prediction))
def test_a_run_of_perfect_predictions_ends_at_the_picture(drawn: Drawn, kind: str) -> None:
    """Sampler and schedule agree on the parameterization of the denoiser's output."""
    clean, noise, _ = drawn
    scheduler: Any = FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind,
        clip_sample=False,
    )  # fmt: skip
    schedule = schedule_of(kind, scheduler)
    sampler = Sampler(scheduler, schedule, 6, 1, CPU)
    noisy = sampler.start(noise, clean)
    for step in range(len(sampler.timesteps)):
        index = torch.full((4,), step)
        alpha, sigma = sampler.levels.alpha[step], sampler.levels.sigma[step]
        target = sampler.levels.target(clean, (noisy - alpha * clean) / sigma, index)
        noisy = sampler.step(target, step, sampler.model_input(noisy, step), [seeded()] * 4)
    assert torch.allclose(noisy, clean, atol=5e-2)


def test_zero_terminal_snr_is_pure_noise(drawn: Drawn) -> None:
    clean, noise, _ = drawn
    schedule = NoiseSchedule.diffusion(torch.tensor([1.0, 0.0]), "v_prediction")
    last, first = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(schedule.add_noise(clean, noise, last), noise)
    assert torch.equal(schedule.add_noise(clean, noise, first), clean)
    assert torch.equal(schedule.target(clean, noise, last), -clean)
    assert torch.equal(schedule.clean(-clean, noise, last), clean)
    assert schedule.noise_to_signal().tolist() == [0.0, float("inf")]


def test_shares_run_from_noise_to_the_clean_picture() -> None:
    diffusion, flow = schedule_of("epsilon"), schedule_of("flow")
    assert [diffusion.share(t) for t in (999, 599, -1)] == [0.0, 0.4, 1.0]
    assert [flow.share(t) for t in (1000, 600, 0)] == [0.0, 0.4, 1.0]


def test_an_unknown_prediction_is_named() -> None:
    with pytest.raises(BaseModelError, match="'score'.*epsilon, sample, v_prediction, flow"):
        NoiseSchedule.diffusion(torch.rand(1000), "score")  # type: ignore[arg-type]
