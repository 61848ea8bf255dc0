"""Low-rank adapters (LoRA, arXiv 2106.09685) on the parts of a base: attach, collect, load, scale, detach."""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_unitune.adapter.checks import is_target, layers_of
from lora_unitune.adapter.int8 import rank_axis
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import Base
from lora_unitune.settings import LoraSettings

ADAPTER_NAME = "unitune"
_ADAPTABLE = (nn.Linear, nn.Conv2d)


def lora_config(settings: LoraSettings) -> LoraConfig:
    """Returns PEFT's configuration of one part's adapter.

    Args:
        settings: Rank, alpha and targets of the part.
    """
    alpha = settings.scale * settings.rank
    return LoraConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(settings.targets),
        init_lora_weights=True,
    )


def patterns(tensors: Mapping[str, Tensor], settings: LoraSettings, part: str) -> dict[str, dict[str, float]]:
    """Returns PEFT's rank_pattern and alpha_pattern: the layers whose rank is below their part's.

    Args:
        tensors: Tensors of the adapter, by "<part>.<module>.lora_A.weight".
        settings: Settings of the part.
        part: Name of the part.
    """
    ranks: dict[str, float] = {
        layer.removeprefix(f"{part}."): len(tensors[f"{layer}.lora_A.weight"])
        for layer in layers_of(tensors, part)
    }
    lower = {module: each for module, each in ranks.items() if each != settings.rank}
    alphas = {module: each * settings.scale for module, each in lower.items()}
    return {"rank_pattern": lower, "alpha_pattern": alphas}


def adapted(base: Base, lora: Mapping[str, LoraSettings]) -> list[str]:
    """Returns the parts of a base that get adapters: those whose rank isn't 0."""
    return [part for part in base.parts if part in lora and lora[part].rank]


def attach(base: Base, lora: Mapping[str, LoraSettings], generator: torch.Generator | None = None) -> None:
    """Attaches a new adapter to each part whose rank isn't 0; outputs stay the same, since B is 0.

    Adapters that are already attached are detached first. The new weights are float32 and trainable.

    Args:
        base: The base to attach adapters to.
        lora: Ranks, alphas and targets by part.
        generator: Generator on the CPU that initializes the A matrices (Kaiming uniform), so that a seed gives
            the same tensors on any device; None if the weights are loaded afterwards.

    Raises:
        RecipeError: A target isn't a linear or convolution layer of its part.
    """
    detach(base)
    configs = {part: lora_config(lora[part]) for part in adapted(base, lora)}
    for part in configs:
        _check_targets(part, base.parts[part], lora[part].targets)
    for part, config in configs.items():
        module = base.parts[part]
        # PEFT's initialization must not change the caller's random state
        with torch.random.fork_rng(devices=[]), _without_importing_bitsandbytes():
            inject_adapter_in_model(config, module, ADAPTER_NAME)
        for _, layer in _layers(module):
            layer.lora_A[ADAPTER_NAME].float()
            layer.lora_B[ADAPTER_NAME].float()
            if generator is not None:
                _draw(layer.lora_A[ADAPTER_NAME].weight, generator)
        module.eval()


@contextlib.contextmanager
def _without_importing_bitsandbytes() -> Iterator[None]:
    """Keeps PEFT from importing bitsandbytes for its type checks: no layer can be of its types before."""
    from peft.tuners.lora import model

    names = [name for name in ("is_bnb_available", "is_bnb_4bit_available") if hasattr(model, name)]
    replaced = {} if "bitsandbytes" in sys.modules else {name: getattr(model, name) for name in names}
    for name in replaced:
        setattr(model, name, lambda: False)
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(model, name, function)


def collect(base: Base) -> dict[str, Tensor]:
    """Returns copies of the attached adapters' tensors, float32 on the CPU.

    Keys are "<part>.<module path>.lora_A.weight" and ".lora_B.weight", as in diffusers'
    `save_lora_weights`.
    """
    return {key: weight.detach().to("cpu", torch.float32, copy=True) for key, weight in slots(base).items()}


