"""Low-rank adapters (LoRA, arXiv 2106.09685) on the parts of a base: attach, collect, load, scale, detach."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_unitune.adapter.checks import is_target, lora_settings
from lora_unitune.adapter.int8 import rank_axis
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import Base
from lora_unitune.recipe import LoraSettings

ADAPTER_NAME = "unitune"
_ADAPTABLE = (nn.Linear, nn.Conv2d)


def lora_config(part: str, lora: LoraSettings) -> LoraConfig:
    """Returns PEFT's configuration of one part's adapter.

    Args:
        part: "unet" or "text_encoder".
        lora: its `<part>_rank`, `<part>_alpha` and `<part>_targets` are used.
    """
    rank, alpha, targets = lora_settings(lora, part)
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(targets),
        init_lora_weights=True,
    )


def patterns(tensors: Mapping[str, Tensor], lora: LoraSettings, part: str) -> dict[str, dict[str, float]]:
    """Returns PEFT's rank_pattern and alpha_pattern: the layers whose rank is below their part's.

    Args:
        tensors: of the adapter, by "<part>.<module>.lora_A.weight".
        lora: its settings.
        part: "unet" or "text_encoder".
    """
    settings, end = lora_settings(lora, part), ".lora_A.weight"
    ranks: dict[str, float] = {
        key.removeprefix(f"{part}.").removesuffix(end): tensor.shape[0]
        for key, tensor in tensors.items()
        if key.startswith(f"{part}.") and key.endswith(end)
    }
    lower = {module: each for module, each in ranks.items() if each != settings.rank}
    scale = settings.alpha / settings.rank
    return {"rank_pattern": lower, "alpha_pattern": {module: each * scale for module, each in lower.items()}}


def attach(base: Base, lora: LoraSettings, generator: torch.Generator | None = None) -> None:
    """Puts a new adapter on each part whose rank isn't 0; the base's output stays the same, since B is 0.

    Any adapter that is there already is detached first. The new weights are float32 and trainable.

    Args:
        base: its parts get the adapters.
        lora: ranks, alphas and targets.
        generator: on the CPU; draws the A matrices (Kaiming uniform), so a seed gives the same tensors on any
            device. None when the weights are loaded afterwards.

    Raises:
        RecipeError: a target isn't a linear or convolution layer of its part.
    """
    detach(base)
    configs = {part: lora_config(part, lora) for part in base.parts if lora_settings(lora, part).rank}
    for part in configs:
        _check_targets(part, base.parts[part], lora_settings(lora, part).targets)
    for part, config in configs.items():
        module = base.parts[part]
        with torch.random.fork_rng(devices=[]):  # PEFT's own draws leave the caller's random state alone
            inject_adapter_in_model(config, module, ADAPTER_NAME)
        for _, layer in _layers(module):
            layer.lora_A[ADAPTER_NAME].float()
            layer.lora_B[ADAPTER_NAME].float()
            if generator is not None:
                _draw(layer.lora_A[ADAPTER_NAME].weight, generator)
        module.eval()


def is_attached(base: Base) -> bool:
    """Says whether any part of the base carries an adapter."""
    return any(True for module in base.parts.values() for _ in _layers(module))


def collect(base: Base) -> dict[str, Tensor]:
    """Returns copies of the attached adapters' tensors, float32 on the CPU.

    Keys are "<part>.<module path>.lora_A.weight" and ".lora_B.weight", as `save_lora_weights` of diffusers
    has them.
    """
    return {key: weight.detach().to("cpu", torch.float32, copy=True) for key, weight in slots(base).items()}


def slots(base: Base) -> dict[str, nn.Parameter]:
    """Returns the attached adapters' own tensors, named as `collect` names them."""
    weights = {}
    for part, module in base.parts.items():
        for name, layer in _layers(module):
            weights[f"{part}.{name}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
            weights[f"{part}.{name}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    return weights


def load_in_place(
    weights: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], lora: LoraSettings
) -> None:
    """Copies an adapter's tensors into attached adapters; what they leave of the room is filled with zeros.

    Args:
        weights: of attached adapters with room for this one, as `slots` returns them.
        tensors: as `collect` returns them; any dtype.
        lora: the adapter's settings, whose targets have to be there.

    Raises:
        AdapterFileError: a tensor is missing, surplus or misshapen; nothing is copied then.
    """
    for key in sorted(weights.keys() - tensors.keys()):
        if is_target(key, lora):
            raise AdapterFileError(
                f"the adapter lacks the tensor '{key}' its recipe asks for; fit the photo again"
            )
    for key in sorted(tensors.keys() - weights.keys()):
        raise AdapterFileError(
            f"the adapter's tensor '{key}' has no place in the base; use the base it was made for"
        )
    for key, tensor in tensors.items():
        found, room = tensor.shape, weights[key].shape
        inner = rank_axis(key)
        same = len(found) == len(room) and all(
            size == space or (axis == inner and size < space)
            for axis, (size, space) in enumerate(zip(found, room, strict=False))
        )
        if not same:
            raise AdapterFileError(
                f"the adapter's tensor '{key}' has shape {tuple(found)} instead of {tuple(room)}; use "
                "the base it was made for"
            )
    with torch.no_grad():
        for key, weight in weights.items():
            inner = rank_axis(key)
            rank = tensors[key].shape[inner] if key in tensors else 0
            if rank:
                weight.narrow(inner, 0, rank).copy_(tensors[key])
            weight.narrow(inner, rank, weight.shape[inner] - rank).zero_()


def has_room(room: LoraSettings, lora: LoraSettings, parts: Iterable[str]) -> bool:
    """Says whether adapters attached with the settings `room` can hold one with the settings `lora`."""
    pairs = [(lora_settings(lora, part), lora_settings(room, part)) for part in parts]
    return all(
        ours.rank <= theirs.rank and set(ours.targets) <= set(theirs.targets)
        for ours, theirs in pairs
        if ours.rank
    )


def with_room(room: LoraSettings, lora: LoraSettings, parts: Iterable[str]) -> LoraSettings:
    """Returns settings that have room for both: the larger ranks, and all targets."""
    changes: dict[str, Any] = {}
    for part in parts:
        used = [each for each in (lora_settings(room, part), lora_settings(lora, part)) if each.rank]
        if used:
            targets = dict.fromkeys(name for each in used for name in each.targets)
            changes[f"{part}_rank"] = max(each.rank for each in used)
            changes[f"{part}_targets"] = tuple(targets)
    return replace(room, **changes)


def set_scale(base: Base, scales: Mapping[str, float]) -> None:
    """Sets, by part, what a layer's B A is multiplied by: alpha / rank as trained, 0 the plain base."""
    for part, module in base.parts.items():
        for _, layer in _layers(module):
            layer.scaling[ADAPTER_NAME] = scales[part]


@contextlib.contextmanager
def adapters_disabled(base: Base) -> Iterator[None]:
    """Inside the `with` block the base computes with its own weights only."""
    layers = [layer for module in base.parts.values() for _, layer in _layers(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextlib.contextmanager
def adapters_for_last(base: Base, count: int) -> Iterator[None]:
    """Inside the `with` block, of a batch twice as large, only the last `count` rows get the adapters."""
    names = ["__base__"] * count + [ADAPTER_NAME] * count

    def choose(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return given, {**named, "adapter_names": names}

    layers: list[Any] = [layer for module in base.parts.values() for _, layer in _layers(module)]
    hooks = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def detach(base: Base) -> None:
    """Removes the adapters: every part holds its original module objects again, untouched. Idempotent."""
    for module in base.parts.values():
        for name, layer in _layers(module):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
        if hasattr(module, "peft_config"):
            del module.peft_config


def trainable_parameters(base: Base) -> dict[str, list[nn.Parameter]]:
    """Returns the parameters that require gradients, by part; parts without any are left out."""
    found = {part: [p for p in module.parameters() if p.requires_grad] for part, module in base.parts.items()}
    return {part: parameters for part, parameters in found.items() if parameters}


def _layers(module: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Returns the adapted layers of a module with their paths, in the module's own order."""
    return [(name, child) for name, child in module.named_modules() if isinstance(child, LoraLayer)]


def _draw(weight: nn.Parameter, generator: torch.Generator) -> None:
    """Fills an A matrix as PEFT does (Kaiming uniform with a = sqrt 5), from a generator on the CPU."""
    drawn = torch.empty(weight.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)


def _check_targets(part: str, module: nn.Module, targets: tuple[str, ...]) -> None:
    """Checks that each target names layers of the part that can be adapted.

    Raises:
        RecipeError: one doesn't.
    """
    children = [(name, child) for name, child in module.named_modules() if name]
    for target in targets:
        matched = [child for name, child in children if name == target or name.endswith(f".{target}")]
        if matched and all(isinstance(child, _ADAPTABLE) for child in matched):
            continue
        names = {_ending(name) for name, child in children if isinstance(child, _ADAPTABLE)}
        near = difflib.get_close_matches(target, sorted(names), n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'? " if near else ""
        fault = "isn't a linear or convolution layer" if matched else "names no layer"
        raise RecipeError(
            f"lora.{part}_targets: '{target}' {fault} of the base's {part}; "
            f"{hint}it has {', '.join(sorted(names))}"
        )


def _ending(name: str) -> str:
    """Returns the end of a module's path that says what it is: "to_q", or "to_out.0" with its number."""
    *_, owner, last = ["", *name.split(".")]
    return f"{owner}.{last}" if last.isdigit() else last
