"""Edits in batches: smaller ones when memory runs out, and the samples that aren't finite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lora_unitune.editing.failures import not_finite, out_of_memory
from lora_unitune.editing.record import Edit
from lora_unitune.editing.request import Request
from lora_unitune.settings import check_whole

_CPU_PIXELS = 2**18  # maximum number of pixels in a batch on a CPU


def in_batches(
    request: Request,
    seeds: Sequence[int],
    batch_size: int,
    on_cpu: bool,
    sample: Callable[[Request, Sequence[int]], tuple[list[Edit], Tensor]],
) -> Iterator[list[Edit]]:
    """Yields the edits of each batch as soon as it is sampled, with what they were made with.

    Args:
        request: What the edits are asked for.
        seeds: Seeds of the noise, one for each edit.
        batch_size: Maximum batch size; less is taken when memory runs out, and on a CPU for larger images.
        on_cpu: Whether a CPU samples.
        sample: Samples a batch; returns the edits that are finite, and which are, (b,) bool.

    Raises:
        SettingError: Samples aren't finite; the others are yielded before.
        DeviceError: Memory runs out for a single edit.
    """
    size, started = request.start.size, request.started
    failed, left = list[int](), list(seeds)
    for seed in left:
        check_whole("seed", seed, 0)
    if on_cpu:
        batch_size = max(1, min(batch_size, _CPU_PIXELS // (size[0] * size[1])))
    while left:
        batch = left[:batch_size]
        try:
            edits, finite = sample(request, batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise out_of_memory(size) from None
            batch_size = len(batch) // 2
            continue
        failed += [seed for seed, is_finite in zip(batch, finite, strict=True) if not is_finite]
        kept = [{**request.record, "seed": seed} for seed in batch if seed not in failed]
        seconds = (time.perf_counter() - started) / len(batch)
        yield [edit.made(values, seconds, request.notes) for edit, values in zip(edits, kept, strict=True)]
        left, started = left[len(batch) :], time.perf_counter()
    if failed:
        raise not_finite(failed, len(seeds))
