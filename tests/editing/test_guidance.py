"""Guidance: its fixed points, and agreement with diffusers."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from lora_unitune.editing.guidance import boost, classifier_free_guidance, rescale_guidance, strongest_change


def predictions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 8, 8, generator=generator), 2 * torch.randn(3, 4, 8, 8, generator=generator)


def test_weights_0_and_1_return_the_two_predictions() -> None:
    unconditional, conditional = predictions()
    assert torch.equal(classifier_free_guidance(unconditional, conditional, 0.0), unconditional)
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 1.0), conditional)


def test_equal_predictions_stay_as_they_are_at_any_weight() -> None:
    prediction, _ = predictions()
    assert torch.equal(classifier_free_guidance(prediction, prediction, 7.5), prediction)


def test_guidance_is_linear_in_its_weight() -> None:
    unconditional, conditional = predictions()
    low, middle, high = (classifier_free_guidance(unconditional, conditional, w) for w in (1.0, 4.0, 7.0))
    torch.testing.assert_close(middle, (low + high) / 2)


def test_rescaling_equals_diffusers() -> None:
    unconditional, conditional = predictions(1)
    guided = classifier_free_guidance(unconditional, conditional, 8.0)
    for amount in (0.0, 0.3, 0.7, 1.0):
        expected = rescale_noise_cfg(guided, conditional, guidance_rescale=amount)
        assert torch.equal(rescale_guidance(guided, conditional, amount), expected)


def test_rescaling_fully_gives_each_image_the_deviation_of_its_own_conditional_prediction() -> None:
    unconditional, conditional = predictions(2)
    guided = classifier_free_guidance(unconditional, conditional, 12.0)
    rescaled = rescale_guidance(guided, conditional, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    assert torch.equal(rescale_guidance(guided, conditional, 0.0), guided)


def test_the_strongest_change_is_that_of_the_most_changed_place_at_the_strongest_step() -> None:
    difference = torch.zeros(2, 4, 8, 8)
    difference[0, :, 2:5, 3:6] = -0.6
    first = strongest_change(difference, None)
    torch.testing.assert_close(first, torch.tensor([0.6, 0.0]).reshape(2, 1, 1, 1))
    second = strongest_change(difference.flip(0), first)
    torch.testing.assert_close(second, torch.tensor([0.6, 0.6]).reshape(2, 1, 1, 1))


def test_the_boost_reaches_the_least_change_and_is_at_most_4() -> None:
    strongest = torch.tensor([0.0, 0.01, 0.15, 0.3, 0.45, 2.0])
    torch.testing.assert_close(boost(strongest, 0.45), torch.tensor([4.0, 4.0, 3.0, 1.5, 1.0, 1.0]))
    assert torch.equal(boost(strongest, 0.0), torch.ones(6))
