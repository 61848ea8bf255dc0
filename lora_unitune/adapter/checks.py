"""What an adapter file must be before its tensors are read: safetensors, whole, and of the right tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lora_unitune.errors import AdapterFileError
from lora_unitune.families import PARTS, one_line
from lora_unitune.recipe import LoraSettings

LARGEST_HEADER = 16 * 2**20  # bytes
AGAIN = "make or download the file again"
LORA_KEY = re.compile(
    r"(?P<part>unet|text_encoder|text_encoder_2)\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight"
)


def check_is_safetensors(path: Path) -> None:
    """Looks at a file's first bytes before anything parses it.

    Raises:
        AdapterFileError: it isn't there, is a pickle, or is something else.
    """
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
    raise AdapterFileError(f"{path} isn't a complete adapter file; {AGAIN}")


class PartSettings(NamedTuple):
    """The settings of one part's adapters."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def lora_settings(lora: LoraSettings, part: str) -> PartSettings:
    """Returns the settings of a part's adapters."""
    return PartSettings(*(getattr(lora, f"{part}_{name}") for name in PartSettings._fields))


def is_target(key: str, lora: LoraSettings) -> bool:
    """Says whether settings adapt the layer that a tensor of theirs belongs to."""
    layer = key.rsplit(".", 2)[0]
    part = lora_settings(lora, layer.partition(".")[0])
    return bool(part.rank) and layer.endswith(tuple(f".{target}" for target in part.targets))


def check_lora_tensors(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], lora: LoraSettings, family: str
) -> None:
    """Checks that the tensors are pairs A (rank, in, ...), B (out, rank, ...) of modules the recipe names.

    A layer's rank may be below the recipe's: its alpha / rank is the same.

    Raises:
        AdapterFileError: they aren't.
    """
    for key, shape in shapes.items():
        match = LORA_KEY.fullmatch(key)
        if not match or match["part"] not in PARTS[family] or not is_target(key, lora):
            raise AdapterFileError(f"{path}: tensor {shown(key)} doesn't belong in it; {AGAIN}")
        rank = lora_settings(lora, match["part"]).rank
        other = "B" if match["side"] == "A" else "A"
        partner = f"{match['part']}.{match['module']}.lora_{other}.weight"
        if partner not in shapes:
            raise AdapterFileError(f"{path}: tensor {shown(partner)} is missing; {AGAIN}")
        inner = 0 if match["side"] == "A" else 1
        is_matrix = len(shape) in (2, 4) and len(shapes[partner]) == len(shape) and 0 not in shape
        if not is_matrix or shape[inner] > rank or shape[inner] != shapes[partner][1 - inner]:
            raise AdapterFileError(f"{path}: tensor {shown(key)} has shape {shape}, not rank {rank}; {AGAIN}")
    for part in PARTS[family]:
        rank = lora_settings(lora, part).rank
        ranks = {key: shape[0] for key, shape in shapes.items() if _is_of(part, key) and ".lora_A." in key}
        if rank and not ranks:
            raise AdapterFileError(f"{path}: the tensors of its {part} are missing; {AGAIN}")
        if rank and max(ranks.values()) < rank:
            key = min(ranks)
            raise AdapterFileError(
                f"{path}: tensor {shown(key)} has shape {shapes[key]}, not rank {rank}; {AGAIN}"
            )


def _is_of(part: str, key: str) -> bool:
    return key.startswith(f"{part}.")


def check_full_tensors(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], lora: LoraSettings, family: str
) -> None:
    """Checks that the tensors are of the parts that were trained; an Editor checks each against its base."""
    parts = [part for part in PARTS[family] if lora_settings(lora, part).rank]
    for key in shapes:
        if key.partition(".")[0] not in parts or LORA_KEY.fullmatch(key):
            raise AdapterFileError(f"{path}: tensor {shown(key)} doesn't belong in it; {AGAIN}")
    for part in parts:
        if not any(_is_of(part, key) for key in shapes):
            raise AdapterFileError(f"{path}: the tensors of its {part} are missing; {AGAIN}")


def shown(key: str) -> str:
    """Returns a tensor's key as a short piece of one line."""
    return repr(key if len(key) <= 120 else f"{key[:117]}...")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def damaged(path: str | Path, error: Exception) -> AdapterFileError:
    """Returns the error for a file that safetensors can't read."""
    return AdapterFileError(f"{path} is damaged or incomplete ({_reason(error)}); {AGAIN}")
