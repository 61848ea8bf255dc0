"""The record of an edit: the image with every setting that it was made with, and its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_unitune import __version__
from lora_unitune.errors import SettingError
from lora_unitune.photo.reading import Photo
from lora_unitune.photo.writing import save_edit
from lora_unitune.settings import EditSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from lora_unitune.adapter.adapter import Adapter
    from lora_unitune.editing.start import Start
    from lora_unitune.families import Base
    from lora_unitune.photo.composition import Changes
    from lora_unitune.photo.provenance import Signer

_BEFORE = {
    "clip_skip": 1,
    "residual": False,
    "details": False,
    "least_change": 0.0,
    "size": "base",
    "mask": False,
}
"""Values of these settings in edits older than them."""


@dataclass(frozen=True)
class Edit:
    """An edited image with every setting that it was made with.

    Attributes:
        image: The image, RGB: at the photo's own size, or at the base's.
        prompt: The complete prompt: the rare tokens, those of the edits that it edits if it has no residual, and its
            own.
        settings: Everything needed to repeat the edit, as JSON-serializable values; "earlier" has those of the
            edits that it edits.
        seconds: Duration of the edit in seconds, without loading the base.
        notes: Notes for the user, one sentence each.
        base_image: The image at the base's size.
        changes: What it changes in what the base saw of the photo, or of the edit that it edits; None if it isn't
            composed into them.
        photo: The photo at its own size; None if the image has the base's size.
        deep: The image in 16 bits, (height, width, 3) uint16, if the photo has them.
    """

    image: Image.Image
    prompt: str
    settings: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()
    base_image: Image.Image | None = None
    changes: Changes | None = None
    photo: Photo | None = None
    deep: NDArray[np.uint16] | None = dataclasses.field(default=None, repr=False, compare=False)

    def made(self, settings: dict[str, Any], seconds: float, notes: Sequence[str]) -> Edit:
        """Returns the edit with what else it was made with: more settings, its duration, and notes before its own."""
        together = {**settings, **self.settings}
        return dataclasses.replace(self, settings=together, seconds=seconds, notes=(*notes, *self.notes))

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        keep_gps: bool = False,
        signer: Signer | None = None,
    ) -> tuple[str, ...]:
        """Writes the image with the settings, which `read_settings` reads, as the end of its name says.

        PNG and TIFF are exact, with 16 bits if the photo has them. A JPEG has the quality of the photo's; without
        one, JPEG, WebP and AVIF are compressed at quality 95. The photo's EXIF entries and its color profile are
        kept, and XMP says that the image is edited.

        Args:
            path: Path of the file; its name ends in .png, .jpg, .webp, .tif or .avif.
            overwrite: Whether an existing file may be replaced.
            keep_gps: Whether the position that the photo was taken at is kept.
            signer: What signs the file by C2PA, from `find_signer`; None leaves it unsigned.

        Returns:
            Notes for the user on what the file doesn't hold.

        Raises:
            OutputError: The file already exists, its name ends otherwise, or it can't be written.
        """
        image = self.image if self.deep is None else self.deep
        return save_edit(image, path, self.settings, self.photo, keep_gps, overwrite, signer)


def as_one(turns: Sequence[Edit]) -> Edit:
    """Returns the last of several turns with the notes and the duration of all."""
    if len(turns) == 1:
        return turns[0]
    notes = dict[str, str]()
    for number, turn in enumerate(turns, 1):
        for note in turn.notes:
            notes.setdefault(note, f"turn {number}: {note}")
    seconds = sum(turn.seconds for turn in turns)
    return dataclasses.replace(turns[-1], seconds=seconds, notes=tuple(notes.values()))


def turns_of(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the settings of each turn of an edit: those of the edits before it, and its own.

    Raises:
        SettingError: Those of the edits before it can't be read.
    """
    earlier = settings.get("earlier", [])
    if not isinstance(earlier, list) or not all(isinstance(turn, dict) for turn in earlier):
        raise SettingError("the settings name no turns under 'earlier'; use the complete settings of an edit")
    return [*earlier, {name: value for name, value in settings.items() if name != "earlier"}]


