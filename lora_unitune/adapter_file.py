"""The one file people share: save, load, describe and check an adapter.

The file is safetensors. Its keys and its "lora_adapter_metadata" are those of diffusers' `save_lora_weights`,
so a plain pipeline loads it; a second header entry, "lora_unitune", holds what an edit needs besides.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import Base
from lora_unitune.output import write_atomically
from lora_unitune.recipe import LoraSettings, Recipe

FORMAT_VERSION = 1
METADATA_KEY = "lora_unitune"
PHOTO_KEY = "lora_unitune.photo_latents"
LARGEST_HEADER = 16 * 2**20  # bytes

_AGAIN = "make or download the file again"
_PARTS = ("unet", "text_encoder")
_LORA_KEY = re.compile(r"(?P<part>unet|text_encoder)\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_NUMBER_FORMATS = ("F16", "BF16", "F32")
_LORA_CONFIG_KEYS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a fit learned about one photo, and everything an edit has to know about it; holds no model.

    Attributes:
        tensors: by "<part>.<module>.lora_A.weight" and "...lora_B.weight" (method "lora"), or by
            "<part>.<parameter>" (method "full"); float32, on the CPU.
        rare_tokens: the words that stand for the photo.
        recipe: every setting of the fit, and the defaults of its edits.
        base: name of the base it was fitted on, as the user gave it.
        fingerprint: of that base.
        photo_latents: (1, c, h, w) float32, mean of the VAE's posterior, scaled; None keeps the photo
            out of the file.
        resolution: side of the fitted photo in pixels.
        seed: of the fit.
        seconds: the training took.
        family: kind of the base.
        format_version: of the file.
    """

    tensors: dict[str, Tensor]
    rare_tokens: str
    recipe: Recipe
    base: str
    fingerprint: str
    photo_latents: Tensor | None
    resolution: int
    seed: int
    seconds: float
    family: str = "sd"
    format_version: int = FORMAT_VERSION

    def save(self, path: str | Path, overwrite: bool = False, dtype: torch.dtype = torch.float16) -> None:
        """Writes the adapter file: all of it, or nothing.

        Args:
            path: of the file.
            overwrite: whether a file that is there may be replaced.
            dtype: number format of the tensors in the file.

        Raises:
            OutputError: the file is there already, or can't be written.
            AdapterFileError: a tensor has values that `dtype` can't hold.
        """
        tensors = self._file_tensors(dtype)
        _check_finite("this adapter", tensors)
        metadata = {"format": "pt", METADATA_KEY: json.dumps(_metadata_of(self), sort_keys=True)}
        if self.recipe.fit.method == "lora":
            metadata["lora_adapter_metadata"] = json.dumps(
                _diffusers_metadata(self.recipe.lora), sort_keys=True
            )
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata), overwrite)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the tensors (as float16); a saved copy has the same."""
        found = hashlib.sha256()
        for key, tensor in sorted(self._file_tensors(torch.float16).items()):
            found.update(key.encode())
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:16]

    def _file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the tensors as a file holds them, the photo's latents among them."""
        photo = {} if self.photo_latents is None else {PHOTO_KEY: self.photo_latents}
        tensors = {**self.tensors, **photo}
        return {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Reads an adapter file; only safetensors, never a pickle.

        Args:
            path: of the file.

        Raises:
            AdapterFileError: it isn't there, isn't an adapter file, is damaged, or has the wrong tensors.
        """
        content = _read_content(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {key: file.get_tensor(key) for key in content.shapes}
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
        _check_finite(str(path), tensors)
        tensors = {key: tensor.float() for key, tensor in tensors.items()}
        photo_latents = tensors.pop(PHOTO_KEY, None)
        return cls(tensors=tensors, photo_latents=photo_latents, **content.values)


def describe(path: str | Path) -> dict[str, Any]:
    """Tells what is in an adapter file, from its header alone.

    Args:
        path: of the file.

    Returns:
        Values that JSON can hold; "ranks" and "targets" are by part, and empty for method "full".

    Raises:
        AdapterFileError: it isn't there, isn't an adapter file, or has the wrong tensors.
    """
    content = _read_content(path)
    recipe: Recipe = content.values["recipe"]
    is_lora = recipe.fit.method == "lora"
    settings = {part: lora_settings(recipe.lora, part) for part in _PARTS} if is_lora else {}
    weights = {key: shape for key, shape in content.shapes.items() if key != PHOTO_KEY}
    return {
        "path": str(path),
        **{key: value for key, value in content.values.items() if key != "recipe"},
        "method": recipe.fit.method,
        "ranks": {part: rank for part, (rank, _) in settings.items()},
        "targets": {part: list(targets) for part, (rank, targets) in settings.items() if rank},
        "steps": recipe.fit.steps,
        "photo_embedded": PHOTO_KEY in content.shapes,
        "tensors": len(weights),
        "parameters": sum(math.prod(shape) for shape in weights.values()),
        "bytes": Path(path).stat().st_size,
        "recipe": recipe.to_dict(),
    }


def check_fits(adapter: Adapter, base: Base) -> None:
    """Checks that an adapter was made for a base.

    Raises:
        AdapterFileError: it was made for another.
    """
    if adapter.fingerprint != base.fingerprint:
        raise AdapterFileError(
            f"the adapter was made for base {adapter.base!r} ({adapter.fingerprint}) and this is "
            f"{base.name!r} ({base.fingerprint}); choose that base, or fit the photo again on this one"
        )


def lora_settings(lora: LoraSettings, part: str) -> tuple[int, tuple[str, ...]]:
    """Returns the rank and the targets of a part's adapters."""
    if part == "unet":
        return lora.unet_rank, lora.unet_targets
    return lora.text_encoder_rank, lora.text_encoder_targets


@dataclass(frozen=True)
class _Content:
    """An adapter file's checked header: the shape of each tensor, and the fields of `Adapter` it holds."""

    shapes: dict[str, tuple[int, ...]]
    values: dict[str, Any]


def _read_content(path: str | Path) -> _Content:
    """Reads and checks all but the tensors' values."""
    _check_is_safetensors(Path(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            formats = {key: piece.get_dtype() for key, piece in slices.items()}
            shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error
    values = _checked_metadata(path, metadata)
    for key, number_format in formats.items():
        if number_format not in _NUMBER_FORMATS:
            allowed = ", ".join(_NUMBER_FORMATS)
            raise AdapterFileError(f"{path}: tensor {_shown(key)} is {number_format}; allowed are {allowed}")
    photo_shape = shapes.get(PHOTO_KEY, (1, 1, 1, 1))
    if len(photo_shape) != 4 or photo_shape[0] != 1 or 0 in photo_shape:
        raise AdapterFileError(
            f"{path}: tensor {PHOTO_KEY!r} has shape {photo_shape}, not (1, c, h, w); {_AGAIN}"
        )
    weights = {key: shape for key, shape in shapes.items() if key != PHOTO_KEY}
    if values["recipe"].fit.method == "lora":
        _check_lora_tensors(path, weights, values["recipe"].lora)
    else:
        _check_full_tensors(path, weights, values["recipe"].lora)
    return _Content(shapes, values)


def _check_is_safetensors(path: Path) -> None:
    """Looks at a file's first bytes before anything parses it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise AdapterFileError(f"{path} doesn't exist; give the path of an adapter file") from None
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} can't be read ({_reason(error)}); give an adapter file") from error
    header = int.from_bytes(start, "little")
    if len(start) == 8 and header <= min(LARGEST_HEADER, size - 8):
        return
    # A header's length may begin with the same two bytes as a pickle (0x80, protocol), never the third.
    is_pickle = start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and any(start[2:3])
    if start.startswith(b"PK") or is_pickle:
        raise AdapterFileError(
            f"{path} is a pickle or a zip, which can run code when opened, and is never loaded; give a "
            "safetensors file that lora-unitune wrote"
        )
    raise AdapterFileError(f"{path} isn't a complete adapter file; {_AGAIN}")


def _checked_metadata(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of `Adapter` in a file's header, each of the right type."""
    if METADATA_KEY not in metadata:
        raise AdapterFileError(f"{path} has no lora_unitune header; give a file that lora-unitune wrote")
    try:
        found = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path}: its lora_unitune header isn't valid JSON; {_AGAIN}")
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} is of format version {version} and this lora-unitune reads up to {FORMAT_VERSION}; "
            "upgrade lora-unitune"
        )
    for name, is_valid in _METADATA_CHECKS.items():
        if name not in found or not is_valid(found[name]):
            raise AdapterFileError(
                f"{path}: {name!r} in its lora_unitune header is {'wrong' if name in found else 'missing'}; "
                f"{_AGAIN}"
            )
    try:
        recipe = Recipe.from_dict(found["recipe"])
    except RecipeError as error:
        raise AdapterFileError(f"{path}: the recipe in its header is wrong: {error}") from error
    return {**{name: found[name] for name in _METADATA_CHECKS}, "recipe": recipe}


