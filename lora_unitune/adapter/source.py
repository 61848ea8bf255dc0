"""The stored tensors of an adapter: names, shapes and dtypes from safetensors headers.

A header is read without torch or numpy, and checked as strictly as by safetensors, which checks it again
before it reads tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lora_unitune.adapter.checks import check_is_safetensors, damaged

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Dtypes of tensors, as safetensors names them."""

_STRUCT = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b"}
_STRUCT |= {"U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B"}

NUMBERS = tuple(dict.fromkeys((*FLOATS, *_STRUCT)))
"""Dtypes of single numbers, such as alphas."""

BYTES = {
    **{name: struct.calcsize(code) for name, code in _STRUCT.items()},
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Dtypes that a file may use -> bytes per element."""

_METADATA = "__metadata__"
_MOST_AXES = 8  # dimensions of a tensor


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        file: The safetensors file.
        key: Key of the tensor in the file.
        format: Dtype as safetensors names it, such as "F16".
        shape: Shape of the tensor.
        offset: Byte offset of its data in the file.
    """

    file: Path
    key: str
    format: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Source:
    """A file with an adapter's tensors, or a folder of such files.

    Attributes:
        name: Name of the file or folder in messages.
        entries: Stored tensors, by their keys.
        metadata: The `__metadata__` of its header.
        bytes: Size on disk.
    """

    name: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    bytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by key."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def number(self, key: str) -> float:
        """Returns the value of a tensor of one element.

        Raises:
            AdapterFileError: The file can't be read, or has become shorter.
        """
        entry = self.entries[key]
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.offset)
                content = file.read(BYTES[entry.format])
            if entry.format == "BF16":  # the upper half of a float32
                return float(struct.unpack("<f", b"\0\0" + content)[0])
            if entry.format == "F8_E5M2":  # the upper half of a float16
                return float(struct.unpack("<e", b"\0" + content)[0])
            if entry.format == "F8_E4M3":
                return _from_e4m3(content[0])
            return float(struct.unpack(_STRUCT[entry.format], content)[0])
        except (OSError, struct.error, IndexError) as error:
            raise damaged(self.name, error) from error

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors in their stored dtypes, on the CPU.

        Raises:
            AdapterFileError: A file can't be read by safetensors.
        """
        by_file = defaultdict[Path, list[str]](list)
        for key in keys:
            by_file[self.entries[key].file].append(key)
        tensors: dict[str, Tensor] = {}
        for path, names in by_file.items():
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    tensors |= {name: file.get_tensor(self.entries[name].key) for name in names}
            except (OSError, SafetensorError) as error:
                raise damaged(self.name, error) from error
        return tensors


def _from_e4m3(byte: int) -> float:
    """Returns the number that a float of 8 bits holds: a sign, 4 bits of exponent and 3 of mantissa."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if byte >> 7 else size


def read_file(path: Path, name: str) -> Source:
    """Reads the header of a safetensors file.

    Args:
        path: Path of the file.
        name: Name of the file in messages.

    Raises:
        AdapterFileError: The file doesn't exist, isn't safetensors, or is damaged.
    """
    check_is_safetensors(path, name)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("its header isn't an object")
        metadata = header.pop(_METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ values aren't strings")
        places = {key: _place(key, value) for key, value in header.items()}
        _check_places(places, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(name, error) from error
    entries = {
        key: Entry(path, key, dtype_name, shape, 8 + length + start)
        for key, (dtype_name, shape, start, _) in places.items()
    }
    return Source(name, entries, metadata, size)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dictionary; a ValueError if it has a duplicate name."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("its header has a duplicate name")
    return unique


def _place(key: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Returns dtype, shape, and start and end offset of a tensor; a ValueError if one is invalid."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header doesn't describe {key[:120]!r}")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str) or not _are_counts(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"its header doesn't describe {key[:120]!r}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"its header has no offsets of {key[:120]!r}")
    return dtype_name, tuple(shape), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    """Returns whether a value is a list of non-negative 64-bit integers."""
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 2**63 for each in values)


def _check_places(places: Mapping[str, tuple[str, tuple[int, ...], int, int]], size: int) -> None:
    """Checks that tensors fill a file without gaps or overlaps; a ValueError if they don't.

    Unsupported dtypes are left to the check of dtypes.
    """
    position = 0
    for key, (dtype_name, shape, start, end) in sorted(places.items(), key=lambda each: each[1][2:]):
        length = math.prod(shape) * BYTES[dtype_name] if dtype_name in BYTES else end - start
        if start != position or end - start != length:
            raise ValueError(f"the offsets of {key[:120]!r} are wrong")
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
