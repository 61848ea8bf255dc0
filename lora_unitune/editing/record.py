"""The record of an edit: the image, every setting that made it, and the file that carries both."""

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
"""The PNG's text entry that holds the settings."""


@dataclass(frozen=True)
class Edit:
    """An edited image and every setting that made it.

    Attributes:
        image: RGB.
        prompt: The whole text that was sent, rare tokens included.
        settings: Everything needed to repeat the edit, as values that JSON can hold.
        seconds: What the edit took, without loading the base.
        notes: What a person may want to know about it, one sentence each.
    """

    image: Image.Image
    prompt: str
    settings: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the image as a PNG that carries the settings; `read_settings` reads them.

        Args:
            path: Path of the file; its name ends in .png.
            overwrite: Whether a file that is there may be replaced.

        Raises:
            OutputError: The file is there already, isn't a PNG by its name, or can't be written.
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
    """Reads the settings that an edited PNG carries.

    Args:
        path: Path of a file that `Edit.save` wrote.

    Raises:
        SettingError: The file can't be read, or carries none.
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
