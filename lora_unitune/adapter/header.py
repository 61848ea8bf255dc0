"""An adapter file's header: its values, the keys of its tensors, and the checks of both.

All checks run before a tensor is read, and without torch. Supported are files of this package and of other
tools, which lack the "lora_unitune" entry, in diffusers' layout, in kohya's layout and in PEFT folders.
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

from lora_unitune.adapter.checks import (
    AGAIN,
    check_full_tensors,
    check_lora_tensors,
    check_stages,
    is_line,
    shown,
)
from lora_unitune.adapter.compose import plain_shapes
from lora_unitune.adapter.dora import NOTE, split_magnitudes
from lora_unitune.adapter.foreign import family_of, foreign_values, lora_of, remade, stated_base
from lora_unitune.adapter.int8 import INT8_SUFFIX, SCALES_KEY, rank_axis
from lora_unitune.adapter.peft import CONFIG, WEIGHTS, read_folder
from lora_unitune.adapter.source import FLOATS, NUMBERS, Source, read_file
from lora_unitune.adapter.spelling import SKIPPED, check_is_lora, our_key
from lora_unitune.adapter.versions import from_version_1
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import FAMILIES, Family
from lora_unitune.recipe import Recipe

FORMAT_VERSION = 3
METADATA_KEY = "lora_unitune"
PHOTO_KEY = "lora_unitune.photo_latents"
RANKS_KEY = "lora_unitune.ranks"

_DATE = re.compile(r"(\d{4}-\d{2}-\d{2})?", re.ASCII)
_DIGEST = re.compile(r"([0-9a-f]{32})?", re.ASCII)
_WORD = re.compile(r"\w{0,32}", re.ASCII)
_LONGEST_SIDE = 65536


@dataclass(frozen=True)
class Content:
    """An adapter's checked header.

    Attributes:
        source: The file or folder that it was read from.
        keys: Key in this package -> key in the file, for each tensor.
        shapes: Shape of each tensor, by this package's keys.
        values: The fields of `Adapter` that are stored in the header.
        version: Format version of the file; None for a file of another tool.
        factors: Factor of each layer's B, by layer, so that all layers of a part share one alpha / rank.
        photo: Shape, dtype and bytes of the photo's latents, if they are stored in the header.
        ranks: Original rank of each layer that is stored zero-padded to its part's rank.
        eight_bit: Whether the matrices are int8 with scales.
        magnitudes: Key in this package and shape of the magnitudes of a DoRA, by layer; they aren't in `shapes`.
    """

    source: Source
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, Any]
    version: int | None
    factors: dict[str, float]
    photo: tuple[tuple[int, ...], str, bytes] | None
    ranks: dict[str, int]
    eight_bit: bool
    magnitudes: dict[str, tuple[str, tuple[int, ...]]]


def locate(place: str | Path) -> Path:
    """Returns the local path of an adapter, downloading one on the hub.

    Args:
        place: Path of a file or a folder, or "hub://owner/name" with or without "/file.safetensors".

    Raises:
        SettingError: The hub address is invalid, or names a repository with several files.
        HubError: The hub can't be reached, or has no such file.
    """
    if not str(place).startswith("hub://"):
        return Path(place)
    from lora_unitune.adapter.hub import download  # imports the hub's client only where it is used

    return download(str(place))


def open_source(place: str | Path) -> Source:
    """Reads the headers of an adapter's file or folder.

    Args:
        place: A place as for `locate`: a file in diffusers' or kohya's layout, or a PEFT folder.

    Raises:
        AdapterFileError: The file doesn't exist, isn't an adapter, or is damaged.
        SettingError: The hub address is invalid, or names a repository with several files.
        HubError: The hub can't be reached, or has no such file.
    """
    path = locate(place)
    if _is_folder(path):
        return read_folder(path)
    if path.name == WEIGHTS and path.with_name(CONFIG).is_file():
        return read_folder(path.parent)  # the alphas are in the other file
    return read_file(path, str(place))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except ValueError:  # a path with a null character
        return False


def read_content(source: Source) -> Content:
    """Checks everything but the tensors' values, and returns the header's content.

    Raises:
        AdapterFileError: The source isn't an adapter, or has the wrong tensors.
    """
    name, metadata = source.name, source.metadata
    stored = {key: shape for key, shape in source.shapes.items() if not SKIPPED.match(key)}
    notes: tuple[str, ...] = (
        ("its embeddings (bundle_emb) are ignored",) if len(stored) < len(source.entries) else ()
    )
    alphas = {key for key, shape in stored.items() if key.endswith(".alpha") and math.prod(shape) == 1}
    eight_bit = SCALES_KEY in stored
    if METADATA_KEY not in metadata:
        check_is_lora(name, list(stored))
    _check_formats(source, alphas)
    if eight_bit:
        _check_eight_bit(name, stored)
    values = _checked_values(name, metadata) if METADATA_KEY in metadata else None
    family = FAMILIES[values["family"]] if values else family_of(stored, metadata)
    check_stages(name, stored, family)
    keys = _our_keys(name, stored, family, stated_base(metadata))
    shapes, layer_ranks = plain_shapes(
        name, {ours: stored[key] for ours, key in keys.items() if key not in alphas}
    )
    shapes, magnitudes = split_magnitudes(name, shapes)
    if values and magnitudes:
        raise AdapterFileError(
            f"{name}: tensor {shown(next(iter(magnitudes.values()))[0])} doesn't belong in it; {AGAIN}"
        )
    photo_shape = shapes.get(PHOTO_KEY, (1, 1, 1, 1))
    if len(photo_shape) != 4 or photo_shape[0] != 1 or 0 in photo_shape:
        raise AdapterFileError(
            f"{name}: tensor {PHOTO_KEY!r} has shape {photo_shape}, not (1, c, h, w); {AGAIN}"
        )
    weights = {key: shape for key, shape in shapes.items() if key not in (PHOTO_KEY, SCALES_KEY)}
    numbers = {ours.removesuffix(".alpha"): source.number(key) for ours, key in keys.items() if key in alphas}
    for layer in layer_ranks.keys() & numbers.keys():  # alpha / rank is that of the original rank
        numbers[layer] *= weights[f"{layer}.lora_A.weight"][0] / layer_ranks[layer]
    version, factors, ranks = None, dict[str, float](), dict[str, int]()
    if values is None:
        lora, factors = lora_of(name, weights, metadata, numbers, family, layer_ranks, magnitudes)
        notes += (NOTE,) if magnitudes else ()
        values = foreign_values(metadata, family, lora)
    else:
        version, recipe = values.pop("format_version"), values["recipe"]
        if recipe.fit.method == "full":
            check_full_tensors(name, weights, recipe.lora)
        elif numbers and not _fits(name, weights, recipe, numbers, family):
            lora, factors = lora_of(name, weights, {}, numbers, family)
            values["recipe"] = remade(recipe, lora)
            notes += (
                "another tool changed its ranks or alphas: they are those of its tensors, not of its header",
            )
        else:
            check_lora_tensors(name, weights, recipe.lora, family)
            ranks = _ranks_in(name, metadata, weights)
    return Content(
        source=source,
        keys={ours: key for ours, key in keys.items() if key not in alphas},
        shapes=shapes,
        values=values | {"notes": notes},
        version=version,
        factors=factors,
        photo=_photo_in(name, metadata),
        ranks=ranks,
        eight_bit=eight_bit,
        magnitudes=magnitudes,
    )


def _fits(
    name: str,
    weights: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    alphas: Mapping[str, float],
    family: Family,
) -> bool:
    """Returns whether a header's recipe is that of the tensors, in a layout that stores alphas beside them."""
    try:
        check_lora_tensors(name, weights, recipe.lora, family)
    except AdapterFileError:
        return not all(key.rsplit(".", 2)[0] in alphas for key in weights)  # then its tensors are incomplete
    return all(
        math.isclose(alphas[layer], recipe.lora[layer.partition(".")[0]].scale * shape[0], rel_tol=0.01)
        for key, shape in weights.items()
        if ".lora_A." in key and (layer := key.rsplit(".", 2)[0]) in alphas
    )


