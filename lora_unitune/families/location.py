"""Where a base's files are: the package, a folder, a single file, or the hub, which is asked once."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_unitune.errors import BaseModelError, one_line
from lora_unitune.families import FAMILIES, POCKET_FOLDER, BaseFiles, Family

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_NO_WEIGHTS = re.compile(r"Scheduler|Tokenizer|Processor|Extractor")


def locate_base(name: str | Path, vae: str | Path | None = None, prediction: str | None = None) -> BaseFiles:
    """Finds a base's files, and downloads those of a hub id that aren't in the hub's cache.

    A base in the cache is used as it is: the network isn't asked.

    Args:
        name: "pocket" (bundled with the package), a folder with a model_index.json, a .safetensors file, or a hub id.
        vae: File or folder of another VAE to use; None means the base's own.
        prediction: "epsilon" or "v_prediction": what the base predicts; None means what its files say.

    Raises:
        BaseModelError: The base doesn't exist, is broken, or is of a kind that isn't supported.
    """
    if not isinstance(name, (str, Path)):
        raise BaseModelError(
            f"base = {one_line(repr(name), 80)} isn't allowed; give 'pocket', a folder, a file, a hub id "
            "or a base in memory"
        )
    name = str(name)
    if prediction not in (None, "epsilon", "v_prediction"):
        raise BaseModelError(f"prediction = {prediction!r} isn't allowed; give 'epsilon' or 'v_prediction'")
    if vae is not None and not Path(vae).exists():
        raise BaseModelError(
            f"vae = {str(vae)!r} doesn't exist; give a .safetensors file, or a folder with its config.json"
        )
    changes = {"prediction_type": prediction} if prediction else {}
    weights = None
    if name != "pocket" and Path(name).is_file():
        from lora_unitune.families.single_file import configuration_of

        weights = Path(name)
        folder, found = configuration_of(name, prediction, has_vae=vae is not None)
        changes = found | changes
    else:
        folder = _folder_of(name)
    index = _read_index(name, folder)
    return BaseFiles(
        name, folder, index, _family_of(name, index), weights, Path(vae) if vae else None, changes
    )


def _folder_of(name: str) -> Path:
    """Returns the folder of a base that isn't a single file."""
    if name == "pocket":
        return POCKET_FOLDER
    if Path(name).is_dir():
        return Path(name)
    parent = Path(name).parent
    if not _HUB_ID.fullmatch(name):
        raise BaseModelError(
            f"unknown base '{name}'{_near(name)}; give 'pocket', a folder with a diffusers model, a .safetensors "
            "file, or a hub id (owner/model)"
        )
    cached = _cached(name)
    if cached:
        return cached
    if parent.is_dir() or name.endswith((".safetensors", ".ckpt")):
        raise BaseModelError(
            f"base '{name}' doesn't exist here{_near(name)}; check the path, or give a hub id"
        )
    return _download(name)


def _near(name: str) -> str:
    """Returns a question for the nearest name in the folder of a path that doesn't exist, or ""."""
    parent = Path(name).parent
    names = os.listdir(parent) if parent.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, names, 1)
    return f" (did you mean '{parent / near[0]}'?)" if near else ""


def _cached(name: str) -> Path | None:
    """Returns the folder of a hub id in the hub's cache, if every part is there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for part, declared in index.items():
        kind = declared[1] if isinstance(declared, list) and len(declared) == 2 else None
        if kind is not None and part not in _UNUSED:
            files = "*" if _NO_WEIGHTS.search(str(kind)) else "*.safetensors"
            if not any(path.exists() for path in (folder / part).glob(files)):
                return None
    return folder


def _download(name: str) -> Path:
    """Downloads a base from the hub, safetensors only."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from lora_unitune.families.loading import quiet

    advice = "check the id and the network, or give a local folder or file"
    try:
        HfApi().model_info(name, timeout=10)  # a single request, unlike the downloads, which are repeated
        with quiet():
            unused: dict[str, Any] = dict.fromkeys(_UNUSED)
            return Path(DiffusionPipeline.download(name, use_safetensors=True, **unused))
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"base '{name}' can't be downloaded: it is neither a local folder or file nor a public model of the hub; "
            f"{advice}"
        ) from error
    except Exception as error:  # network, authorisation and cache errors have no common class
        raise BaseModelError(
            f"base '{name}' is neither a local folder or file nor in the hub's cache, and can't be downloaded "
            f"({one_line(error)}); {advice}"
        ) from error


def _read_index(name: str, folder: Path) -> dict[str, Any]:
    """Reads the model_index.json of a folder."""
    path = folder / "model_index.json"
    if not path.is_file():
        files = sorted(each.name for each in folder.glob("*.safetensors"))
        holds = f", but the file {files[0]}: give its path, if that is the base" if files else ""
        raise BaseModelError(
            f"base '{name}' isn't a diffusers model: its folder has no model_index.json{holds}; give the folder "
            "that holds one, or a .safetensors file"
        )
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"base '{name}': model_index.json can't be read ({one_line(error)}); copy the model again"
        ) from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise BaseModelError(f"base '{name}': model_index.json names no pipeline class; copy the model again")
    return index


def _family_of(name: str, index: Mapping[str, Any]) -> Family:
    """Returns the family of a base, by the class of its pipeline."""
    kind = index["_class_name"]
    for family in FAMILIES.values():
        if kind in family.pipelines:
            return family
    known = [family.pipelines[0] for family in FAMILIES.values()]
    raise BaseModelError(
        f"base '{name}' is a {kind}, which isn't supported; use a base of kind {', '.join(known)}"
    )