def _is_line(value: Any) -> bool:
    """Says whether a value is a line of text that is safe to print."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable() and not value.isspace()


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


_METADATA_CHECKS: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda value: _is_whole(value, 1, FORMAT_VERSION),
    "base": _is_line,
    "fingerprint": _is_line,
    "family": _is_line,
    "rare_tokens": _is_line,
    "recipe": lambda value: isinstance(value, dict),
    "resolution": lambda value: _is_whole(value, 1, 65536),
    "seed": lambda value: _is_whole(value, -(2**63), 2**64 - 1),
    "seconds": _is_duration,
}


def _metadata_of(adapter: Adapter) -> dict[str, Any]:
    """Returns an adapter's own header entry."""
    values = {name: getattr(adapter, name) for name in _METADATA_CHECKS}
    return {**values, "recipe": adapter.recipe.to_dict()}


def _diffusers_metadata(lora: LoraSettings) -> dict[str, Any]:
    """Returns what diffusers has to know to load the adapters at the right strength.

    `save_lora_weights` writes every field of a `LoraConfig`. Here it is only those that matter, so that other
    versions of peft, which refuse fields they don't know, can read the file too.
    """
    from lora_unitune.adapters import lora_config

    metadata: dict[str, Any] = {}
    for part in _PARTS:
        if lora_settings(lora, part)[0]:
            config = lora_config(part, lora).to_dict()
            for key in _LORA_CONFIG_KEYS:
                value = config[key]
                metadata[f"{part}.{key}"] = sorted(value) if isinstance(value, (set, tuple)) else value
    return metadata


