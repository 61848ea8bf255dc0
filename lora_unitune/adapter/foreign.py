"""Adapter files of other tools, which don't store their base, rare tokens or recipe."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from lora_unitune.adapter.checks import AGAIN, LORA_KEY, check_lora_tensors, is_line, shown
from lora_unitune.adapter.spelling import our_key
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import FAMILIES, Family
from lora_unitune.recipe import Recipe
from lora_unitune.settings import LoraSettings

KEPT = re.compile(r"modelspec\.(?!hash)|ss_(?!network_)")
"""Header entries that a conversion of another tool's file keeps: all that don't describe its tensors."""

TRIGGER = "modelspec.trigger_phrase"
_VERSIONS = ("ss_base_model_version", "modelspec.architecture")
_LARGEST_ALPHA = 4096


def family_of(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Family:
    """Infers the family of a file: one that its tensors or its header identify, else the likeliest.

    Args:
        shapes: Shapes of its tensors, by the keys in the file.
        metadata: The `__metadata__` of its header.
    """
    rows = list(FAMILIES.values())
    named = [{our_key(key, row): shape for key, shape in shapes.items()} for row in rows]
    for row, ours in zip(rows, named, strict=True):
        if row.owns({key: shape for key, shape in ours.items() if key}):
            return row
    hinted = [row for row in rows if row.hints and any(key.startswith(row.hints) for key in shapes)]
    possible = [row for row, ours in zip(rows, named, strict=True) if None not in ours]
    return next(iter([*_stated(metadata), *hinted, *possible, rows[0]]))


def certain_family(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Family | None:
    """Returns the family that the tensors or the header identify; None if neither does.

    Args:
        shapes: Shapes of the tensors, by this package's keys.
        metadata: The `__metadata__` of the header.
    """
    owners = [row for row in FAMILIES.values() if row.owns(shapes)]
    return next(iter([*owners, *_stated(metadata)]), None)


def _stated(metadata: Mapping[str, str]) -> list[Family]:
    """Returns the families of the base model that a header names."""
    return [row for row in FAMILIES.values() if stated_base(metadata).startswith(row.names.versions)]


def stated_base(metadata: Mapping[str, str]) -> str:
    """Returns the base model that a header names, in kohya's or ModelSpec's words; "" if it names none."""
    names = (metadata.get(key, "").partition("/")[0].lower() for key in _VERSIONS)
    return next((name for name in names if is_line(name)), "")


def foreign_values(
    metadata: Mapping[str, str], family: Family, lora: Mapping[str, LoraSettings]
) -> dict[str, Any]:
    """Returns the fields of `Adapter` for a file of another tool.

    Args:
        metadata: The `__metadata__` of its header.
        family: The base's family.
        lora: The settings of its parts, as `lora_of` returns them.
    """
    trigger = " ".join(metadata.get(TRIGGER, "").split())
    return {
        **dict.fromkeys(("fingerprint", "date", "photo_digest", "prediction"), ""),
        **dict.fromkeys(("seed", "seconds"), 0),
        "rare_tokens": trigger if is_line(trigger) else None,
        "size": (0, 0),
        "family": family.name,
        "base": "unknown",
        "recipe": family.complete(Recipe(lora=lora)),
        "entries": {key: text for key, text in metadata.items() if KEPT.match(key)},
    }


def lora_of(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    alphas: Mapping[str, float],
    family: Family,
    originals: Mapping[str, int] = MappingProxyType({}),
    with_magnitudes: Collection[str] = (),
) -> tuple[dict[str, LoraSettings], dict[str, float]]:
    """Returns the settings of each part by the tensors alone, and each layer's factor.

    All layers of a part share one alpha / rank here; a factor is what a layer's B has to be multiplied by.

    Args:
        name: Name of the file in messages.
        shapes: Shapes of its tensors, by this package's keys.
        metadata: The `__metadata__` of its header.
        alphas: Values of its alpha tensors, by layer.
        family: The base's family.
        originals: Ranks that alphas in the header refer to, by layer, where they differ from the tensors'.
        with_magnitudes: The layers that have a DoRA's magnitudes.

    Raises:
        AdapterFileError: The tensors aren't those of a LoRA adapter.
    """
    ranks = _ranks(name, shapes, family)
    in_header = {
        part: {module: originals.get(f"{part}.{module}", rank) for module, rank in each.items()}
        for part, each in ranks.items()
    }
    scales_of = {
        **_scales_in_metadata(name, metadata, in_header, family, with_magnitudes),
        **_scales(ranks, alphas),
    }
    lora: dict[str, LoraSettings] = {}
    factors: dict[str, float] = {}
    for part, by_module in ranks.items():
        rank = max(by_module.values(), default=0)
        scales = {module: scales_of.get(f"{part}.{module}", 1.0) for module in by_module}
        if not all(map(math.isfinite, scales.values())):
            raise AdapterFileError(f"{name}: an alpha in its {part} isn't finite; {AGAIN}")
        common = max(scales.values(), default=1.0)
        common = common if 0 < rank * common <= _LARGEST_ALPHA else 1.0
        factors |= {f"{part}.{m}": s / common for m, s in scales.items() if s != common}
        try:
            lora[part] = LoraSettings(rank, alpha=rank * common, targets=tuple(sorted(by_module)))
        except RecipeError as error:
            raise AdapterFileError(f"{name}: an adapter this package can't hold: {error}") from error
    check_lora_tensors(name, shapes, family.complete(Recipe(lora=lora)).lora, family)
    return lora, factors


def remade(recipe: Recipe, lora: Mapping[str, LoraSettings]) -> Recipe:
    """Returns a recipe with the ranks, alphas and targets of other settings."""
    kept = {
        part: replace(
            settings,
            learning_rate=recipe.lora[part].learning_rate,
            weight=recipe.lora[part].weight,
            targets=settings.targets or recipe.lora[part].targets,
        )
        for part, settings in lora.items()
    }
    return replace(recipe, lora=kept)


def _ranks(name: str, shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, dict[str, int]]:
    """Returns every layer's rank, by part and module."""
    ranks: dict[str, dict[str, int]] = {part: {} for part in family.parts}
    for key, shape in shapes.items():
        match = LORA_KEY.fullmatch(key)
        if not match or match["part"] not in ranks or len(shape) < 2:
            raise AdapterFileError(
                f"{name}: tensor {shown(key)} doesn't belong to a LoRA adapter in a known layout; give a file "
                "that lora-unitune wrote, or one in diffusers', kohya's or PEFT's layout"
            )
        if match["side"] == "A":
            ranks[match["part"]][match["module"]] = shape[0]
    if not any(ranks.values()):
        raise AdapterFileError(f"{name} has no layer of {' or '.join(family.parts)} in it; give another file")
    return ranks


