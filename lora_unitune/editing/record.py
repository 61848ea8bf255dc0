"""The record of an edit: the image with every setting that it was made with, and its PNG file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_unitune.errors import OutputError, SettingError
from lora_unitune.output import write_atomically

if TYPE_CHECKING:
    from PIL import Image

ENTRY = "lora_unitune"
"""Name of the PNG's text entry with the settings."""


@dataclass(frozen=True)
class Edit:
    """An edited image with every setting that it was made with.

    Attributes:
        image: The image, RGB.
        prompt: The complete prompt, including rare tokens.
        settings: Everything needed to repeat the edit, as JSON-serializable values.
        seconds: Duration of the edit in seconds, without loading the base.
        notes: Notes for the user, one sentence each.
    """

    image: Image.Image
    prompt: str
    settings: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the image as a PNG with the settings, which `read_settings` reads.

        Args:
            path: Path of the file; its name ends in .png.
            overwrite: Whether an existing file may be replaced.

        Raises:
            OutputError: The file already exists, its name doesn't end in .png, or can't be written.
        """
        from PIL import PngImagePlugin

        if Path(path).suffix.lower() != ".png":
            raise OutputError(f"{path} isn't the name of a PNG file; let it end in .png")
        information = PngImagePlugin.PngInfo()
        information.add_text(ENTRY, json.dumps(self.settings))
        write_atomically(
            path, lambda temporary: self.image.save(temporary, format="PNG", pnginfo=information), overwrite
        )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads the settings stored in an edited PNG.

    Args:
        path: Path of a file that `Edit.save` wrote.

    Raises:
        SettingError: The file can't be read, or has no settings.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            settings = json.loads(image.info[ENTRY])
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise SettingError(f"{path} has no settings of an edit in it; give a PNG that lora-unitune wrote")
    return settings
