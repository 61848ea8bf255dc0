"""The compared methods, with the interface of `Method`.

Every method gets the photo and the prompts as a user would type them, and no caption of the photo. The noise of
a pair is drawn with the pair's own seed, the same for all methods.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from lora_unitune import Editor
from lora_unitune.editing.guidance import classifier_free_guidance, rescale_guidance
from lora_unitune.families import expanded, joined
from lora_unitune.photo.reading import photo_to_tensor
from lora_unitune.pocket.world import render
from lora_unitune.settings import EditSettings

from .imagic import Imagic
from .method import (
    RESCALE,
    STEPS,
    Dials,
    Method,
    Unfitted,
    conditions,
    framed,
    photo_latents,
    photo_start,
    sampling_grid,
    to_bytes,
)
from .ours import NoFit, UniTune


class SDEdit(Unfitted):
    """The noised photo, denoised with the prompt (arXiv 2108.01073)."""

    grid: dict[str, tuple[Any, ...]] = {**sampling_grid(0.45, 5.0, 0.0, 0.8), "residual": (False,)}

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        settings = EditSettings(steps=STEPS, guidance_rescale=RESCALE, **dials)
        texts = [pair.prompt for pair in pairs]
        return to_bytes(editor.pixels(None, texts, "", photo_start(editor, pairs), seeds, settings))


class TextToImage(SDEdit):
    """The prompt alone: what the base samples without the photo."""

    grid = sampling_grid(None, 7.0, 0.0, 0.8)

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        return super().edit(editor, fitted, pairs, seeds, {**dials, "strength": 1.0})


class FlowEdit(SDEdit):
    """The base without a fit, with edits by FlowEdit (arXiv 2412.08629).

    As no method here gets a caption of the photo, its source prompt is empty.
    """

    grid = {**sampling_grid(0.55, 5.0, 0.2, 0.8), "residual": (True,)}


class DDIMInversion(Unfitted):
    """The photo's latents inverted to noise without a prompt, then denoised with one (arXiv 2010.02502).

    Attributes:
        grid: See `Method`; `strength` is the share of the steps that are inverted.
    """

    grid = sampling_grid(0.55, 2.5, 0.0, 1.0)

    @torch.no_grad()
    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        editor.release()
        base, count = editor.base, int(STEPS * dials["strength"])
        steps = [-1, *(round(1000 * (i + 1) / STEPS) - 1 for i in range(count))]  # -1: no noise
        empty, texts = conditions(editor, [""]), conditions(editor, [pair.prompt for pair in pairs])
        latents = photo_latents(editor, pairs)
        for now, after in zip(steps, steps[1:], strict=False):
            predicted = base.predict(latents, torch.tensor([max(now, 0)]), empty)
            latents = ddim_step(base, latents, predicted, now, after)
        latents, both = latents.repeat(len(pairs), 1, 1, 1), joined(expanded(empty, len(pairs)), texts)
        for now, after in zip(steps[:0:-1], steps[-2::-1], strict=True):
            if dials["guidance_start"] <= base.schedule().share(now) < dials["guidance_stop"]:
                twice, times = torch.cat([latents] * 2), torch.full((2 * len(pairs),), now)
                without, prompted = base.predict(twice, times, both).chunk(2)
                guided = classifier_free_guidance(without, prompted, dials["guidance"])
                predicted = rescale_guidance(guided, prompted, RESCALE)
            else:
                predicted = base.predict(latents, torch.full((len(pairs),), now), texts)
            latents = ddim_step(base, latents, predicted, now, after)
        return to_bytes(base.decode(latents))


class NoiseUNet(UNet2DConditionModel):
    """A v-prediction UNet whose output is converted to epsilon (arXiv 2202.00512, appendix D)."""

    alphas: Tensor

    def forward(self, sample: Tensor, timestep: Any, *others: Any, **named: Any) -> UNet2DConditionOutput:
        alpha = self.alphas[torch.as_tensor(timestep)].to(sample).reshape(-1, 1, 1, 1)
        predicted = super().forward(sample, timestep, *others, **named).sample
        return UNet2DConditionOutput(sample=alpha.sqrt() * predicted + (1 - alpha).sqrt() * sample)


class LEdits:
    """LEDITS++ (arXiv 2311.16711), by diffusers' pipeline with its default sampler and masks."""

    grid = {
        "skip": (0.6, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.65, 0.7, 0.8),
        "edit_guidance_scale": (3.0, 0.5, 1.0, 1.5, 2.0, 2.5, 4.0, 5.0, 7.0, 10.0),
        "edit_threshold": (0.25, 0.0, 0.1, 0.4, 0.5, 0.75, 0.9),
        "edit_warmup_steps": (0, 2, 4, 8),
    }

    def fit(self, editor: Editor, photo: Any, seed: int, dials: Dials) -> Any:
        editor.release()
        unet = copy.deepcopy(editor.base.parts["unet"])  # the pipeline replaces its attention processors
        schedule = editor.base.schedule()
        if schedule.prediction == "v_prediction":
            unet.__class__ = NoiseUNet
            unet.alphas = schedule.alpha.square()
        scheduler = editor.base.make_scheduler().config
        pipeline = LEditsPPPipelineStableDiffusion(
            vae=editor.base.frozen["vae"],
            text_encoder=editor.base.parts["text_encoder"],
            tokenizer=editor.base.tokenizer,
            unet=unet,
            scheduler=DPMSolverMultistepScheduler.from_config(
                scheduler, prediction_type="epsilon", algorithm_type="sde-dpmsolver++", solver_order=2
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        photo = framed(editor, pairs[0].image).image
        prompts = [pair.prompt for pair in pairs]
        return np.stack([self._edit(fitted, photo, *one, dials) for one in zip(prompts, seeds, strict=True)])

    def _edit(self, pipeline: Any, photo: Any, prompt: str, seed: int, dials: Dials) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        pipeline.invert(photo, num_inversion_steps=STEPS, skip=dials["skip"], generator=generator)
        chosen = {name: value for name, value in dials.items() if name != "skip"}
        edited = pipeline(editing_prompt=[prompt], generator=generator, **chosen)
        return np.asarray(edited.images[0])


class ReturnPhoto(Unfitted):
    """The unchanged photo: preserves everything, edits nothing."""

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        return np.stack([np.asarray(framed(editor, pair.image).image) for pair in pairs])


class Truth(Unfitted):
    """The ground truth: the upper bound of the metrics."""

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        return np.stack([np.asarray(render(pair.truth.scene)) for pair in pairs])


class TruthThroughVAE(Truth):
    """The ground truth after the base's autoencoder: an upper bound for every method."""

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        photos = [framed(editor, render(pair.truth.scene)) for pair in pairs]
        latents = [editor.base.encode(photo_to_tensor(photo))[0] for photo in photos]
        return to_bytes(editor.base.decode(torch.cat(latents)))


FULL = ("fit.method=full", "lora.unet.learning_rate=1e-4", "lora.text_encoder.learning_rate=1e-3")
FULL_RATES = {
    "lora.unet.learning_rate": (1e-4, 3e-5, 5e-5, 2e-4, 3e-4, 1e-3),
    "lora.text_encoder.learning_rate": (1e-3, 3e-4, 5e-4, 2e-3, 3e-3, 1e-2),
}
METHODS: dict[str, Method] = {
    "lora": UniTune(),
    "full": UniTune(FULL, FULL_RATES),
    "no-fit": NoFit(),
    "sdedit": SDEdit(),
    "flowedit": FlowEdit(),
    "ddim-inversion": DDIMInversion(),
    "ledits++": LEdits(),
    "imagic": Imagic(),
    "text-to-image": TextToImage(),
    "photo": ReturnPhoto(),
    "truth": Truth(),
    "truth-vae": TruthThroughVAE(),
}


def ddim_step(base: Any, latents: Tensor, predicted: Tensor, now: int, after: int) -> Tensor:
    """A deterministic DDIM step (arXiv 2010.02502, equation 13), in either direction, for a v-prediction base.

    Args:
        base: The base, for its noise schedule.
        latents: Latents (b, c, h, w) at timestep `now`.
        predicted: v, same shape.
        now: Current timestep; -1 is the clean image.
        after: Next timestep; -1 is the clean image.
    """
    signal = base.schedule().alpha.square()
    here, there = (1.0 if t < 0 else float(signal[t]) for t in (now, after))
    clean = here**0.5 * latents - (1 - here) ** 0.5 * predicted
    noise = here**0.5 * predicted + (1 - here) ** 0.5 * latents
    return there**0.5 * clean + (1 - there) ** 0.5 * noise
