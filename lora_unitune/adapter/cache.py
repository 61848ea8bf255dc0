"""A cache of the most recently used adapters, within a memory budget."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.header import locate
from lora_unitune.errors import AdapterFileError


class AdapterCache:
    """A least-recently-used cache of adapters; a file that hasn't changed since is not read again."""

    def __init__(self, budget: int) -> None:
        """Makes an empty cache.

        Args:
            budget: Bytes of tensors that may stay in memory; 0 disables the cache.
        """
        self.budget = budget
        self._kept: OrderedDict[tuple[str, str | None, int, int], Adapter] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of the cached tensors."""
        return sum(_bytes(adapter) for adapter in self._kept.values())

    def open(self, place: str | Path, trigger: str | None = None) -> Adapter:
        """Loads an adapter, as `Adapter.load` does.

        Args:
            place: Path of a file or a folder, or an address on the hub.
            trigger: Trigger words of the adapter, if the file doesn't store them; "" if it needs none.

        Raises:
            AdapterFileError: The file can't be read, or isn't an adapter.
            SettingError: The hub address is invalid, or names a repository with several files.
            HubError: The hub can't be reached, or has no such file.
        """
        path = locate(place)
        try:
            state = path.stat()
        except (OSError, ValueError):
            raise AdapterFileError(f"{place} doesn't exist; give the path of an adapter file") from None
        if path.is_dir():  # its modification time doesn't reflect changes in its files
            return Adapter.load(path, trigger)
        key = (str(path.resolve()), trigger, state.st_mtime_ns, state.st_size)
        adapter = self._kept.pop(key, None) or Adapter.load(path, trigger)
        self._kept[key] = adapter
        size = self.size
        while size > self.budget:
            size -= _bytes(self._kept.popitem(last=False)[1])
        return adapter


def _bytes(adapter: Adapter) -> int:
    photo = [] if adapter.photo_latents is None else [adapter.photo_latents]
    tensors = [*adapter.tensors.values(), *adapter.magnitudes.values(), *photo]
    return sum(tensor.nbytes for tensor in tensors)
