"""The words that pocket, the bundled base, learned."""

from __future__ import annotations

import sys

from lora_unitune.families import POCKET_FOLDER

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib


def pocket_words() -> dict[str, list[str]]:
    """Returns the phrases of pocket's captions, by kind: objects, colors, places and so on."""
    return tomllib.loads((POCKET_FOLDER.parent / "words.toml").read_text(encoding="utf-8"))
