"""Checks of an adapter file before its tensors are read: complete safetensors, with the right tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_unitune.errors import AdapterFileError, one_line
from lora_unitune.families import Family
from lora_unitune.settings import LoraSettings

LARGEST_HEADER = 16 * 2**20  # bytes
AGAIN = "make or download the file again"
LORA_KEY = re.compile(r"(?P<part>[^.]+)\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
STAGE_KEY = re.compile(r"stage_\d+\.", re.ASCII)
"""Prefix of the keys of a later stage, such as "stage_2.<part>.<module>": reserved."""


def check_is_safetensors(path: Path, name: str = "") -> None:
    """Checks a file's first bytes before anything parses it.

    Args:
        path: Path of the file.
        name: Name of the file in messages; empty takes the path.

    Raises:
        AdapterFileError: The file doesn't exist, is a pickle, or isn't safetensors.
    """
    name = name or str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise AdapterFileError(f"{name} doesn't exist; give the path of an adapter file") from None
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{name} can't be read ({_reason(error)}); give an adapter file") from error
    header = int.from_bytes(start, "little")
    if len(start) == 8 and header <= min(LARGEST_HEADER, size - 8):
        return
    # A header's length may begin with the same two bytes as a pickle (0x80, protocol), never the third.
    is_pickle = start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and any(start[2:3])
    if start.startswith(b"PK") or is_pickle:
        raise AdapterFileError(
            f"{name} is a pickle or a zip, which can run code when opened, and is never loaded; give a "
            "safetensors file that lora-unitune wrote"
        )
    raise AdapterFileError(f"{name} isn't a complete adapter file; {AGAIN}")


def layers_of(keys: Iterable[str], part: str = "") -> list[str]:
    """Returns the layers of a LoRA adapter, "<part>.<module>", in the order of its tensors.

    Args:
        keys: Keys of its tensors, "<part>.<module>.lora_A.weight" and "...lora_B.weight".
        part: Name of a part; "" takes all.
    """
    end, start = ".lora_A.weight", f"{part}." if part else ""
    return [key.removesuffix(end) for key in keys if key.startswith(start) and key.endswith(end)]


def is_target(key: str, lora: Mapping[str, LoraSettings]) -> bool:
    """Returns whether the settings, by part, adapt the layer of a tensor."""
    layer = key.rsplit(".", 2)[0]
    settings = lora.get(layer.partition(".")[0])
    return settings is not None and settings.rank > 0 and layer.endswith(_ends(settings.targets))


@functools.lru_cache(maxsize=64)
def _ends(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path suffixes that targets match."""
    return tuple(f".{target}" for target in targets)


def check_stages(name: str, shapes: Mapping[str, tuple[int, ...]], family: Family) -> None:
    """Checks that no tensor belongs to a later stage, which no family has yet.

    Raises:
        AdapterFileError: A tensor belongs to a later stage.
    """
    key = next((key for key in shapes if STAGE_KEY.match(key)), None)
    if key is not None:
        raise AdapterFileError(
            f"{name}: tensor {shown(key)} is of a later stage, and {family.title} has only one; upgrade "
            "lora-unitune, or give an adapter of one stage"
        )


def check_lora_tensors(
    name: str, shapes: Mapping[str, tuple[int, ...]], lora: Mapping[str, LoraSettings], family: Family
) -> None:
    """Checks that the tensors are pairs A (rank, in, ...), B (out, rank, ...) of the recipe's target modules.

    A layer's rank may be below the recipe's: its alpha / rank is the same.

    Args:
        name: Name of the file in messages.
        shapes: Shapes of its tensors, by key.
        lora: The recipe's settings by part.
        family: The base's family.

    Raises:
        AdapterFileError: A tensor is missing, surplus or of the wrong shape.
    """
    for key, shape in shapes.items():
        match = LORA_KEY.fullmatch(key)
        if not match or match["part"] not in family.parts or not is_target(key, lora):
            raise AdapterFileError(f"{name}: tensor {shown(key)} doesn't belong in it; {AGAIN}")
        rank = lora[match["part"]].rank
        other = "B" if match["side"] == "A" else "A"
        partner = f"{match['part']}.{match['module']}.lora_{other}.weight"
        if partner not in shapes:
            raise AdapterFileError(f"{name}: tensor {shown(partner)} is missing; {AGAIN}")
        inner = 0 if match["side"] == "A" else 1
        is_matrix = (
            len(shape) in (2, 4) and 0 not in shape and (match["side"] == "A" or set(shape[2:]) <= {1})
        )
        if not is_matrix or shape[inner] > rank or shape[inner] != shapes[partner][1 - inner]:
            raise AdapterFileError(f"{name}: tensor {shown(key)} has shape {shape}, not rank {rank}; {AGAIN}")
    for part, settings in lora.items():
        ranks = {key: shape[0] for key, shape in shapes.items() if _is_of(part, key) and ".lora_A." in key}
        if settings.rank and not ranks:
            raise AdapterFileError(f"{name}: the tensors of its {part} are missing; {AGAIN}")
        if settings.rank and max(ranks.values()) < settings.rank:
            key = min(ranks)
            raise AdapterFileError(
                f"{name}: tensor {shown(key)} has shape {shapes[key]}, not rank {settings.rank}; {AGAIN}"
            )


def check_full_tensors(
    name: str, shapes: Mapping[str, tuple[int, ...]], lora: Mapping[str, LoraSettings]
) -> None:
    """Checks that the tensors belong to the trained parts; an Editor checks their shapes against its base.

    Raises:
        AdapterFileError: A tensor belongs to another part, or a part has none.
    """
    parts = [part for part, settings in lora.items() if settings.rank]
    for key in shapes:
        if key.partition(".")[0] not in parts or LORA_KEY.fullmatch(key):
            raise AdapterFileError(f"{name}: tensor {shown(key)} doesn't belong in it; {AGAIN}")
    for part in parts:
        if not any(_is_of(part, key) for key in shapes):
            raise AdapterFileError(f"{name}: the tensors of its {part} are missing; {AGAIN}")


def _is_of(part: str, key: str) -> bool:
    return key.startswith(f"{part}.")


def is_line(value: Any) -> bool:
    """Returns whether a value is one printable line of text."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable() and not value.isspace()


def shown(key: str) -> str:
    """Returns a tensor's key, quoted and shortened for messages."""
    return repr(key if len(key) <= 120 else f"{key[:117]}...")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def damaged(name: str, error: Exception) -> AdapterFileError:
    """Returns the error for a file that can't be read as safetensors."""
    return AdapterFileError(f"{name} is damaged or incomplete ({_reason(error)}); {AGAIN}")
