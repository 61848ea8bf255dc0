"""What an edit is asked for: its texts, settings and start, checked before anything is sampled."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.adapter.suits import check_fits
from lora_unitune.editing.prompts import (
    checked_text,
    complete_prompt,
    earlier_prompts,
    prompt_notes,
    settings_notes,
)
from lora_unitune.editing.record import Edit, recorded, turns_of
from lora_unitune.editing.start import Start, chosen_settings, starting_point
from lora_unitune.families import Base
from lora_unitune.photo.opening import PhotoSource
from lora_unitune.photo.reading import Photo
from lora_unitune.settings import EditSettings


@dataclass(frozen=True)
class Request:
    """What an edit is asked for.

    Attributes:
        adapter: The adapter; None for the plain base.
        text: The complete prompt: the rare tokens, the prompts of earlier turns if it has no residual, and its own.
        negative_prompt: Prompt of the unconditional prediction of guidance.
        settings: Sampling settings.
        start: What it starts from.
        record: What is recorded of it, but for its seed and size.
        notes: Notes for the user, one sentence each.
        started: When it was begun, in seconds of `time.perf_counter`.
    """

    adapter: Adapter | None
    text: str
    negative_prompt: str
    settings: EditSettings
    start: Start
    record: dict[str, Any]
    notes: tuple[str, ...]
    started: float


def requested(
    base: Base,
    adapter: Adapter | None,
    prompt: str,
    photo: PhotoSource | Photo | Edit | None,
    negative_prompt: str | None,
    mask: PhotoSource | None,
    chosen: dict[str, Any],
) -> Request:
    """Returns what an edit is asked for, after all checks; its photo is read and encoded.

    Args:
        base: The base, for one thread at a time.
        adapter: The adapter; None for the plain base.
        prompt: Prompt without rare tokens; empty for a reconstruction.
        photo: The photo to start from, instead of the adapter's; or an edit, to edit that.
        negative_prompt: The negative prompt.
        mask: An image whose white parts may change, and gray ones partly.
        chosen: Settings that don't default to the recipe's, by name.

    Raises:
        UnituneError: As for `Editor.edit`.
    """
    started = time.perf_counter()
    if adapter is not None:
        check_fits(adapter, base)
    settings = chosen_settings(base, adapter, photo is not None, chosen)
    negative_prompt = checked_text("negative_prompt", negative_prompt)
    text = complete_prompt(adapter, prompt)
    notes = [f"the adapter: {note}" for note in adapter.notes] if adapter else []
    notes += prompt_notes(base, prompt=text, negative_prompt=negative_prompt)
    start = starting_point(base, adapter, photo, settings, mask)
    if start.earlier and not settings.residual:  # which adds nothing but what this prompt changes
        prompts = [turn["prompt"] for turn in turns_of(start.earlier.settings)]
        text = complete_prompt(adapter, earlier_prompts(base, adapter, prompts, prompt), prompt)
    notes += [*settings_notes(settings, negative_prompt), *start.notes]
    record = recorded(base, adapter, prompt, negative_prompt, start, settings)
    return Request(adapter, text, negative_prompt, settings, start, record, tuple(notes), started)