def _check_lora_tensors(path: str | Path, shapes: Mapping[str, tuple[int, ...]], lora: LoraSettings) -> None:
    """Checks that the tensors are pairs A (rank, in, ...), B (out, rank, ...) of modules the recipe names."""
    for key, shape in shapes.items():
        match = _LORA_KEY.fullmatch(key)
        rank, targets = lora_settings(lora, match["part"]) if match else (0, ())
        ends = tuple(f".{target}" for target in targets)
        if not match or not rank or not f".{match['module']}".endswith(ends):
            raise AdapterFileError(f"{path}: tensor {_shown(key)} doesn't belong in it; {_AGAIN}")
        side, other = ("A", "B") if match["side"] == "A" else ("B", "A")
        partner = f"{match['part']}.{match['module']}.lora_{other}.weight"
        if partner not in shapes:
            raise AdapterFileError(f"{path}: tensor {_shown(partner)} is missing; {_AGAIN}")
        dimension = 0 if side == "A" else 1
        is_matrix = len(shape) in (2, 4) and len(shapes[partner]) == len(shape) and 0 not in shape
        if not is_matrix or shape[dimension] != rank:
            raise AdapterFileError(
                f"{path}: tensor {_shown(key)} has shape {shape}, not rank {rank}; {_AGAIN}"
            )
    for part in _PARTS:
        if lora_settings(lora, part)[0] and not any(key.startswith(f"{part}.") for key in shapes):
            raise AdapterFileError(f"{path}: the tensors of its {part} are missing; {_AGAIN}")


def _check_full_tensors(path: str | Path, shapes: Mapping[str, tuple[int, ...]], lora: LoraSettings) -> None:
    """Checks that the tensors are of the parts that were trained; an Editor checks each against its base."""
    parts = [part for part in _PARTS if lora_settings(lora, part)[0]]
    for key in shapes:
        if key.partition(".")[0] not in parts or _LORA_KEY.fullmatch(key):
            raise AdapterFileError(f"{path}: tensor {_shown(key)} doesn't belong in it; {_AGAIN}")
    for part in parts:
        if not any(key.startswith(f"{part}.") for key in shapes):
            raise AdapterFileError(f"{path}: the tensors of its {part} are missing; {_AGAIN}")


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{name}: tensor {_shown(key)} isn't finite; fit the photo again")


def _shown(key: str) -> str:
    """Returns a tensor's key as a short piece of one line."""
    return repr(key if len(key) <= 120 else f"{key[:117]}...")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text[:200] or type(error).__name__


def _damaged(path: str | Path, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{path} is damaged or incomplete ({_reason(error)}); {_AGAIN}")
