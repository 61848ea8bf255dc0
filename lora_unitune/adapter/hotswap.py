"""Hot-swaps adapters on a base, in place where it can, and restores the base bit for bit.

The attached layers that adapters are copied into suit every adapter that was used so far: the largest ranks,
and all targets. An adapter with lower ranks is zero-padded, which changes the last bit at most.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_unitune.adapter import layers
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.errors import AdapterFileError, RecipeError
from lora_unitune.families import Base
from lora_unitune.settings import LoraSettings


class Mount:
    """A base and the adapter that is on it now."""

    def __init__(self, base: Base) -> None:
        """Takes a base without adapters."""
        self.base = base
        self._loaded: Adapter | None = None
        self._attached: Mapping[str, LoraSettings] | None = None
        self._slots: dict[str, nn.Parameter] = {}
        self._scale = 1.0
        self._originals: dict[str, Tensor] = {}

    def use(self, adapter: Adapter | None, scale: float) -> None:
        """Puts an adapter on the base; None leaves the plain base.

        Args:
            adapter: made for this base.
            scale: of its effect; a full one moves the weights that part of the way from the base's.

        Raises:
            AdapterFileError: its tensors don't suit the base.
        """
        if adapter is None:
            self.release()
        elif adapter.recipe.fit.method == "full":
            self._use_full(adapter, scale)
        else:
            self._use_lora(adapter, scale)

    def release(self) -> None:
        """Restores the base as it was before the first adapter, bit for bit."""
        layers.detach(self.base)
        with torch.no_grad():
            for key, weight in self._weights().items():
                if key in self._originals:
                    weight.copy_(self._originals[key])
        self._originals, self._slots = {}, {}
        self._loaded, self._attached, self._scale = None, None, 1.0

    def _use_lora(self, adapter: Adapter, scale: float) -> None:
        """Copies an adapter into the attached layers; where it doesn't fit, larger ones are attached first."""
        if adapter is self._loaded and scale == self._scale and self._attached is not None:
            return
        attached, lora, parts = self._attached, adapter.recipe.lora, self.base.parts
        self._loaded = None
        try:
            if attached is None or not layers.can_hold(attached, lora, parts):
                self.release()
                wanted = lora if attached is None else layers.union(attached, lora, parts)
                layers.attach(self.base, wanted)
                self._attached, self._slots = wanted, layers.slots(self.base)
            layers.load_in_place(self._slots, adapter.tensors, lora)
        except RecipeError as error:
            raise AdapterFileError(f"the adapter's recipe doesn't suit the base: {error}") from error
        layers.set_scale(self.base, {part: scale * settings.scale for part, settings in lora.items()})
        self._loaded, self._scale = adapter, scale

    def _use_full(self, adapter: Adapter, scale: float) -> None:
        if adapter is self._loaded and scale == self._scale:
            return
        self.release()
        weights = self._weights()
        trained = {key.partition(".")[0] for key in adapter.tensors}
        expected = {key: weight.shape for key, weight in weights.items() if key.partition(".")[0] in trained}
        found = {key: tensor.shape for key, tensor in adapter.tensors.items()}
        if expected != found:
            wrong = sorted(key for key in {**expected, **found} if expected.get(key) != found.get(key))
            raise AdapterFileError(
                f"the adapter's tensor {wrong[0]!r} is missing, surplus or misshapen; fit the photo again"
            )
        self._originals = {key: weights[key].detach().to("cpu", copy=True) for key in found}
        with torch.no_grad():
            for key, tensor in adapter.tensors.items():
                original = self._originals[key]
                weights[key].copy_(tensor if scale == 1 else original.float().lerp(tensor, scale))
        self._loaded, self._scale = adapter, scale

    def _weights(self) -> dict[str, nn.Parameter]:
        """Returns the base's parameters by "<part>.<name>"."""
        return {
            f"{part}.{name}": weight
            for part, module in self.base.parts.items()
            for name, weight in module.named_parameters()
        }
