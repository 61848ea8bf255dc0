"""Hot-swaps adapters on a base, in place where possible, and restores the base bit for bit.

The attached layers have the capacity for every adapter used so far: the largest ranks, and all targets.
An adapter of lower rank is zero-padded, which changes outputs by rounding at most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_unitune.adapter import layers
from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.checks import layers_of
from lora_unitune.adapter.dora import new_weight
from lora_unitune.errors import AdapterFileError, RecipeError, SettingError
from lora_unitune.families import Base
from lora_unitune.settings import LoraSettings

Scale = float | Mapping[str, float]
"""Factor of an adapter's change of the weights: one number, or one by part."""


class Mount:
    """A base and its active adapter."""

    def __init__(self, base: Base) -> None:
        """Takes a base without adapters."""
        self.base = base
        self._loaded: Adapter | None = None
        self._attached: Mapping[str, LoraSettings] | None = None
        self._slots: dict[str, nn.Parameter] = {}
        self._scale: Scale = 1.0
        self._originals: dict[str, Tensor] = {}

    def use(self, adapter: Adapter | None, scale: Scale) -> None:
        """Activates an adapter on the base; None restores the plain base.

        Args:
            adapter: An adapter made for this base.
            scale: Factor of its change of the weights: a number, or one by part (1 for parts that it doesn't
                name). For method "full" a number only: weights are interpolated from the base's (0) to the
                fitted ones (1).

        Raises:
            AdapterFileError: The adapter's tensors don't match the base.
            SettingError: The method is "full", and the scale is by part.
        """
        if adapter is None:
            self.release()
        elif adapter.recipe.fit.method == "full":
            if isinstance(scale, Mapping):
                raise SettingError("an adapter of method 'full' takes one scale for all parts; give a number")
            self._use_full(adapter, scale)
        else:
            by_part = scale if isinstance(scale, Mapping) else dict.fromkeys(adapter.recipe.lora, scale)
            use = self._use_lora if adapter.is_low_rank else self._use_dora
            use(adapter, {part: by_part.get(part, 1.0) for part in adapter.recipe.lora})

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Inside the `with` block the base is plain; afterwards `use` has to activate the adapter again."""
        if self._originals:
            self.release()
        with layers.adapters_disabled(self.base):
            yield

    def release(self) -> None:
        """Restores the base as it was before the first adapter, bit for bit."""
        layers.detach(self.base)
        with torch.no_grad():
            for key, weight in self._weights().items():
                if key in self._originals:
                    weight.copy_(self._originals[key])
        self._originals, self._slots = {}, {}
        self._loaded, self._attached, self._scale = None, None, 1.0

    def _use_lora(self, adapter: Adapter, scale: dict[str, float]) -> None:
        """Copies an adapter into the attached layers; if their capacity is too small, attaches larger ones first."""
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
        layers.set_scale(self.base, {part: scale[part] * settings.scale for part, settings in lora.items()})
        self._loaded, self._scale = adapter, scale

    def _use_dora(self, adapter: Adapter, scale: dict[str, float]) -> None:
        """Replaces the weights of a DoRA's layers; a scale below 1 interpolates them, as ComfyUI does."""

        def new(key: str, original: Tensor) -> Tensor:
            layer = key.removesuffix(".weight")
            a, b = (adapter.tensors[f"{layer}.lora_{side}.weight"].to(original) for side in "AB")
            magnitude = adapter.magnitudes.get(layer)
            magnitude = None if magnitude is None else magnitude.to(original)
            return new_weight(original, a, b, adapter.scale_of(layer.partition(".")[0]), magnitude)

        if adapter is not self._loaded or scale != self._scale:
            self.release()
            self._replace([f"{layer}.weight" for layer in layers_of(adapter.tensors)], new, adapter, scale)

    def _use_full(self, adapter: Adapter, scale: float) -> None:
        if adapter is self._loaded and scale == self._scale:
            return
        self.release()
        trained = {key.partition(".")[0] for key in adapter.tensors}
        expected = {
            key: each.shape for key, each in self._weights().items() if key.partition(".")[0] in trained
        }
        shapes = {key: tensor.shape for key, tensor in adapter.tensors.items()}
        if expected != shapes:
            wrong = sorted(key for key in {**expected, **shapes} if expected.get(key) != shapes.get(key))
            raise AdapterFileError(
                f"the adapter's tensor {wrong[0]!r} is missing, surplus or of the wrong shape; fit the photo again"
            )
        self._replace(list(shapes), lambda key, _: adapter.tensors[key], adapter, scale)

    def _replace(
        self, keys: list[str], new: Callable[[str, Tensor], Tensor], adapter: Adapter, scale: Scale
    ) -> None:
        """Replaces weights of the base: at scale 1 by the new ones, below by an interpolation.

        Args:
            keys: Names of the weights.
            new: Returns the new weight by its name and the base's own.
            adapter: The adapter that they are of.
            scale: Scale of the adapter.
        """
        weights = self._weights()
        self._originals = {key: weights[key].detach().to("cpu", copy=True) for key in keys}
        with torch.no_grad():
            for key in keys:
                original = weights[key].float()
                each = scale[key.partition(".")[0]] if isinstance(scale, Mapping) else scale
                tensor = new(key, original).to(original)
                weights[key].copy_(tensor if each == 1 else original.lerp(tensor, each))
        self._loaded, self._scale = adapter, scale

    def _weights(self) -> dict[str, nn.Parameter]:
        """Returns the base's parameters by "<part>.<name>"."""
        return {
            f"{part}.{name}": weight
            for part, module in self.base.parts.items()
            for name, weight in module.named_parameters()
        }
