"""An adapter file's header: what it says, under which names its tensors lie, and whether all of it holds.

Everything here is decided before a tensor is read. Read are this package's files, in diffusers' layout and in
kohya's, and strangers' files in either, which lack the "lora_unitune" entry.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_unitune.adapter import kohya
from lora_unitune.adapter.checks import (
    AGAIN,
    LORA_KEY,
    check_full_tensors,
    check_is_safetensors,
    check_lora_tensors,
    damaged,
    shown,
)
from lora_unitune.adapter.int8 import SCALES_KEY, WHOLE, rank_axis
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import PARTS
from lora_unitune.recipe import LoraSettings, Recipe

FORMAT_VERSION = 1
METADATA_KEY = "lora_unitune"
PHOTO_KEY = "lora_unitune.photo_latents"
RANKS_KEY = "lora_unitune.ranks"

_DATE = re.compile(r"(\d{4}-\d{2}-\d{2})?", re.ASCII)
_NUMBER_FORMATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Content:
    """A file's checked header.

    Attributes:
        keys: this package's name of each tensor -> the file's.
        shapes: by this package's names.
        values: the fields of `Adapter` that the header holds.
        factors: by layer, what its B is multiplied by so that all layers of a part share one alpha / rank.
        photo: the photo's latents, where the header holds them.
        ranks: by layer, of those that lie in the file filled up with zeros to their part's rank.
        eight_bit: whether the tensors are whole numbers with scales.
    """

    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, Any]
    factors: dict[str, float]
    photo: Tensor | None
    ranks: dict[str, int]
    eight_bit: bool


def read_content(path: str | Path) -> Content:
    """Reads and checks all but the tensors' values.

    Raises:
        AdapterFileError: it isn't there, isn't an adapter file, is damaged, or has the wrong tensors.
    """
    check_is_safetensors(Path(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            formats = {key: piece.get_dtype() for key, piece in slices.items()}
            found = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
            alphas = {
                key: file.get_tensor(key).item()
                for key, shape in found.items()
                if key.endswith(".alpha") and shape in ((), (1,))
            }
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error
    for key, number_format in formats.items():
        allowed = ("I8",) if key.endswith(WHOLE) else _NUMBER_FORMATS
        if number_format not in allowed:
            raise AdapterFileError(
                f"{path}: tensor {shown(key)} is {number_format}; allowed are {', '.join(allowed)}"
            )
    eight_bit = SCALES_KEY in found
    if eight_bit:
        _check_eight_bit(path, found)
    keys = {_our_key(path, key): key for key in found}
    if len(keys) < len(found):
        twin = next(key for key in found if keys[_our_key(path, key)] != key)
        raise AdapterFileError(f"{path}: tensor {shown(twin)} is in it twice, under two names; {AGAIN}")
    shapes = {ours: found[key] for ours, key in keys.items() if key not in alphas}
    photo_shape = shapes.get(PHOTO_KEY, (1, 1, 1, 1))
    if len(photo_shape) != 4 or photo_shape[0] != 1 or 0 in photo_shape:
        raise AdapterFileError(
            f"{path}: tensor {PHOTO_KEY!r} has shape {photo_shape}, not (1, c, h, w); {AGAIN}"
        )
    weights = {key: shape for key, shape in shapes.items() if key not in (PHOTO_KEY, SCALES_KEY)}
    scales = {ours.removesuffix(".alpha"): alphas[key] for ours, key in keys.items() if key in alphas}
    if METADATA_KEY in metadata:
        values = _checked_metadata(path, metadata)
        factors = dict[str, float]()
        if values["recipe"].fit.method == "lora":
            check_lora_tensors(path, weights, values["recipe"].lora, values["family"])
        else:
            check_full_tensors(path, weights, values["recipe"].lora, values["family"])
    else:
        family = "sdxl" if kohya.is_sdxl(found) or _is_sdxl(weights) else "sd"
        values, factors = _strangers_values(path, weights, metadata, scales, family)
    return Content(
        keys={ours: key for ours, key in keys.items() if key not in alphas},
        shapes=shapes,
        values=values,
        factors=factors,
        photo=_photo_in(path, metadata),
        ranks=_ranks_in(path, metadata, weights),
        eight_bit=eight_bit,
    )


def _check_eight_bit(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a file with scales has one for each rank, and all its matrices in 8 bits."""
    matrices = {key: shape for key, shape in shapes.items() if key not in (PHOTO_KEY, SCALES_KEY)}
    wrong = [key for key, shape in matrices.items() if not key.endswith(WHOLE) or len(shape) < 2]
    if wrong:
        raise AdapterFileError(f"{path}: tensor {shown(wrong[0])} isn't a matrix in 8 bits; {AGAIN}")
    ranks = sum(shape[rank_axis(key)] for key, shape in matrices.items())
    if shapes[SCALES_KEY] != (ranks,):
        raise AdapterFileError(
            f"{path}: tensor {SCALES_KEY!r} has shape {shapes[SCALES_KEY]}, not ({ranks},); {AGAIN}"
        )


