"""Adapter files of other tools, which don't store their base, rare tokens or recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lora_unitune.adapter import kohya
from lora_unitune.adapter.checks import AGAIN, LORA_KEY, check_lora_tensors, shown
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import FAMILIES, Family
from lora_unitune.recipe import Recipe
from lora_unitune.settings import LoraSettings


def family_of(shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """Infers the family of a file: one that its keys or shapes identify, else the first with all its layers.

    Args:
        shapes: Shapes of its tensors, by the keys in the file.
    """
    rows = list(FAMILIES.values())
    named = [{kohya.our_key(key, row): shape for key, shape in shapes.items()} for row in rows]
    for row, ours in reversed(list(zip(rows, named, strict=True))):
        if row.owns({key: shape for key, shape in ours.items() if key}, shapes):
            return row
    return next((row for row, ours in zip(rows, named, strict=True) if None not in ours), rows[0])


def foreign_values(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    alphas: Mapping[str, float],
    family: Family,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the fields of `Adapter` for a file of another tool, and each layer's factor.

    All layers of a part share one alpha / rank here; a factor is what a layer's B has to be multiplied by.

    Args:
        name: Name of the file in messages.
        shapes: Shapes of its tensors, by this package's keys.
        metadata: The `__metadata__` of its header.
        alphas: Values of its alpha tensors, by layer.
        family: The base's family.

    Raises:
        AdapterFileError: The file isn't an adapter in a known layout.
    """
    ranks = _ranks(name, shapes, family)
    scales_of = {**_scales_in_metadata(name, metadata, ranks), **_scales(ranks, alphas)}
    lora: dict[str, LoraSettings] = {}
    factors: dict[str, float] = {}
    for part, by_module in ranks.items():
        rank = max(by_module.values(), default=0)
        scales = {module: scales_of.get(f"{part}.{module}", 1.0) for module in by_module}
        if not all(0 < scale < math.inf for scale in scales.values()):
            raise AdapterFileError(f"{name}: an alpha in its {part} isn't a positive number; {AGAIN}")
        common = max(scales.values(), default=1.0)
        factors |= {f"{part}.{m}": s / common for m, s in scales.items() if s != common}
        try:
            lora[part] = LoraSettings(rank, alpha=rank * common, targets=tuple(sorted(by_module)))
        except RecipeError as error:
            raise AdapterFileError(f"{name}: an adapter this package can't hold: {error}") from error
    recipe = family.complete(Recipe(lora=lora))
    check_lora_tensors(name, shapes, recipe.lora, family)
    values = {
        **dict.fromkeys(("fingerprint", "rare_tokens", "date", "photo_digest"), ""),
        **dict.fromkeys(("seed", "seconds"), 0),
        "size": (0, 0),
        "family": family.name,
        "base": "unknown",
        "recipe": recipe,
    }
    return values, factors


def _ranks(name: str, shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, dict[str, int]]:
    """Returns every layer's rank, by part and module."""
    ranks: dict[str, dict[str, int]] = {part: {} for part in family.parts}
    for key, shape in shapes.items():
        match = LORA_KEY.fullmatch(key)
        if not match or match["part"] not in ranks or len(shape) < 2:
            raise AdapterFileError(
                f"{name}: tensor {shown(key)} doesn't belong to a LoRA adapter in diffusers' or kohya's layout; "
                "give a file that lora-unitune wrote, or one in these layouts"
            )
        if match["side"] == "A":
            ranks[match["part"]][match["module"]] = shape[0]
    if not ranks[family.denoiser]:
        raise AdapterFileError(
            f"{name} has no lora_unitune header and adapts no {family.denoiser}; give another file"
        )
    return ranks


def _scales(ranks: Mapping[str, Mapping[str, int]], alphas: Mapping[str, float]) -> dict[str, float]:
    """Returns alpha / rank of the layers that have an alpha tensor."""
    layers = {f"{part}.{module}": rank for part, each in ranks.items() for module, rank in each.items()}
    return {layer: alphas[layer] / rank for layer, rank in layers.items() if layer in alphas and rank}


def _scales_in_metadata(
    name: str, metadata: Mapping[str, str], ranks: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """Returns alpha / rank of each layer from diffusers' header entry."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        config = json.loads(metadata["lora_adapter_metadata"])
        scales = {}
        for part, by_module in ranks.items():
            alphas, common = config.get(f"{part}.alpha_pattern") or {}, config.get(f"{part}.lora_alpha")
            for module, rank in by_module.items():
                alpha = next((a for end, a in alphas.items() if f".{module}".endswith(f".{end}")), common)
                if alpha is not None and rank:
                    scales[f"{part}.{module}"] = float(alpha) / (
                        rank**0.5 if config.get(f"{part}.use_rslora") else rank
                    )
    except (ValueError, RecursionError, AttributeError, TypeError, OverflowError) as error:
        raise AdapterFileError(f"{name}: its lora_adapter_metadata can't be read; {AGAIN}") from error
    return scales
