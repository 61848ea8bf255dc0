"""The adapters that were used last, kept in memory within a budget."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.convert import open_adapter
from lora_unitune.errors import AdapterFileError


class AdapterCache:
    """Opens adapter files; one that was opened before and hasn't changed since isn't read again."""

    def __init__(self, budget: int) -> None:
        """Takes how many bytes of tensors may stay in memory; 0 keeps nothing."""
        self.budget = budget
        self._kept: OrderedDict[tuple[str, str, int, int], Adapter] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of the tensors that are kept."""
        return sum(_bytes(adapter) for adapter in self._kept.values())

    def open(self, path: str | Path, tokens: str = "") -> Adapter:
        """Opens an adapter in any layout, as `convert.open_adapter` does.

        Args:
            path: of the file or the folder.
            tokens: the words that call its subject, where the file doesn't say them.

        Raises:
            AdapterFileError: it can't be read, or isn't an adapter.
        """
        place = Path(path)
        try:
            state = place.stat()
        except (OSError, ValueError):
            raise AdapterFileError(f"{path} doesn't exist; give the path of an adapter file") from None
        if place.is_dir():  # whose own date doesn't tell of changes in its files
            return open_adapter(place, tokens)
        key = (str(place.resolve()), tokens, state.st_mtime_ns, state.st_size)
        adapter = self._kept.pop(key, None) or open_adapter(place, tokens)
        self._kept[key] = adapter
        size = self.size
        while size > self.budget:
            size -= _bytes(self._kept.popitem(last=False)[1])
        return adapter


def _bytes(adapter: Adapter) -> int:
    photo = [] if adapter.photo_latents is None else [adapter.photo_latents]
    return sum(tensor.nbytes for tensor in [*adapter.tensors.values(), *photo])
