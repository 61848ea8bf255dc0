"""Loading of a base's components from a folder or a hub id, safetensors only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_unitune.errors import BaseModelError, DeviceError, one_line
from lora_unitune.families import FAMILIES, POCKET_FOLDER, Family

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_device(name: str) -> torch.device:
    """Returns the device of a name.

    Args:
        name: "auto" (the fastest available), "cpu", "cuda" or "mps".

    Raises:
        DeviceError: The name is unknown, or the device isn't available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in available.items() if is_there))
    if name not in available:
        raise DeviceError(f"device '{name}' is unknown; choose one of auto, cpu, cuda, mps")
    if not available[name]:
        raise DeviceError(f"device '{name}' isn't available to PyTorch on this machine; use auto or cpu")
    return torch.device(name)


def locate_base(name: str) -> str:
    """Returns the folder or hub id that `name` ("pocket", a folder, a hub id) stands for.

    Raises:
        BaseModelError: The name is none of the three.
    """
    if name == "pocket":
        return str(POCKET_FOLDER)
    if Path(name).is_dir() or _HUB_ID.fullmatch(name):
        return name
    raise BaseModelError(
        f"unknown base '{name}'; give 'pocket', a folder with a diffusers model, or a hub id (owner/model)"
    )


def public_name(name: str) -> str:
    """Returns a base's name without its folder's path, which is private and would be shared with files."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def read_model_index(name: str) -> dict[str, Any]:
    """Reads the model_index.json of a base, from its folder or (for a hub id) through diffusers.

    Raises:
        BaseModelError: The file doesn't exist, can't be downloaded, or isn't a diffusers index.
    """
    location = locate_base(name)
    if Path(location).is_dir():
        path = Path(location) / "model_index.json"
        if not path.is_file():
            raise BaseModelError(
                f"base '{name}' isn't a diffusers model: its folder has no model_index.json; give the folder "
                "that holds one"
            )
        try:
            index: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"base '{name}': model_index.json can't be read ({one_line(error)}); copy the model again"
            ) from error
    else:
        from diffusers import DiffusionPipeline

        try:
            index = DiffusionPipeline.load_config(location)
        except Exception as error:  # network, authorisation and cache errors have no common class
            raise BaseModelError(
                f"base '{name}' can't be downloaded ({one_line(error)}); check the id and the network, or "
                "give a local folder"
            ) from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise BaseModelError(f"base '{name}': model_index.json names no pipeline class; copy the model again")
    return index


def detect_family(name: str) -> Family:
    """Returns the family of a base, from its model_index.json.

    Raises:
        BaseModelError: The base doesn't exist, or is of a family that isn't supported.
    """
    kind = read_model_index(name)["_class_name"]
    for family in FAMILIES.values():
        if kind in family.pipelines:
            return family
    known = [pipeline for family in FAMILIES.values() for pipeline in family.pipelines]
    raise BaseModelError(
        f"base '{name}' is a {kind}, which isn't supported; use a base of kind {', '.join(known)}"
    )


def load_components(
    name: str, models: Mapping[str, type[Any]], tokenizer: type[Any], kind: str
) -> dict[str, Any]:
    """Loads a pipeline's models in float32, the tokenizers of its text encoders, and its scheduler.

    Args:
        name: Name of the base, as the user specified it.
        models: Classes of the models, by the names of their folders.
        tokenizer: Class of the tokenizers.
        kind: Title of the family, for messages.

    Raises:
        BaseModelError: A component is missing or broken, or is of another class.
    """
    index, location = read_model_index(name), locate_base(name)
    for component, expected in models.items():
        declared = (index.get(component) or [None, None])[1]
        if declared != expected.__name__:
            raise BaseModelError(
                f"base '{name}' has a {component} of class {declared}; {kind} has {expected.__name__}"
            )
    local = {"local_files_only": Path(location).is_dir()}
    weights: dict[str, Any] = {"use_safetensors": True, **local}
    loaders: dict[str, tuple[type[Any], dict[str, Any]]] = {
        component: (model, {**weights, "dtype" if _is_text(component) else "torch_dtype": torch.float32})
        for component, model in models.items()
    }
    tokenizers = {text.replace("text_encoder", "tokenizer"): text for text in models if _is_text(text)}
    loaders |= dict.fromkeys(tokenizers, (tokenizer, local))
    loaders["scheduler"] = (_scheduler_class(name, index), local)
    loaded: dict[str, Any] = {}
    for component, (loader, options) in loaders.items():
        try:
            with quiet():
                read = _read_text_encoder(loader, Path(location) / component) if _is_text(component) else None
                loaded[component] = read or loader.from_pretrained(location, subfolder=component, **options)
        except Exception as error:  # diffusers, transformers, safetensors and json each raise their own
            raise BaseModelError(
                f"base '{name}': its {component} can't be loaded ({one_line(error)}); it has to be a "
                f"complete model of kind {kind} with safetensors weights"
            ) from error
    for component, text_encoder in tokenizers.items():
        words, rows = len(loaded[component]), loaded[text_encoder].config.vocab_size
        if not rows // 2 <= words <= rows:  # transformers builds an empty one when the files are missing
            raise BaseModelError(
                f"base '{name}': its {component} can't be loaded or isn't its own (it has {words} tokens and "
                f"the {text_encoder} {rows}); copy the model again"
            )
    return loaded


def fingerprint_of(shape: Mapping[str, Any], sample: Sequence[Tensor]) -> str:
    """Returns a fingerprint of a base's configuration, noise schedule and some of its tensors as float32.

    The schedule enters by its settings, not by its values, which differ in the last bit between processors: a
    file made on one computer has to open on another.

    Args:
        shape: Configuration as JSON-serializable values.
        sample: Some tensors of the base.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for tensor in sample:
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Unfilled(TorchFunctionMode):
    """Inside its `with` block, `torch.nn.init` does nothing, for weights that are loaded from a file anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of torch, unless it initializes."""
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def _read_text_encoder(model: type[Any], folder: Path) -> Any:
    """Loads a text encoder from a local folder in float32, or returns None if its file has other keys.

    `from_pretrained` also converts the keys of older files, but imports a compiler and distributed training for
    it, which takes a second.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        return None
    weights = load_file(path)
    with _Unfilled():
        built = model(model.config_class.from_pretrained(folder, local_files_only=True))
    expected = {name: weight.shape for name, weight in built.state_dict().items()}
    if expected != {name: weight.shape for name, weight in weights.items()}:
        return None
    built.load_state_dict(weights)
    return built


def _is_text(component: str) -> bool:
    return component.startswith("text_encoder")


def _scheduler_class(name: str, index: Mapping[str, Any]) -> type[Any]:
    """Returns the class of a base's scheduler."""
    import diffusers

    kind = str((index.get("scheduler") or [None, None])[1])
    scheduler = getattr(diffusers, kind, None)
    if not (
        isinstance(scheduler, type) and kind.endswith("Scheduler") and hasattr(scheduler, "from_pretrained")
    ):
        raise BaseModelError(f"base '{name}' names a scheduler '{kind}' that diffusers doesn't have")
    return scheduler


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the messages and progress bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