def _check_formats(source: Source, alphas: set[str]) -> None:
    """Checks that every tensor has an allowed dtype."""
    for key, entry in source.entries.items():
        allowed = ("I8",) if key.endswith(INT8_SUFFIX) else NUMBERS if key in alphas else FLOATS
        if entry.format not in allowed and not SKIPPED.match(key):
            raise AdapterFileError(
                f"{source.name}: tensor {shown(key)} is {_printable(entry.format)}; allowed are {', '.join(allowed)}"
            )


def _printable(dtype_name: str) -> str:
    """Returns a dtype that is safe to print."""
    return dtype_name if re.fullmatch(r"\w{1,16}", dtype_name, re.ASCII) else shown(dtype_name)


def _check_eight_bit(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a file with scales has one for each rank, and that all its matrices are int8."""
    matrices = {key: shape for key, shape in shapes.items() if key not in (PHOTO_KEY, SCALES_KEY)}
    wrong = [key for key, shape in matrices.items() if not key.endswith(INT8_SUFFIX) or len(shape) < 2]
    if wrong:
        raise AdapterFileError(f"{name}: tensor {shown(wrong[0])} isn't a matrix in 8 bits; {AGAIN}")
    ranks = sum(shape[rank_axis(key)] for key, shape in matrices.items())
    if shapes[SCALES_KEY] != (ranks,):
        raise AdapterFileError(
            f"{name}: tensor {SCALES_KEY!r} has shape {shapes[SCALES_KEY]}, not ({ranks},); {AGAIN}"
        )


def _our_keys(
    name: str, stored: Mapping[str, tuple[int, ...]], family: Family, stated: str
) -> dict[str, str]:
    """Returns key in this package -> key in the file, for each tensor."""
    keys: dict[str, str] = {}
    for key in stored:
        ours = (
            f"{key.removesuffix(INT8_SUFFIX)}.weight" if key.endswith(INT8_SUFFIX) else our_key(key, family)
        )
        if ours is None:
            raise AdapterFileError(
                f"{name}: tensor {shown(key)} is of a layer that {family.title} doesn't have"
                + (f", and its header says that it is for {shown(stated)}" if stated else "")
                + f"; give an adapter for {' or '.join(row.title for row in FAMILIES.values())}"
            )
        if ours in keys:
            raise AdapterFileError(f"{name}: tensor {shown(key)} is in it twice, under two names; {AGAIN}")
        keys[ours] = key
    return keys


def _checked_values(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of `Adapter` in a file's header, each of a valid type, and its format version."""
    try:
        header = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise AdapterFileError(f"{name}: its lora_unitune header isn't valid JSON; {AGAIN}")
    version = header.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{name} is of format version {version} and this lora-unitune reads up to {FORMAT_VERSION}; "
            "upgrade lora-unitune"
        )
    if version == 1 and type(version) is int:
        header = from_version_1(header)
    for field, is_valid in {**METADATA_CHECKS, **OPTIONAL_CHECKS}.items():
        is_there = field in header
        if (is_there or field in METADATA_CHECKS) and not (is_there and is_valid(header[field])):
            raise AdapterFileError(
                f"{name}: {field!r} in its lora_unitune header is {'wrong' if is_there else 'missing'}; "
                f"{AGAIN}"
            )
    try:
        recipe = FAMILIES[header["family"]].complete(Recipe.from_dict(header["recipe"]))
    except RecipeError as error:
        raise AdapterFileError(f"{name}: the recipe in its header is wrong: {error}") from error
    values = {field: header[field] for field in METADATA_CHECKS}
    values |= {field: header.get(field, "") for field in OPTIONAL_CHECKS}
    sizes = {name: tuple(header.get(name, ())) for name in ("size", "photo_size")}
    return {**values, **sizes, "recipe": recipe, "format_version": version}