def repeatable(
    settings: Mapping[str, Any], fingerprint: str, adapter: Adapter | None, given: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the complete settings of each turn of an edit, after a check that it can be repeated.

    Args:
        settings: Settings of the edit.
        fingerprint: Fingerprint of the base at hand.
        adapter: The adapter at hand.
        given: Which of "photo" and "mask" are given.

    Raises:
        SettingError: A setting is missing, or the edit was made with another base or adapter, or started from
            something else.
    """
    words = (adapter.rare_tokens if adapter else None) or ""
    turns = [{"rare_tokens": words, **_complete(turn)} for turn in turns_of(settings)]
    ours = (fingerprint, adapter.digest if adapter else None)
    for number, turn in enumerate(turns):
        if (turn["fingerprint"], turn["adapter"]) != ours:
            raise SettingError("the edit was made with another base or adapter; repeat it with the same ones")
        if (turn["photo"] == "edit") != (number > 0):
            raise SettingError("the settings lack turns of the edit; use the complete settings of an edit")
    needs = {"photo": turns[0]["photo"] == "given", "mask": any(turn["mask"] for turn in turns)}
    for name, is_needed in needs.items():
        if is_needed and name not in given:
            raise SettingError(f"the edit was made with a {name} that was given; give that {name} again")
    if turns[0]["photo"] == "adapter" and "photo" in given:
        raise SettingError("the edit starts from the photo in the adapter; repeat it without photo=PATH")
    if not needs["mask"] and "mask" in given:
        raise SettingError("the edit was made without a mask; repeat it without mask=PATH")
    return turns


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of one turn with what older releases didn't record.

    Raises:
        SettingError: One is missing.
    """
    names = [field.name for field in dataclasses.fields(EditSettings)]
    if settings.get("strength") == 1 and "details" not in settings:  # releases before 0.3
        settings = {**settings, "residual": False}
    if isinstance(settings.get("size"), list):  # releases before 0.3 named the image's size so
        settings = {name: value for name, value in settings.items() if name != "size"}
    settings = {**_BEFORE, **settings}
    needed = [*names, "prompt", "negative_prompt", "seed", "fingerprint", "adapter", "photo"]
    missing = [name for name in needed if name not in settings]
    if missing:
        raise SettingError(f"the settings lack {', '.join(missing)}; use the complete settings of an edit")
    return settings


def check_same(record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Checks that an edit about to be repeated starts from the same pixels.

    Args:
        record: What would be recorded of it.
        settings: Settings of the edit to repeat; older ones don't say which pixels it started from.

    Raises:
        SettingError: The photo or the mask is another one.
    """
    for name in ("photo", "mask"):
        digest = f"{name}_digest"
        if settings.get(digest, record[digest]) != record[digest]:
            raise SettingError(f"the edit was made with another {name}, pixel for pixel; give that one")


def recorded(
    base: Base,
    adapter: Adapter | None,
    prompt: str,
    negative_prompt: str,
    start: Start,
    settings: EditSettings,
) -> dict[str, Any]:
    """Returns what is recorded of every edit of a run, as JSON-serializable values: all but its seed and size.

    Args:
        base: The base.
        adapter: The adapter; None for the plain base.
        prompt: The prompt without rare tokens.
        negative_prompt: The negative prompt.
        start: What the edits start from.
        settings: The sampling settings.
    """
    import diffusers
    import torch

    mask = Photo(start.mask, "the mask") if start.mask else None
    record = {
        "lora_unitune": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "base": base.name,
        "fingerprint": base.fingerprint,
        "adapter": adapter.digest if adapter else None,
        "rare_tokens": (adapter.rare_tokens if adapter else None) or "",
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "photo": start.origin,
        "photo_digest": start.whole.digest if start.whole and not start.earlier else "",
        "mask": mask is not None,
        "mask_digest": mask.digest if mask else "",
        **dataclasses.asdict(settings),
    }
    return {**record, "earlier": turns_of(start.earlier.settings)} if start.earlier else record


def to_image(pixels: Tensor) -> Image.Image:
    """Converts (3, height, width) in [0, 1] to an image, with diffusers' rounding."""
    from PIL import Image

    from lora_unitune.photo.colors import to_bytes

    return Image.fromarray(to_bytes(pixels))
