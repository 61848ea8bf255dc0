"""The fit: a photo and rare tokens -> a trained adapter (UniTune, arXiv 2210.09477, section 3)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_unitune.adapter import layers
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.suits import check_fits
from lora_unitune.errors import FitError, SettingError, one_line
from lora_unitune.families import Base, BaseFiles, default_recipe, load_base
from lora_unitune.families.loading import resolve_device
from lora_unitune.families.location import locate_base
from lora_unitune.photo.framing import box_in, choose_size, frame, with_context
from lora_unitune.photo.opening import PhotoSource
from lora_unitune.photo.reading import load_photo
from lora_unitune.recipe import Recipe
from lora_unitune.settings import FitSettings, LoraSettings, check_whole
from lora_unitune.training.loop import OnNote, OnStep, precision_for, train
from lora_unitune.training.prepare import prepare

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_LORA_TO_FULL = 20
"""Learning rate of LoRA relative to that of all weights, in a recipe for LoRA that is used with method "full"."""
_DIVERGED = 0.5
"""Mean loss of the last quarter of the steps from which a fit may have diverged, if it is above the first loss too.
A prediction of nothing has a loss of about 1; single losses differ several times by their noise levels alone."""


def fit(
    photo: PhotoSource,
    *,
    base: str | Path | BaseFiles | Base = "pocket",
    recipe: Recipe | str | Path | None = None,
    overrides: str | Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    embed_photo: bool = True,
    start: Adapter | str | Path | None = None,
    on_step: OnStep | None = None,
    on_note: OnNote | None = None,
) -> Adapter:
    """Fits a photo: trains adapters so that the base reproduces it for a few rare tokens.

    Args:
        photo: Path of an image file, its bytes, an open file, or a PIL image.
        base: "pocket", a folder, a .safetensors file, a hub id, what `locate_base` found, or a base in memory,
            which is restored bit for bit.
        recipe: A recipe, its name or its file; None takes the base's default.
        overrides: Changes of single settings, such as "fit.steps=50"; one or several.
        seed: Seed of all randomness; the same seed gives the same tensors.
        device: Device of a base that is loaded by name: "auto", "cpu", "cuda" or "mps".
        embed_photo: Whether to store the photo's latents in the adapter, so that edits can start from them.
        start: An adapter, or the path of its file, to continue from, at the strength that was trained,
            instead of a new one; its ranks, alphas, targets and rare tokens are used.
        on_step: Callback after each step.
        on_note: Callback for notes to the user: changes of the photo, or that memory ran out and the fit
            continues with less.

    Returns:
        The adapter, in memory, with the loss of each step as its `history`; `Adapter.save` writes it.

    Raises:
        UnituneError: An argument is invalid, or the fit can't continue; the subclass says which.
    """
    check_whole("seed", seed, 0)
    start = Adapter.load(start) if isinstance(start, (str, Path)) else start
    for name, value, kinds in (
        ("base", base, (str, Path, BaseFiles, Base)),
        ("recipe", recipe, (Recipe, str, Path, type(None))),
        ("overrides", overrides, (str, list, tuple)),
        ("start", start, (Adapter, type(None))),
    ):
        if not isinstance(value, kinds):
            raise SettingError(f"{name} = {one_line(repr(value), 80)} isn't allowed; see help(fit)")
    read = load_photo(photo)
    if isinstance(base, (str, Path)):
        base = locate_base(base)
    settings = _continued(_settings(recipe, base, overrides), start)
    box = box_in(read, settings.photo)
    loaded = _load_for_fit(base, settings.fit, device) if isinstance(base, BaseFiles) else base
    if settings.fit.quantize not in ("none", loaded.quantized):
        raise SettingError(
            f"fit.quantize = '{settings.fit.quantize}' is for a base that the fit loads; give its name, or "
            "load it with load_base(..., quantize=...)"
        )
    part = with_context(read.image.size, box)
    size = choose_size(part, settings.photo, loaded.size, loaded.size_step)
    loaded.sample_shape(size)
    framed = frame(read, size, box)
    if start is not None:
        check_fits(start, loaded)
    notes = [f"the photo: {note}" for note in framed.notes]
    if start is not None:
        notes += [f"the adapter to continue from: {note}" for note in start.notes]
        if start.recipe.photo.box not in ("", settings.photo.box):
            notes.append(
                f"the adapter to continue from: its box is {start.recipe.photo.box}, and this fit's is "
                f"{settings.photo.box or 'the whole photo'}"
            )
    for note in notes if on_note is not None else ():
        on_note(note)  # type: ignore[misc]
    generator = torch.Generator().manual_seed(seed)
    try:
        prepared = prepare(framed, settings, loaded)
        with _trainable(loaded, settings, generator):
            if start is not None:
                trained = layers.multiplied(start.tensors, start.undone_weights())
                layers.load_in_place(layers.slots(loaded), trained, settings.lora)
            history = train(prepared, loaded, settings, generator, on_step, on_note)
            tensors = _result(loaded, settings)
        for note in divergence(history.losses, settings) if on_note is not None else ():
            on_note(note)  # type: ignore[misc]
    except torch.OutOfMemoryError as error:
        raise FitError(
            "memory ran out before the first step; close other programs, or pass device='cpu'"
        ) from error
    return Adapter(
        tensors={key: _as_saved(tensor) for key, tensor in tensors.items()},
        rare_tokens=prepared.rare_tokens,
        recipe=settings,
        base=loaded.name,
        fingerprint=loaded.fingerprint,
        photo_latents=_as_saved(prepared.mean) if embed_photo else None,
        size=size,
        family=loaded.family.name,
        prediction=loaded.schedule().prediction,
        seed=seed,
        seconds=history.seconds,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        photo_digest=read.digest,
        photo_size=read.size_of_file,
        history=history.losses,
    )


def divergence(losses: Sequence[float], recipe: Recipe) -> list[str]:
    """Returns a note if the loss has clearly risen above the first, which is that of the plain base."""
    last = losses[-max(1, len(losses) // 4) :]
    after = sum(last) / len(last)
    if after <= max(_DIVERGED, 1.1 * losses[0]):
        return []
    rates = ", ".join(
        f"lora.{part}.learning_rate ({each.learning_rate:g})" for part, each in recipe.lora.items()
    )
    return [
        f"its loss rose from {losses[0]:.3g} to {after:.3g}, so the fit has probably diverged; lower {rates}"
    ]


def _as_saved(tensor: Tensor) -> Tensor:
    """Rounds to float16, as in an adapter file, so that saving and loading changes nothing."""
    return tensor.half().float()


@contextlib.contextmanager
def _trainable(base: Base, recipe: Recipe, generator: torch.Generator) -> Iterator[None]:
    """Makes the base trainable according to the recipe, and finally restores it bit for bit."""
    layers.detach(base)
    if recipe.fit.method == "full":
        with _full_weights(base, recipe.lora):
            yield
        return
    try:
        layers.attach(base, recipe.lora, generator)
        yield
    finally:
        layers.detach(base)


@contextlib.contextmanager
def _full_weights(base: Base, lora: Mapping[str, LoraSettings]) -> Iterator[None]:
    """Makes all weights of the parts whose rank isn't 0 trainable; restores them afterwards.

    Raises:
        SettingError: The base's weights are in half precision, in which small updates are lost.
    """
    if base.dtype != torch.float32:
        raise SettingError("fit.method = 'full' needs a base in float32; load it with dtype=torch.float32")
    parts = [base.parts[part] for part in layers.adapted(base, lora)]
    weights = [weight for part in parts for weight in part.parameters()]
    originals = [(weight, weight.detach().to("cpu", copy=True)) for weight in weights]
    try:
        for weight, _ in originals:
            weight.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.requires_grad_(False).copy_(original)
                weight.grad = None


def _result(base: Base, recipe: Recipe) -> dict[str, Tensor]:
    """Returns the trained tensors, float32 on the CPU, those of method "lora" at the strength of their part."""
    if recipe.fit.method == "full":
        return _full_tensors(base)
    weights = {part: settings.weight for part, settings in recipe.lora.items()}
    return layers.multiplied(layers.collect(base), weights)


def _full_tensors(base: Base) -> dict[str, Tensor]:
    """Returns copies of all trained weights, float32 on the CPU, by "<part>.<parameter name>"."""
    return {
        f"{part}.{name}": weight.detach().to("cpu", torch.float32, copy=True)
        for part, module in base.parts.items()
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def _settings(
    recipe: Recipe | str | Path | None, base: BaseFiles | Base, overrides: str | Sequence[str]
) -> Recipe:
    """Returns the recipe of a fit with settings for every part of the base, the overrides applied."""
    family = base.family
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.load(recipe)
    elif recipe is None:
        recipe = default_recipe(base.name, family)
    given = [overrides] if isinstance(overrides, str) else list(overrides)
    chosen = family.complete(recipe, given)
    if recipe.fit.method == "lora" and chosen.fit.method == "full":  # the recipe's rates are for LoRA
        rates = [
            f"lora.{part}.learning_rate={each.learning_rate / _LORA_TO_FULL}"
            for part, each in family.complete(recipe).lora.items()
        ]
        chosen = family.complete(recipe, [*rates, *given])
    lora = {part: replace(each, alpha=each.scale * each.rank) for part, each in chosen.lora.items()}
    return replace(chosen, lora=lora)


def _continued(recipe: Recipe, start: Adapter | None) -> Recipe:
    """Returns the recipe of a fit that continues from an adapter, with its layers and rare tokens."""
    if start is None:
        return recipe
    if recipe.fit.method == "full" or not start.is_low_rank:
        raise SettingError(
            "a fit can continue from an adapter of method 'lora' only, which isn't a DoRA, and with that method"
        )
    tokens = recipe.prompt.rare_tokens or start.rare_tokens or ""
    before = {part: start.recipe.lora.get(part, LoraSettings(0)) for part in recipe.lora}
    lora = {
        part: replace(before[part], learning_rate=each.learning_rate, weight=each.weight)
        for part, each in recipe.lora.items()
    }
    return replace(recipe, lora=lora, prompt=replace(recipe.prompt, rare_tokens=tokens))


def _load_for_fit(files: BaseFiles, settings: FitSettings, device: str) -> Base:
    """Loads a base in the precision of its frozen weights: the fit's on a GPU, float32 elsewhere."""
    if settings.method == "full" and settings.quantize != "none":
        raise SettingError("fit.quantize is for method 'lora': rounded weights can't be trained; use none")
    target = resolve_device(device)
    dtype: Any = _DTYPES[precision_for(settings.precision, target)]
    if settings.method == "full" or target.type == "cpu":
        dtype = torch.float32
    return load_base(files, device, dtype, settings.quantize)
