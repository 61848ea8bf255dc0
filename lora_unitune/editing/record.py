"""The record of an edit: the image with every setting that it was made with, and its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_unitune import __version__
from lora_unitune.errors import SettingError
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
    from lora_unitune.photo.reading import Photo

_BEFORE = {"clip_skip": 1, "residual": False, "details": False, "least_change": 0.0, "size": "base"}
"""Values of these settings in edits older than them."""


@dataclass(frozen=True)
class Edit:
    """An edited image with every setting that it was made with.

    Attributes:
        image: The image, RGB: at the photo's own size, or at the base's.
        prompt: The complete prompt, including rare tokens.
        settings: Everything needed to repeat the edit, as JSON-serializable values.
        seconds: Duration of the edit in seconds, without loading the base.
        notes: Notes for the user, one sentence each.
        base_image: The image at the base's size.
        changes: What it changes in the photo; None if the image has the base's size.
        photo: The photo at its own size; None likewise.
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


def repeatable(
    settings: dict[str, Any], fingerprint: str, adapter: Adapter | None, given: Sequence[str]
) -> dict[str, Any]:
    """Returns the complete settings of an edit, after a check that it can be repeated.

    Args:
        settings: Settings of the edit.
        fingerprint: Fingerprint of the base at hand.
        adapter: The adapter at hand.
        given: Which of "photo" and "mask" are given.

    Raises:
        SettingError: A setting is missing, or the edit was made with another base, adapter or photo.
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
    ours = (fingerprint, adapter.digest if adapter else None)
    if (settings["fingerprint"], settings["adapter"]) != ours:
        raise SettingError("the edit was made with another base or adapter; repeat it with the same ones")
    needs = {"photo": settings["photo"] == "given", "mask": bool(settings.get("mask"))}
    for name in needs:
        if needs[name] and name not in given:
            raise SettingError(f"the edit was made with a {name} that was given; give that {name} again")
    return settings


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

    return {
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
        "mask": start.mask is not None,
        **dataclasses.asdict(settings),
    }


def to_image(pixels: Tensor) -> Image.Image:
    """Converts (3, height, width) in [0, 1] to an image, with diffusers' rounding."""
    from PIL import Image

    from lora_unitune.photo.colors import to_bytes

    return Image.fromarray(to_bytes(pixels))
