"""LoRA-UniTune: fit a base model to one photo in seconds, then edit the photo with prompts.

    from lora_unitune import Editor, fit

    adapter = fit("photo.jpg")
    adapter.save("photo.safetensors")
    Editor("pocket").edit(adapter, "a fox at night").save("out.png")

Importing this package imports no heavy library; each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_unitune.adapter.adapter import Adapter as Adapter
    from lora_unitune.adapter.compress import compress as compress
    from lora_unitune.adapter.convert import convert as convert
    from lora_unitune.adapter.describe import describe as describe
    from lora_unitune.adapter.stack import stacked as stacked
    from lora_unitune.editing.editor import Editor as Editor
    from lora_unitune.editing.history import History as History
    from lora_unitune.editing.record import Edit as Edit
    from lora_unitune.errors import AdapterFileError as AdapterFileError
    from lora_unitune.errors import BaseModelError as BaseModelError
    from lora_unitune.errors import DeviceError as DeviceError
    from lora_unitune.errors import FitError as FitError
    from lora_unitune.errors import HubError as HubError
    from lora_unitune.errors import OutputError as OutputError
    from lora_unitune.errors import PhotoError as PhotoError
    from lora_unitune.errors import PromptError as PromptError
    from lora_unitune.errors import RecipeError as RecipeError
    from lora_unitune.errors import SettingError as SettingError
    from lora_unitune.errors import UnituneError as UnituneError
    from lora_unitune.families import load_base as load_base
    from lora_unitune.families.location import locate_base as locate_base
    from lora_unitune.photo.provenance import find_signer as find_signer
    from lora_unitune.photo.writing import read_settings as read_settings
    from lora_unitune.recipe import Recipe as Recipe
    from lora_unitune.training.fit import fit as fit

__version__ = "0.2.0"

_ERRORS = (
    "AdapterFileError BaseModelError DeviceError FitError HubError OutputError PhotoError PromptError "
    "RecipeError SettingError UnituneError"
).split()
_MODULE_OF = {
    **dict.fromkeys(_ERRORS, "errors"),
    "Adapter": "adapter.adapter",
    "Edit": "editing.record",
    "Editor": "editing.editor",
    "History": "editing.history",
    "Recipe": "recipe",
    "compress": "adapter.compress",
    "convert": "adapter.convert",
    "describe": "adapter.describe",
    "find_signer": "photo.provenance",
    "fit": "training.fit",
    "load_base": "families",
    "locate_base": "families.location",
    "read_settings": "photo.writing",
    "stacked": "adapter.stack",
}
"""Module that defines each public name."""

__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name from the module that defines it."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lora_unitune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lora_unitune.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
