"""Loading of a base's components from a folder or a single file, safetensors only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_unitune.errors import BaseModelError, DeviceError, one_line
from lora_unitune.families import BaseFiles


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


def public_name(name: str) -> str:
    """Returns a base's name without its path, which is private and would be shared with files."""
    path = Path(name)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else name


def load_components(
    files: BaseFiles, models: Mapping[str, type[Any]], tokenizer: type[Any]
) -> dict[str, Any]:
    """Loads a pipeline's models in float32, the tokenizers of its text encoders, and its scheduler.

    Args:
        files: The base's files.
        models: Classes of the models, by the names of their folders.
        tokenizer: Class of the tokenizers.

    Raises:
        BaseModelError: A component is missing or broken, or is of another class.
    """
    name, kind, folder = files.name, files.family.title, files.folder
    for component, expected in models.items():
        declared = (files.index.get(component) or [None, None])[1]
        if declared != expected.__name__:
            raise BaseModelError(
                f"base '{name}' has a {component} of class {declared}; {kind} has {expected.__name__}"
            )
    loaders: dict[str, Callable[[], Any]] = {
        component: partial(_load_model, files, component, model) for component, model in models.items()
    }
    tokenizers = {text.replace("text_encoder", "tokenizer"): text for text in models if _is_text(text)}
    for component in tokenizers:
        loaders[component] = partial(_load_tokenizer, files, component, tokenizer)
    scheduler = _scheduler_class(name, files.index)
    local = {"subfolder": "scheduler", "local_files_only": True}
    loaders["scheduler"] = partial(scheduler.from_pretrained, folder, **local, **files.scheduler)
    loaded: dict[str, Any] = {}
    for component, load in loaders.items():
        try:
            with quiet():
                loaded[component] = load()
        except ImportError as error:  # some schedulers need other libraries
            raise BaseModelError(
                f"base '{name}': its {component} can't be loaded ({one_line(error)})"
            ) from error
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


def _load_model(files: BaseFiles, component: str, model: type[Any]) -> Any:
    """Loads one model in float32, from the base's folder or file, or from the VAE's."""
    folder, weights = files.folder / component, files.weights
    if component == "vae" and files.vae is not None:
        weights = files.vae if files.vae.is_file() else None
        nested = files.vae / component
        folder = nested if nested.is_dir() else files.vae
    if weights is not None:
        from lora_unitune.families.single_file import read_model

        return read_model(model, weights, files.folder, component)
    variant = _variant_of(folder)
    read = _read_text_encoder(model, folder) if _is_text(component) and variant is None else None
    dtype = "dtype" if _is_text(component) else "torch_dtype"
    options = {"use_safetensors": True, "local_files_only": True, "variant": variant, dtype: torch.float32}
    return read or model.from_pretrained(folder, **options)


def _load_tokenizer(files: BaseFiles, component: str, tokenizer: type[Any]) -> Any:
    """Loads a tokenizer from the base's folder; CLIP's own travels with the package, for single files."""
    folder = files.folder / component
    if files.weights is not None and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "merges.txt")
    ):
        from lora_unitune.families.single_file import build_tokenizer

        return build_tokenizer(tokenizer, folder)
    return tokenizer.from_pretrained(files.folder, subfolder=component, local_files_only=True)


def _variant_of(folder: Path) -> str | None:
    """Returns the variant of a model's weights, such as "fp16"; None where the plain ones are there."""
    names = [path.name for path in folder.glob("*.safetensors*")]
    if any(re.fullmatch(r"\w+\.safetensors(\.index\.json)?", name) for name in names):
        return None
    matches = (
        re.fullmatch(r"\w+\.([\w-]+?)(-\d+-of-\d+)?\.safetensors", name)
        or re.fullmatch(r"\w+\.safetensors\.index\.(\w+)\.json", name)
        for name in names
    )
    variants = {match[1] for match in matches if match}
    return next((kind for kind in ("fp32", "fp16", "bf16", *sorted(variants)) if kind in variants), None)


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