def _our_key(path: str | Path, key: str) -> str:
    """Returns a tensor's name in this package; a kohya key is translated, any other stays."""
    if key.endswith(WHOLE):
        return f"{key.removesuffix(WHOLE)}.weight"
    if not kohya.is_kohya([key]):
        return key.replace("text_encoder.text_model.", "text_encoder.", 1)  # as transformers 4 named it
    found = kohya.our_key(key)
    if found is None:
        raise AdapterFileError(
            f"{path}: tensor {shown(key)} is of a layer that Stable Diffusion 1.x, 2.x and XL don't have; "
            "give an adapter for one of them"
        )
    return found


def _is_sdxl(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Says whether tensors are of Stable Diffusion XL, by its second text encoder or its widths."""
    widths = {shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.lora_A.weight")}
    return widths == {2048} or any(key.startswith("text_encoder_2.") for key in shapes)


def _checked_metadata(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of `Adapter` in a file's header, each of the right type."""
    try:
        found = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path}: its lora_unitune header isn't valid JSON; {AGAIN}")
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} is of format version {version} and this lora-unitune reads up to {FORMAT_VERSION}; "
            "upgrade lora-unitune"
        )
    for name, is_valid in METADATA_CHECKS.items():
        if name not in found or not is_valid(found[name]):
            raise AdapterFileError(
                f"{path}: {name!r} in its lora_unitune header is {'wrong' if name in found else 'missing'}; "
                f"{AGAIN}"
            )
    try:
        recipe = Recipe.from_dict(found["recipe"])
    except RecipeError as error:
        raise AdapterFileError(f"{path}: the recipe in its header is wrong: {error}") from error
    values = {name: found[name] for name in METADATA_CHECKS}
    return {**values, "recipe": recipe, "date": _date_in(path, found)}


def _date_in(path: str | Path, found: Mapping[str, Any]) -> str:
    """Returns the day of the fit, "" in files that don't tell it."""
    date = found.get("date", "")
    if not isinstance(date, str) or not _DATE.fullmatch(date):
        raise AdapterFileError(f"{path}: 'date' in its lora_unitune header is wrong; {AGAIN}")
    return date


