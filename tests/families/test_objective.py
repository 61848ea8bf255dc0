"""The objective against diffusers' schedulers and against what the papers promise."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from lora_unitune.errors import BaseModelError
from lora_unitune.families.schedule import (
    add_noise,
    clean_latents,
    mean_squared_loss,
    snr,
    stratified_timesteps,
    training_target,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = seeded()
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    return latents, torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([0, 250, 700, 999])


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16])
def test_each_stratum_gets_one_timestep(batch: int) -> None:
    for seed in range(20):
        timesteps = stratified_timesteps(batch, 1000, seeded(seed))
        assert timesteps.shape == (batch,) and timesteps.dtype == torch.int64
        edges = torch.arange(batch) * 1000 / batch
        ordered = timesteps.sort().values
        assert (ordered >= edges.floor()).all() and (ordered < (edges + 1000 / batch).ceil()).all()


def test_timesteps_are_uniform_in_every_place_of_the_batch() -> None:
    generator = seeded()
    drawn = torch.stack([stratified_timesteps(4, 10, generator) for _ in range(4000)])
    for place in range(4):
        shares = torch.bincount(drawn[:, place], minlength=10) / 4000
        assert (shares - 0.1).abs().max() < 0.02


def test_same_generator_same_timesteps_and_more_strata_than_timesteps() -> None:
    assert torch.equal(stratified_timesteps(8, 1000, seeded(3)), stratified_timesteps(8, 1000, seeded(3)))
    assert stratified_timesteps(50, 3, seeded()).unique().tolist() == [0, 1, 2]


def test_noise_and_velocity_are_those_of_diffusers(
    scheduler: DDIMScheduler, drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    alphas = scheduler.alphas_cumprod
    noised = add_noise(*drawn, alphas)
    assert torch.allclose(noised, scheduler.add_noise(*drawn), atol=1e-6)
    velocity = training_target(*drawn, alphas, "v_prediction")
    assert torch.allclose(velocity, scheduler.get_velocity(*drawn), atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_gives_the_clean_latents_back(
    scheduler: DDIMScheduler, drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor], prediction_type: str
) -> None:
    latents, noise, timesteps = drawn
    alphas = scheduler.alphas_cumprod
    noised = add_noise(latents, noise, timesteps, alphas)
    target = training_target(latents, noise, timesteps, alphas, prediction_type)
    clean = clean_latents(target, noised, timesteps, alphas, prediction_type)
    assert torch.allclose(clean, latents, atol=1e-4)


def test_zero_terminal_snr_is_pure_noise(drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    latents, noise, _ = drawn
    alphas = torch.tensor([1.0, 0.0])
    last, first = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(add_noise(latents, noise, last, alphas), noise)
    assert torch.equal(add_noise(latents, noise, first, alphas), latents)
    assert torch.equal(training_target(latents, noise, last, alphas, "v_prediction"), -latents)
    assert torch.equal(clean_latents(-latents, noise, last, alphas, "v_prediction"), latents)
    assert snr(last, alphas).eq(0).all() and snr(first, alphas).isinf().all()


def test_an_unknown_prediction_type_is_named(drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    for formula in (training_target, clean_latents):
        with pytest.raises(BaseModelError, match="'flow_prediction'"):
            formula(*drawn, torch.rand(1000), "flow_prediction")


def test_the_loss_is_float32_and_a_mean() -> None:
    ones = torch.ones(2, 4, 8, 8, dtype=torch.bfloat16)
    loss = mean_squared_loss(3 * ones, ones)
    assert loss.dtype == torch.float32 and loss.item() == 4
