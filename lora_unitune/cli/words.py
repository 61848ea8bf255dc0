"""The words that pocket, the bundled base, learned."""

from __future__ import annotations

from lora_unitune.families import POCKET_FOLDER
from lora_unitune.recipe import read_toml


def pocket_words() -> dict[str, list[str]]:
    """Returns the phrases of pocket's captions, by kind: objects, colors, places and so on."""
    return read_toml(POCKET_FOLDER.parent / "words.toml")
