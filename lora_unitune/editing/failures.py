"""Failures of sampling: samples that aren't finite, and memory that runs out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_unitune.errors import DeviceError, SettingError

_MOST_NAMED = 8  # seeds in a message


def are_finite(images: Tensor) -> Tensor:
    """Returns which images of (b, 3, height, width) have only finite numbers, (b,) bool: others would be black."""
    return images.isfinite().flatten(1).all(1)


def not_finite(failed: Sequence[int], count: int) -> SettingError:
    """Returns the error that names the samples that aren't finite.

    Args:
        failed: Their seeds.
        count: Number of all samples.
    """
    named = ", ".join(str(seed) for seed in failed[:_MOST_NAMED])
    more = f" and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
    which = f"image of seed {named} isn't" if len(failed) == 1 else f"images of seeds {named}{more} aren't"
    others = f" ({count - len(failed)} of {count} are)" if count > len(failed) else ""
    return SettingError(
        f"the sampled {which} finite{others}; lower edit.guidance or edit.adapter_scale, or edit with edit.strength "
        "below 1"
    )


def out_of_memory(size: tuple[int, int]) -> DeviceError:
    """Returns the error for an edit that needs too much memory.

    Args:
        size: (width, height) of the edit in pixels.
    """
    return DeviceError(
        f"memory ran out for an edit of {size[0]} x {size[1]} pixels; close other programs, or edit with "
        "device='cpu'"
    )