def _photo_in(name: str, metadata: Mapping[str, str]) -> tuple[tuple[int, ...], str, bytes] | None:
    """Returns the photo's latents from a header, where layouts that can hold only layers store them."""
    if PHOTO_KEY not in metadata:
        return None
    try:
        entry = json.loads(metadata[PHOTO_KEY])
        shape, dtype_name = entry["shape"], entry["dtype"]
        content = base64.b64decode(entry["values"], validate=True)
        if len(shape) != 4 or shape[0] != 1 or not all(_is_whole(side, 1, _LONGEST_SIDE) for side in shape):
            raise ValueError("its shape")
        if len(content) != math.prod(shape) * {"float16": 2, "float32": 4}[dtype_name]:
            raise ValueError("its length")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{name}: the photo in its header can't be read; {AGAIN}") from error
    return tuple(shape), dtype_name, content


def _ranks_in(
    name: str, metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Returns the ranks of layers before they were zero-padded."""
    try:
        ranks = json.loads(metadata.get(RANKS_KEY, "{}"))
        padded = {layer: shapes[f"{layer}.lora_A.weight"][0] for layer in ranks}
        if not all(_is_whole(rank, 1, padded[layer]) for layer, rank in ranks.items()):
            raise ValueError("a rank")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{name}: the ranks in its header can't be read; {AGAIN}") from error
    return dict(ranks)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_size(value: Any, longest: int = _LONGEST_SIDE) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(n, 1, longest) for n in value)


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


METADATA_CHECKS: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda value: _is_whole(value, 2, FORMAT_VERSION),
    "base": is_line,
    "fingerprint": is_line,
    "family": lambda value: isinstance(value, str) and value in FAMILIES,
    "rare_tokens": is_line,
    "recipe": lambda value: isinstance(value, dict),
    "size": _is_size,
    "seed": lambda value: _is_whole(value, -(2**63), 2**64 - 1),
    "seconds": _is_duration,
}
"""Required fields of a header of the newest version, and their checks."""

OPTIONAL_CHECKS: dict[str, Callable[[Any], bool]] = {
    "date": lambda value: isinstance(value, str) and bool(_DATE.fullmatch(value)),
    "photo_digest": lambda value: isinstance(value, str) and bool(_DIGEST.fullmatch(value)),
    "photo_size": lambda value: _is_size(value, 2**31),
    "prediction": lambda value: isinstance(value, str) and bool(_WORD.fullmatch(value)),
}
"""Optional fields, and their checks."""