def slots(base: Base) -> dict[str, nn.Parameter]:
    """Returns the parameters of the attached adapters, with the keys of `collect`."""
    weights = {}
    for part, module in base.parts.items():
        for name, layer in _layers(module):
            weights[f"{part}.{name}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
            weights[f"{part}.{name}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    return weights


def multiplied(tensors: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Returns an adapter's tensors with each part's change of the weights, B A, multiplied by a factor.

    Args:
        tensors: Tensors, as returned by `collect`; of each layer, only B is changed.
        factors: Factors by part; parts without one keep their tensors.
    """
    return {
        key: tensor * factors.get(key.partition(".")[0], 1.0) if key.endswith(".lora_B.weight") else tensor
        for key, tensor in tensors.items()
    }


def load_in_place(
    weights: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], lora: Mapping[str, LoraSettings]
) -> None:
    """Copies an adapter's tensors into attached adapters of the same or a higher rank, zero-padded.

    A convolution's tensors may be matrices, and a linear layer's those of a 1 x 1 convolution.

    Args:
        weights: Parameters of the attached adapters, as returned by `slots`.
        tensors: Tensors to copy, as returned by `collect`; any dtype.
        lora: The adapter's settings by part; their targets have to be attached.

    Raises:
        AdapterFileError: A tensor is missing, surplus or of the wrong shape; then nothing is copied.
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
    tensors = {key: _like(tensor, weights[key], rank_axis(key)) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        shape, wanted = tensor.shape, weights[key].shape
        inner = rank_axis(key)
        fits = len(shape) == len(wanted) and all(
            size == most or (axis == inner and size < most)
            for axis, (size, most) in enumerate(zip(shape, wanted, strict=False))
        )
        if not fits:
            raise AdapterFileError(
                f"the adapter's tensor '{key}' has shape {tuple(shape)} instead of {tuple(wanted)}; use "
                "the base it was made for"
            )
    with torch.no_grad():
        for key, weight in weights.items():
            inner = rank_axis(key)
            rank = tensors[key].shape[inner] if key in tensors else 0
            if rank:
                weight.narrow(inner, 0, rank).copy_(tensors[key])
            weight.narrow(inner, rank, weight.shape[inner] - rank).zero_()


def _like(tensor: Tensor, weight: Tensor, rank_axis: int) -> Tensor:
    """Returns a tensor with the dimensions of a weight, if only their number differs."""
    shape = list(weight.shape)
    shape[rank_axis] = tensor.shape[rank_axis]
    return (
        tensor.reshape(shape) if tensor.ndim != weight.ndim and tensor.numel() == math.prod(shape) else tensor
    )


def can_hold(
    attached: Mapping[str, LoraSettings], lora: Mapping[str, LoraSettings], parts: Iterable[str]
) -> bool:
    """Returns whether attached adapters have the capacity for another one, zero-padded."""
    none = LoraSettings(0)
    pairs = [(lora.get(part, none), attached.get(part, none)) for part in parts]
    return all(
        ours.rank <= theirs.rank and set(ours.targets) <= set(theirs.targets)
        for ours, theirs in pairs
        if ours.rank
    )


def union(
    first: Mapping[str, LoraSettings], second: Mapping[str, LoraSettings], parts: Iterable[str]
) -> dict[str, LoraSettings]:
    """Returns settings with the capacity for both: the larger ranks, and all targets."""
    both = {}
    for part in parts:
        used = [lora[part] for lora in (first, second) if part in lora and lora[part].rank]
        if used:
            targets = dict.fromkeys(name for each in used for name in each.targets)
            both[part] = LoraSettings(max(each.rank for each in used), targets=tuple(targets))
    return both


def set_scale(base: Base, scales: Mapping[str, float]) -> None:
    """Sets the factor of B A in each layer, by part: alpha / rank as trained, 0 for the plain base."""
    for part, module in base.parts.items():
        for _, layer in _layers(module):
            layer.scaling[ADAPTER_NAME] = scales.get(part, 0.0)


@contextlib.contextmanager
def adapters_disabled(base: Base) -> Iterator[None]:
    """Inside the `with` block adapters are disabled."""
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
    """Inside the `with` block, adapters apply to the last `count` rows of a batch of 2 * `count` only."""
    names = ["__base__"] * count + [ADAPTER_NAME] * count

    def choose(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "adapter_names": names}

    layers: list[Any] = [layer for module in base.parts.values() for _, layer in _layers(module)]
    hooks = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def detach(base: Base) -> None:
    """Removes the adapters: every part has its original modules again, unchanged. Idempotent."""
    for module in base.parts.values():
        for name, layer in _layers(module):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
        if hasattr(module, "peft_config"):
            del module.peft_config


def trainable_parameters(base: Base) -> dict[str, list[nn.Parameter]]:
    """Returns the parameters that require gradients, by part; parts without any are left out."""
    trained = {
        part: [p for p in module.parameters() if p.requires_grad] for part, module in base.parts.items()
    }
    return {part: parameters for part, parameters in trained.items() if parameters}


def _layers(module: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Returns the adapted layers of a module with their paths, in the module's order."""
    return [(name, child) for name, child in module.named_modules() if isinstance(child, LoraLayer)]


def _draw(weight: nn.Parameter, generator: torch.Generator) -> None:
    """Initializes an A matrix as PEFT does (Kaiming uniform with a = sqrt 5), with a generator on the CPU."""
    drawn = torch.empty(weight.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)


def _check_targets(part: str, module: nn.Module, targets: tuple[str, ...]) -> None:
    """Checks that each target names layers of the part that can be adapted.

    Raises:
        RecipeError: A target names no layer, or a layer that isn't linear or a convolution.
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
            f"lora.{part}.targets: '{target}' {fault} of the base's {part}; "
            f"{hint}it has {', '.join(sorted(names))}"
        )


def _ending(name: str) -> str:
    """Returns the last component of a module's path: "to_q", or "to_out.0" with its number."""
    *_, owner, last = ["", *name.split(".")]
    return f"{owner}.{last}" if last.isdigit() else last
