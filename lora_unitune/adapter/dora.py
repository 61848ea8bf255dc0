"""DoRA (arXiv 2402.09353): W' = m (W + s B A) / ||W + s B A||, a magnitude m for each direction of a layer's weight.

W' isn't the base's weight plus a change of low rank, so it replaces the base's weight while the adapter is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_unitune.adapter.checks import AGAIN, layers_of, shown
from lora_unitune.errors import AdapterFileError, SettingError

if TYPE_CHECKING:
    from torch import Tensor

KOHYA, PEFT = "dora_scale", "lora_magnitude_vector"
"""What the magnitudes of a layer are called: kohya's have the weight's dimensions, PEFT's are of its outputs."""

NOTE = "it is a DoRA, whose weights replace the base's while it is used"

Shape = tuple[int, ...]


def split_magnitudes(
    name: str, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Shape], dict[str, tuple[str, Shape]]]:
    """Splits the magnitudes off a file's tensors.

    Args:
        name: Name of the file in messages.
        shapes: Shapes of its tensors, by "<part>.<module>.lora_A.weight", "...dora_scale", and so on.

    Returns:
        The other tensors' shapes; and for each layer with magnitudes their key and their shape beside the weight:
        1, but for its outputs (out, 1, ...) or its inputs (1, in, ...).

    Raises:
        AdapterFileError: Magnitudes have no layer, or not its width.
    """
    ends = (f".{KOHYA}", f".{PEFT}")
    rest = {key: shape for key, shape in shapes.items() if not key.endswith(ends)}
    magnitudes = dict[str, tuple[str, Shape]]()
    for key in (key for key in shapes if key not in rest):
        layer, _, what = key.rpartition(".")
        a, b = (rest.get(f"{layer}.lora_{side}.weight", (0, 0)) for side in "AB")
        ones = (1,) * (max(len(a), len(b), 2) - 2)
        shape, outputs, inputs = shapes[key], (b[0], 1, *ones), (1, a[1], *ones)
        of_outputs = [outputs, (b[0], 1), (b[0],)] + [(1, *outputs[:-1])] * (what == PEFT)
        beside = inputs if shape not in of_outputs else outputs
        is_known = shape in of_outputs or (what == KOHYA and shape in (inputs, (1, a[1])))
        if not is_known or layer in magnitudes or not math.prod(shape):
            raise AdapterFileError(
                f"{name}: tensor {shown(key)} has shape {shape}, not its layer's width; {AGAIN}"
            )
        magnitudes[layer] = key, beside
    return rest, magnitudes


def new_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """Returns what replaces a layer's weight, W' of the module's docstring (eq. 5).

    Args:
        weight: W (out, in, ...) float32.
        a: A (rank, in, ...).
        b: B (out, rank, ...).
        scale: s, alpha / rank.
        magnitude: m, as `split_magnitudes` shapes it; None for a layer of a plain LoRA, whose weight is W + s B A.

    Raises:
        RuntimeError: The shapes don't match.
    """
    direction = weight + scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    if magnitude is None:
        return direction
    magnitude = magnitude.reshape(*magnitude.shape[:2], *[1] * (weight.ndim - 2))
    axes = [axis for axis in range(weight.ndim) if axis != int(magnitude.shape[0] == 1)]
    norm = direction.square().sum(axes, keepdim=True).sqrt()
    return magnitude * direction / norm.clamp(min=1e-12)


def has_magnitudes(magnitudes: Mapping[str, Tensor], part: str) -> bool:
    """Returns whether a part has a DoRA's magnitudes, which are by layer."""
    return any(layer.startswith(f"{part}.") for layer in magnitudes)


def for_peft(tensors: Mapping[str, Tensor], magnitudes: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Returns the magnitudes of a part as PEFT and diffusers store them, by "<layer>.lora_magnitude_vector".

    Args:
        tensors: The adapter's A and B.
        magnitudes: Its magnitudes, by layer.
        part: Name of the part.

    Raises:
        SettingError: They are of inputs, or a layer has none, which these layouts can't say.
    """
    layers = layers_of(tensors, part)
    stored = {layer: magnitudes[layer] for layer in layers if layer in magnitudes}
    if stored and (len(stored) < len(layers) or any(each.shape[1] > 1 for each in stored.values())):
        raise SettingError(
            "this DoRA has magnitudes of inputs, or of some layers only, which only kohya's layout can hold; keep it"
        )
    return {
        f"{layer}.{PEFT}": each.flatten() if each.ndim == 2 else each.transpose(0, 1)
        for layer, each in stored.items()
    }