def _scales(ranks: Mapping[str, Mapping[str, int]], alphas: Mapping[str, float]) -> dict[str, float]:
    """Returns alpha / rank of the layers that have an alpha tensor."""
    layers = {f"{part}.{module}": rank for part, each in ranks.items() for module, rank in each.items()}
    return {layer: alphas[layer] / rank for layer, rank in layers.items() if layer in alphas and rank}


def _scales_in_metadata(
    name: str,
    metadata: Mapping[str, str],
    ranks: Mapping[str, Mapping[str, int]],
    family: Family,
    with_magnitudes: Collection[str],
) -> dict[str, float]:
    """Returns alpha / rank of each layer from diffusers' header entry."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        config = json.loads(metadata["lora_adapter_metadata"])
        scales = {}
        for part, by_module in ranks.items():
            bare = [module for module in by_module if f"{part}.{module}" not in with_magnitudes]
            if bare and config.get(f"{part}.use_dora"):
                raise AdapterFileError(
                    f"{name} is a DoRA by its header, and {shown(f'{part}.{bare[0]}')} has no magnitudes; {AGAIN}"
                )
            common = config.get(f"{part}.lora_alpha")
            patterns = config.get(f"{part}.alpha_pattern") or {}
            alphas = {family.names.current(f"{part}.{end.lstrip('^')}"): a for end, a in patterns.items()}
            ends = {f".{end.removeprefix(f'{part}.')}": alpha for end, alpha in alphas.items()}
            for module, rank in by_module.items():
                alpha = next((a for end, a in ends.items() if f".{module}".endswith(end)), common)
                if alpha is not None and rank:
                    scales[f"{part}.{module}"] = float(alpha) / (
                        rank**0.5 if config.get(f"{part}.use_rslora") else rank
                    )
    except AdapterFileError:
        raise
    except (ValueError, RecursionError, AttributeError, TypeError, OverflowError) as error:
        raise AdapterFileError(f"{name}: its lora_adapter_metadata can't be read; {AGAIN}") from error
    return scales
