"""Where an adapter's tensors lie: names, shapes and number formats out of safetensors headers.

A header is read without torch or numpy, and checked as safetensors checks it; before tensors are read,
safetensors does so once more itself.
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

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}
"""Number formats that a file may use -> bytes of a number."""

_STRUCT = {"F64": "<d", "F32": "<f", "F16": "<e"}
_METADATA = "__metadata__"
_MOST_AXES = 8  # of a tensor


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        file: The safetensors file.
        key: Its name there.
        format: Its number format, such as "F16".
        shape: Its shape.
        offset: Bytes of the file before it.
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
        name: What messages call it.
        entries: By the names that the tensors have there.
        metadata: Its header's own entries.
        bytes: Size on the disk.
    """

    name: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    bytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def number(self, key: str) -> float:
        """Returns the value of a tensor that is one number.

        Raises:
            AdapterFileError: The file has changed and is shorter now.
        """
        entry = self.entries[key]
        try:
            with entry.file.open("rb") as file:
                file.seek(entry.offset)
                content = file.read(BYTES[entry.format])
            if entry.format == "BF16":  # the upper half of a float32
                return float(struct.unpack("<f", b"\0\0" + content)[0])
            return float(struct.unpack(_STRUCT[entry.format], content)[0])
        except (OSError, struct.error) as error:
            raise damaged(self.name, error) from error

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors in their own number formats, on the CPU.

        Raises:
            AdapterFileError: safetensors finds a file damaged.
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


def read_file(path: Path, name: str) -> Source:
    """Reads the header of a safetensors file.

    Args:
        path: Path of the file.
        name: What messages call it.

    Raises:
        AdapterFileError: It isn't there, isn't safetensors, or is damaged.
    """
    check_is_safetensors(path, name)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length).decode(), object_pairs_hook=_without_twins)
        if not isinstance(header, dict):
            raise ValueError("its header isn't an object")
        metadata = header.pop(_METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its header's own entries aren't texts")
        places = {key: _place(key, value) for key, value in header.items()}
        _check_places(places, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(name, error) from error
    entries = {
        key: Entry(path, key, number_format, shape, 8 + length + start)
        for key, (number_format, shape, start, _) in places.items()
    }
    return Source(name, entries, metadata, size)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON as a dictionary, and refuses one that has a name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _place(key: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Returns number format, shape, and first and last byte of a tensor; a ValueError where one is impossible."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header doesn't describe {key[:120]!r}")
    number_format, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(number_format, str) or not _are_counts(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"its header doesn't describe {key[:120]!r}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"its header doesn't say where {key[:120]!r} lies")
    return number_format, tuple(shape), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    """Says whether a value is a list of whole numbers that a 64-bit machine counts with."""
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 2**63 for each in values)


def _check_places(places: Mapping[str, tuple[str, tuple[int, ...], int, int]], size: int) -> None:
    """Checks that tensors fill a file without gaps or overlaps; a ValueError where they don't.

    Formats that no adapter may have are left to the check of formats.
    """
    position = 0
    for key, (number_format, shape, start, end) in sorted(places.items(), key=lambda each: each[1][2:]):
        length = math.prod(shape) * BYTES[number_format] if number_format in BYTES else end - start
        if start != position or end - start != length:
            raise ValueError(f"the place of {key[:120]!r} is wrong")
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
