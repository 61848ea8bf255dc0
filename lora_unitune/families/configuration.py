"""The one check of a base's configuration, at load: what its pipeline in diffusers corrects is corrected here too.

What the pipeline would do and this package doesn't is refused in one line: every field that asks the pipeline for
another input, another guidance or another process.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn, get_args

import torch

from lora_unitune.errors import BaseModelError, one_line
from lora_unitune.families.schedule import Prediction

CHANNELS = {
    9: "an inpainting model",
    8: "an InstructPix2Pix model or a latent upscaler",
    7: "an upscaler",
    5: "a depth-to-image model",
}
"""Input channels of a UNet on 4 latent channels -> the kind of model."""

_OTHER_INPUTS = {
    "time_cond_proj_dim": "a model distilled for guidance, as latent consistency models are",
    "class_embed_type": "an upscaler or an unCLIP model",
    "num_class_embeds": "an upscaler or another model of classes",
    "encoder_hid_dim_type": "a model with another encoder of prompts",
    "encoder_hid_dim": "a model with another encoder of prompts",
}
"""Fields of a UNet's configuration that ask for inputs besides latents, timestep and prompt -> the kind of model."""


def check_configuration(
    name: str, unet: Any, vae: Any, text_encoders: list[Any], size_embeddings: bool
) -> None:
    """Checks the configurations of a base's models, alone and against one another.

    Args:
        name: Name of the base, for messages.
        unet: The UNet's configuration.
        vae: The VAE's configuration.
        text_encoders: Configurations of the text encoders.
        size_embeddings: Whether the UNet has to be conditioned on the image size and a pooled embedding.

    Raises:
        BaseModelError: The base is another kind of model, or its parts don't fit together.
    """

    def refuse(part: str, field: str, value: Any, kind: str) -> NoReturn:
        raise BaseModelError(
            f"base '{name}' is {kind} ({field} of its {part} is {value}), which isn't supported; use a "
            "text-to-image model of Stable Diffusion"
        )

    latent = vae["latent_channels"]
    if unet["in_channels"] != latent:
        kind = CHANNELS.get(unet["in_channels"], f"a model of other latents than its VAE's {latent} channels")
        refuse("UNet", "in_channels", unet["in_channels"], kind)
    if unet["out_channels"] != latent:
        refuse("UNet", "out_channels", unet["out_channels"], "a model that predicts more than noise")
    for field, kind in _OTHER_INPUTS.items():
        if unet.get(field) is not None:
            refuse("UNet", field, unet[field], kind)
    if unet.get("addition_embed_type") != ("text_time" if size_embeddings else None):
        kind = "a model with other embeddings than those of its pipeline"
        refuse("UNet", "addition_embed_type", unet.get("addition_embed_type"), kind)
    if not unet.get("sample_size"):
        refuse("UNet", "sample_size", unet.get("sample_size"), "a model of unknown size")
    width, taken = sum(text.hidden_size for text in text_encoders), unet["cross_attention_dim"]
    if {width} != set(taken if isinstance(taken, (list, tuple)) else [taken]):
        refuse("UNet", "cross_attention_dim", taken, f"a mix: its text encoders give {width} numbers a token")
    if size_embeddings:
        taken = unet["projection_class_embeddings_input_dim"]
        width = text_encoders[-1].projection_dim + 6 * unet["addition_time_embed_dim"]
        if taken != width:
            kind = "a refiner, or another model with other embeddings of size than 6 numbers"
            refuse("UNet", "projection_class_embeddings_input_dim", taken, kind)
    if vae.get("shift_factor"):
        refuse("VAE", "shift_factor", vae["shift_factor"], "a model of shifted latents")
    if not size_embeddings and (vae.get("latents_mean") or vae.get("latents_std")):
        refuse("VAE", "latents_mean", vae.get("latents_mean"), "a model of normalized latents")


def corrected(scheduler: Any) -> Any:
    """Returns a scheduler with the corrections that StableDiffusionPipeline makes to old configurations."""
    config, changes = scheduler.config, {}
    if config.get("steps_offset", 1) != 1:
        changes["steps_offset"] = 1
    if config.get("clip_sample") is True:
        changes["clip_sample"] = False
    return type(scheduler).from_config(config, **changes) if changes else scheduler


def side_of(unet: Any, corrects: bool) -> int:
    """Returns the side of a UNet's latents.

    Args:
        unet: The UNet's configuration.
        corrects: Whether sides below 64 in very old files are an error for 64, as StableDiffusionPipeline says.
    """
    side: Any = unet["sample_size"]
    if not isinstance(side, int):
        return int(min(side))
    version = re.match(r"0\.(\d+)\.", str(unet.get("_diffusers_version")))
    return 64 if corrects and side < 64 and version and int(version[1]) < 9 else side


def check_scheduler(name: str, scheduler: Any) -> None:
    """Checks that a scheduler is one of a diffusion model, and that it can sample with the pipeline's arguments.

    Args:
        name: Name of the base, for messages.
        scheduler: A scheduler of diffusers.

    Raises:
        BaseModelError: It belongs to another process, such as EDM or flow matching.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    reason, flows = "", "flow" in str(config.get("prediction_type")) or bool(config.get("use_flow_sigmas"))
    levels, prediction = getattr(scheduler, "alphas_cumprod", None), config.get("prediction_type")
    if not isinstance(levels, torch.Tensor) or levels.shape != (config.get("num_train_timesteps"),):
        reason = "it has no noise levels alphas_cumprod"
    elif flows or prediction not in get_args(Prediction):
        reason = f"it predicts {'the flow' if flows else prediction}"
    else:
        try:
            reason = _trial(type(scheduler).from_config(config), len(levels))
        except Exception as error:  # schedulers of other processes ask for other arguments
            reason = one_line(error, 100)
    if reason:
        if flows or "Flow" in kind:
            model = "a flow-matching model"
        else:
            model = "an EDM model" if "EDM" in kind else "another kind of model"
        raise BaseModelError(
            f"base '{name}' is {model}: its scheduler is {kind} ({reason}); use a base with a scheduler of "
            "Stable Diffusion, such as DDIM, Euler or DPMSolverMultistep"
        )


def _trial(scheduler: Any, levels: int) -> str:
    """Takes one step of a run, and returns what is wrong with it, "" if nothing is."""
    scheduler.set_timesteps(4)
    times = scheduler.timesteps
    if not 0 <= float(times.min()) < float(times.max()) <= levels:
        return f"its timesteps aren't from 0 to {levels}"
    if times[0] != times.max():
        return "it runs from the image to noise"
    noisy = torch.zeros(1, 4, 2, 2)
    with torch.random.fork_rng(devices=[]):
        taken = scheduler.step(
            noisy, times[0], scheduler.scale_model_input(noisy, times[0]), return_dict=False
        )
    return "" if taken[0].shape == noisy.shape else "its samples have another shape"