def _strangers_values(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    alphas: Mapping[str, float],
    family: str,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the fields of `Adapter` for a file of another tool, and each layer's factor."""
    ranks: dict[str, dict[str, int]] = {part: {} for part in PARTS[family]}
    for key, shape in shapes.items():
        match = LORA_KEY.fullmatch(key)
        if not match or len(shape) < 2:
            raise AdapterFileError(
                f"{path}: tensor {shown(key)} is none of a LoRA adapter in diffusers' or kohya's layout; "
                "give a file that lora-unitune wrote, or one in these layouts"
            )
        if match["side"] == "A":
            ranks[match["part"]][match["module"]] = shape[0]
    if not ranks["unet"]:
        raise AdapterFileError(f"{path} has no lora_unitune header and adapts no UNet; give another file")
    known = {**_scales_in_metadata(path, metadata, ranks), **_scales(ranks, alphas)}
    settings: dict[str, Any] = {}
    factors: dict[str, float] = {}
    for part, of_layer in ranks.items():
        rank = max(of_layer.values(), default=0)
        scales = {module: known.get(f"{part}.{module}", 1.0) for module in of_layer}
        if not all(0 < scale < math.inf for scale in scales.values()):
            raise AdapterFileError(f"{path}: an alpha in its {part} isn't a positive number; {AGAIN}")
        common = max(scales.values(), default=1.0)
        factors |= {f"{part}.{m}": s / common for m, s in scales.items() if s != common}
        settings |= {f"{part}_rank": rank, f"{part}_alpha": rank * common if rank else 1.0}
        if of_layer:
            settings[f"{part}_targets"] = tuple(sorted(of_layer))
    try:
        lora = LoraSettings(**settings)
    except RecipeError as error:
        raise AdapterFileError(f"{path}: an adapter this package can't hold: {error}") from error
    check_lora_tensors(path, shapes, lora, family)
    values = {
        **dict.fromkeys(("fingerprint", "rare_tokens"), ""),
        **dict.fromkeys(("resolution", "seed", "seconds"), 0),
        "format_version": FORMAT_VERSION,
        "family": family,
        "base": "unknown",
        "recipe": Recipe(lora=lora),
    }
    return values, factors


def _scales(ranks: Mapping[str, Mapping[str, int]], alphas: Mapping[str, float]) -> dict[str, float]:
    """Returns alpha / rank of the layers that have an alpha tensor."""
    layers = {f"{part}.{module}": rank for part, found in ranks.items() for module, rank in found.items()}
    return {layer: alphas[layer] / rank for layer, rank in layers.items() if layer in alphas and rank}


def _scales_in_metadata(
    path: str | Path, metadata: Mapping[str, str], ranks: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """Returns alpha / rank of each layer as diffusers' own header tells them."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        told = json.loads(metadata["lora_adapter_metadata"])
        scales = {}
        for part, of_layer in ranks.items():
            alphas, common = told.get(f"{part}.alpha_pattern") or {}, told.get(f"{part}.lora_alpha")
            for module, rank in of_layer.items():
                alpha = next((a for end, a in alphas.items() if f".{module}".endswith(f".{end}")), common)
                if alpha is not None and rank:
                    scales[f"{part}.{module}"] = float(alpha) / (
                        rank**0.5 if told.get(f"{part}.use_rslora") else rank
                    )
    except (ValueError, RecursionError, AttributeError, TypeError, OverflowError) as error:
        raise AdapterFileError(f"{path}: its lora_adapter_metadata can't be read; {AGAIN}") from error
    return scales


def _photo_in(path: str | Path, metadata: Mapping[str, str]) -> Tensor | None:
    """Returns the photo's latents out of a header, where layouts that know only layers keep them."""
    if PHOTO_KEY not in metadata:
        return None
    try:
        told = json.loads(metadata[PHOTO_KEY])
        shape = [int(side) for side in told["shape"]]
        content = bytearray(base64.b64decode(told["values"], validate=True))
        if len(shape) != 4 or shape[0] != 1 or not content:
            raise ValueError("its shape")
        dtype = {"float16": torch.float16, "float32": torch.float32}[told["dtype"]]
        return torch.frombuffer(content, dtype=dtype).reshape(shape).float()
    except (ValueError, RecursionError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise AdapterFileError(f"{path}: the photo in its header can't be read; {AGAIN}") from error


def _ranks_in(
    path: str | Path, metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Returns the ranks that layers had before they were filled up with zeros."""
    try:
        ranks = json.loads(metadata.get(RANKS_KEY, "{}"))
        rooms = {layer: shapes[f"{layer}.lora_A.weight"][0] for layer in ranks}
        if not all(_is_whole(rank, 1, rooms[layer]) for layer, rank in ranks.items()):
            raise ValueError("a rank")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path}: the ranks in its header can't be read; {AGAIN}") from error
    return dict(ranks)


def photo_text(latents: Tensor) -> str:
    """Returns the photo's latents, float16 or another format as float32, as a header entry."""
    kept = latents if latents.dtype == torch.float16 else latents.float()
    values = base64.b64encode(kept.contiguous().numpy().tobytes()).decode()
    return json.dumps({"shape": list(kept.shape), "dtype": str(kept.dtype)[6:], "values": values})


def _is_line(value: Any) -> bool:
    """Says whether a value is a line of text that is safe to print."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable() and not value.isspace()


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


METADATA_CHECKS: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda value: _is_whole(value, 1, FORMAT_VERSION),
    "base": _is_line,
    "fingerprint": _is_line,
    "family": lambda value: isinstance(value, str) and value in PARTS,
    "rare_tokens": _is_line,
    "recipe": lambda value: isinstance(value, dict),
    "resolution": lambda value: _is_whole(value, 1, 65536),
    "seed": lambda value: _is_whole(value, -(2**63), 2**64 - 1),
    "seconds": _is_duration,
}
