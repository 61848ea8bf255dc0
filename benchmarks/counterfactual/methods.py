"""The compared methods, with the interface of `Method`.

Every method gets the photo and the prompts as a user would type them, and no caption of the photo. The noise of
a pair is drawn with the pair's own seed, the same for all methods.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from lora_unitune import Adapter, Editor, fit
from lora_unitune.adapter.hotswap import Mount
from lora_unitune.editing.guidance import classifier_free_guidance, rescale_guidance
from lora_unitune.editing.sampling import sample_edit
from lora_unitune.families import Condition, default_recipe, expanded, joined
from lora_unitune.photo.reading import photo_to_tensor
from lora_unitune.pocket.world import render
from lora_unitune.recipe import Recipe
from lora_unitune.settings import EditSettings

from .imagic import Imagic
from .method import RESCALE, STEPS, Dials, Method, Unfitted, conditions, framed, photo_latents, to_bytes


@dataclass
class UniTune:
    """This project's fit and edit; hyperparameters with a dot in their name are settings of the fit's recipe.

    Attributes:
        overrides: Changes of the default recipe, as for `--set`.
        grid: See `Method`.
    """

    overrides: tuple[str, ...] = ()
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        edit = Recipe.load("pocket/default").edit
        self.grid = {
            "adapter_scale": tuple(dict.fromkeys((edit.adapter_scale, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3))),
            "guidance": (edit.guidance, 3.0),
            "guidance_start": (edit.guidance_start,),
            "guidance_stop": (edit.guidance_stop,),
            "strength": (edit.strength,),
            "unconditional": (edit.unconditional,),
            "residual": (edit.residual,),
        } | self.grid

    def fit(self, editor: Editor, photo: Any, seed: int, dials: Dials) -> Any:
        settings = [f"{name}={value}" for name, value in dials.items() if "." in name]
        settings.append("photo.size={}x{}".format(*editor.base.size))  # as for all other methods
        recipe = default_recipe(editor.base.name, editor.base.family).override([*self.overrides, *settings])
        editor.release()
        return fit(photo, base=editor.base, recipe=recipe, seed=seed)

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        chosen = {name: value for name, value in dials.items() if "." not in name}
        settings = dataclasses.replace(fitted.recipe.edit, steps=STEPS, **chosen)
        texts = [f"{fitted.rare_tokens} {pair.prompt}" for pair in pairs]
        start = fitted.photo_latents if settings.strength < 1 else None
        if fitted.recipe.fit.method == "full" and settings.unconditional == "base":
            return to_bytes(guided_by_plain_weights(editor, fitted, texts, start, seeds, settings))
        return to_bytes(editor.pixels(fitted, texts, "", start, seeds, settings))


class WithPlain:
    """A fine-tuned base, with a plain one that predicts the unconditional half of a guided batch."""

    def __init__(self, tuned: Any, plain: Any, count: int) -> None:
        self.tuned, self.plain, self.count = tuned, plain, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tuned, name)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        if len(noisy) == self.count:
            return self.tuned.predict(noisy, timesteps, condition)
        half, predicted = self.count, []
        for base, rows in ((self.plain, slice(0, half)), (self.tuned, slice(half, None))):
            own = {name: tensor[rows] for name, tensor in condition.items()}
            predicted.append(base.predict(noisy[rows], timesteps[rows], own))
        return torch.cat(predicted)


@torch.no_grad()
def guided_by_plain_weights(
    editor: Editor, fitted: Adapter, texts: Sequence[str], start: Any, seeds: Sequence[int], settings: Any
) -> Tensor:
    """The equivalent of unconditional = "base" for full fine-tuning; needs a second model in memory."""
    editor.release()
    base, mount = editor.base, Mount(editor.base)
    plain = copy.copy(base)
    plain.parts = copy.deepcopy(base.parts)
    empty = conditions(editor, [""])
    mount.use(fitted, settings.adapter_scale)
    try:
        settings = dataclasses.replace(settings, unconditional="adapter")
        prompted = conditions(editor, texts)
        rare = conditions(editor, [fitted.rare_tokens]) if settings.residual and start is not None else None
        both = WithPlain(base, plain, len(texts) * (1 if rare is None else 2))
        return base.decode(sample_edit(both, base.size, prompted, rare, empty, start, seeds, settings))
    finally:
        mount.release()


class SDEdit(Unfitted):
    """The noised photo, denoised with the prompt (arXiv 2108.01073)."""

    grid = {
        "strength": (0.4, 0.35, 0.45, 0.5),
        "guidance": (4.0, 3.0, 5.0),
        "guidance_start": (0.0,),
        "guidance_stop": (0.8,),
    }

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        settings = EditSettings(steps=STEPS, guidance_rescale=RESCALE, **dials)
        start = photo_latents(editor, pairs) if settings.strength < 1 else None
        texts = [pair.prompt for pair in pairs]
        return to_bytes(editor.pixels(None, texts, "", start, seeds, settings))


class TextToImage(SDEdit):
    """The prompt alone: what the base samples without the photo."""

    grid = {
        "guidance": (4.0, 2.0, 3.0, 5.0, 7.0),
        "guidance_start": (0.0, 0.2),
        "guidance_stop": (0.8, 1.0),
    }

    def edit(
        self, editor: Editor, fitted: Any, pairs: Sequence[Any], seeds: Sequence[int], dials: Dials
    ) -> Any:
        return super().edit(editor, fitted, pairs, seeds, {**dials, "strength": 1.0})


class FlowEdit(SDEdit):
    """The base without a fit, with edits by FlowEdit (arXiv 2412.08629): an ablation of the fit.

    As no method here gets a caption of the photo, its source prompt is empty.
    """

    grid = {
        "strength": (0.5, 0.4, 0.45, 0.55),
        "guidance": (7.0, 5.0, 9.0),
        "guidance_start": (0.2, 0.0),
        "guidance_stop": (0.8,),
        "residual": (True,),
    }


class DDIMInversion(Unfitted):
    """The photo's latents inverted to noise without a prompt, then denoised with one (arXiv 2010.02502).

    Attributes:
        grid: See `Method`; `strength` is the share of the steps that are inverted.
    """

    grid = {"strength": (0.5, 0.45, 0.55, 0.6), "guidance": (2.5, 2.0, 3.0)}

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
            without, prompted = base.predict(
                torch.cat([latents] * 2), torch.full((2 * len(pairs),), now), both
            ).chunk(2)
            guided = classifier_free_guidance(without, prompted, dials["guidance"])
            latents = ddim_step(base, latents, rescale_guidance(guided, prompted, RESCALE), now, after)
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
        "skip": (0.5, 0.4, 0.55, 0.6, 0.65, 0.7),
        "edit_guidance_scale": (2.0, 1.0, 1.5, 2.5, 3.0, 4.0),
        "edit_threshold": (0.25, 0.0, 0.1, 0.4, 0.5),
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


FULL = (
    "fit.method=full",
    "fit.steps=120",
    "lora.unet.learning_rate=3e-4",
    "lora.text_encoder.learning_rate=5e-5",
)
METHODS: dict[str, Method] = {
    "lora": UniTune(),
    "lora-rank1": UniTune(("lora.unet.rank=1",)),
    "lora-rank8": UniTune(("lora.unet.rank=8",)),
    "lora-unet": UniTune(("lora.text_encoder.rank=0",)),
    "full": UniTune(FULL),
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
