"""The one file people share: save, load, describe and check an adapter.

The file is safetensors. Its keys and its "lora_adapter_metadata" are those of diffusers' `save_lora_weights`,
so a plain pipeline loads it; a second header entry, "lora_unitune", holds what an edit needs besides.
It can be written in kohya's layout too, for ComfyUI and A1111.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_unitune.adapter import kohya
from lora_unitune.adapter.checks import damaged, lora_settings, shown
from lora_unitune.adapter.header import (
    FORMAT_VERSION,
    METADATA_CHECKS,
    METADATA_KEY,
    PHOTO_KEY,
    RANKS_KEY,
    photo_text,
    read_content,
)
from lora_unitune.adapter.int8 import WHOLE, pack, unpack
from lora_unitune.errors import AdapterFileError, SettingError
from lora_unitune.families import PARTS, Base
from lora_unitune.output import write_atomically
from lora_unitune.recipe import Recipe

Layout = Literal["diffusers", "kohya"]
_BASES = {
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2-512"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
"""Width of a base's text embeddings -> its name in kohya's header and in ModelSpec."""

_DIFFUSERS_ENTRIES = ("r", "lora_alpha", "target_modules", "use_rslora")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a fit learned about one photo, and everything an edit has to know about it; holds no model.

    Attributes:
        tensors: by "<part>.<module>.lora_A.weight" and "...lora_B.weight" (method "lora"), or by
            "<part>.<parameter>" (method "full"); float32, on the CPU.
        rare_tokens: the words that stand for the photo.
        recipe: every setting of the fit, and the defaults of its edits.
        base: name of the base it was fitted on, as the user gave it.
        fingerprint: of that base.
        photo_latents: (1, c, h, w) float32, mean of the VAE's posterior, scaled; None keeps the photo
            out of the file.
        resolution: side of the fitted photo in pixels.
        seed: of the fit.
        seconds: the training took.
        date: day of the fit, YYYY-MM-DD, or "".
        family: kind of the base, "sd" or "sdxl".
        format_version: of the file.
    """

    tensors: dict[str, Tensor]
    rare_tokens: str
    recipe: Recipe
    base: str
    fingerprint: str
    photo_latents: Tensor | None
    resolution: int
    seed: int
    seconds: float
    date: str = ""
    family: str = "sd"
    format_version: int = FORMAT_VERSION

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        dtype: torch.dtype = torch.float16,
        layout: Layout = "diffusers",
    ) -> None:
        """Writes the adapter file: all of it, or nothing.

        Args:
            path: of the file.
            overwrite: whether a file that is there may be replaced.
            dtype: number format of the tensors in the file; int8 (with scales) is read by this package only.
            layout: "diffusers", or "kohya" for ComfyUI, A1111 and kohya's scripts.

        Raises:
            OutputError: the file is there already, or can't be written.
            AdapterFileError: a tensor has values that `dtype` can't hold.
            SettingError: the adapter is of method "full", which other tools have no layout for, or `dtype` is
                int8 and the layout or the method doesn't go with it.
        """
        if dtype == torch.int8 and (layout != "diffusers" or self.recipe.fit.method != "lora"):
            raise SettingError("8 bits are for adapters of method 'lora', in this package's own files")
        tensors = self._file_tensors(torch.float16 if dtype == torch.int8 else dtype)
        _check_finite("this adapter", tensors)
        if dtype == torch.int8:
            photo = {key: tensor for key, tensor in tensors.items() if key == PHOTO_KEY}
            packed = {key.replace(".weight", WHOLE): tensor for key, tensor in pack(self.tensors).items()}
            tensors = {**packed, **photo}
        metadata = {"format": "pt"}
        if layout == "kohya":
            tensors, entries = self._as_kohya(tensors)
            metadata |= entries
        elif self.recipe.fit.method == "lora" and dtype != torch.int8:
            metadata["lora_adapter_metadata"] = json.dumps(_diffusers_metadata(self), sort_keys=True)
        if self.fingerprint:
            metadata |= {METADATA_KEY: self.header(), **_modelspec(self, tensors)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata), overwrite)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the tensors (as float16); a saved copy has the same."""
        found = hashlib.sha256()
        for key, tensor in sorted(self._file_tensors(torch.float16).items()):
            found.update(key.encode())
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:16]

    def _as_kohya(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns tensors under kohya's names, with alphas, and the header entries that belong to them."""
        if self.recipe.fit.method != "lora":
            raise SettingError("an adapter of method 'full' has no kohya layout; fit the photo with 'lora'")
        photo = tensors.pop(PHOTO_KEY, None)
        lora = self.recipe.lora
        ranks = {part: lora_settings(lora, part).rank for part in self.parts}
        filled, lower = kohya.filled_up(tensors, ranks)
        renamed = kohya.to_kohya(filled, {part: self.scale_of(part) for part in self.parts}, self.family)
        version, _ = self._known_base or _BASES[768]
        entries = kohya.header(renamed, lora.unet_rank, lora.unet_alpha, self.title, version)
        entries |= {} if photo is None else {PHOTO_KEY: photo_text(photo)}
        return renamed, entries | ({RANKS_KEY: json.dumps(lower, sort_keys=True)} if lower else {})

    def header(self) -> str:
        """Returns what the file's "lora_unitune" entry says, as JSON."""
        values = {name: getattr(self, name) for name in METADATA_CHECKS}
        values |= {"recipe": self.recipe.to_dict()} | ({"date": self.date} if self.date else {})
        return json.dumps(values, sort_keys=True)

    def scale_of(self, part: str) -> float:
        """Returns alpha / rank, what the product of a layer's two matrices is multiplied by."""
        settings = lora_settings(self.recipe.lora, part)
        return float(settings.alpha / settings.rank) if settings.rank else 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a base of its family that can be adapted."""
        return PARTS[self.family]

    @property
    def _known_base(self) -> tuple[str, str] | None:
        """The names of the base's kind in other tools, by the width of its text embeddings."""
        if self.family == "sdxl":
            return _BASES[2048]
        widths = {t.shape[1] for key, t in self.tensors.items() if key.endswith("attn2.to_k.lora_A.weight")}
        return _BASES.get(next(iter(widths))) if len(widths) == 1 else None

    @property
    def title(self) -> str:
        """What a list of models shows."""
        return f"{self.rare_tokens}: one photo, on {self.base}".removeprefix(": ")

    def _file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the tensors as a file holds them, the photo's latents among them."""
        photo = {} if self.photo_latents is None else {PHOTO_KEY: self.photo_latents}
        tensors = {**self.tensors, **photo}
        return {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Reads an adapter file; only safetensors, never a pickle.

        Args:
            path: of the file.

        Raises:
            AdapterFileError: it isn't there, isn't an adapter file, is damaged, or has the wrong tensors.
        """
        content = read_content(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {key: file.get_tensor(name).float() for key, name in content.keys.items()}
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error
        _check_finite(str(path), tensors)
        photo_latents = tensors.pop(PHOTO_KEY, content.photo)
        if content.eight_bit:
            tensors = unpack(tensors)
        for layer, factor in content.factors.items():
            tensors[f"{layer}.lora_B.weight"] *= factor
        for layer, rank in content.ranks.items():
            tensors[f"{layer}.lora_A.weight"] = tensors[f"{layer}.lora_A.weight"][:rank].contiguous()
            tensors[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B.weight"][:, :rank].contiguous()
        return cls(tensors=tensors, photo_latents=photo_latents, **content.values)


def describe(path: str | Path) -> dict[str, Any]:
    """Tells what is in an adapter file, from its header alone.

    Args:
        path: of the file.

    Returns:
        Values that JSON can hold; "ranks" and "targets" are by part, and empty for method "full".

    Raises:
        AdapterFileError: it isn't there, isn't an adapter file, or has the wrong tensors.
    """
    content = read_content(path)
    recipe: Recipe = content.values["recipe"]
    is_lora = recipe.fit.method == "lora"
    parts = PARTS[content.values["family"]]
    settings = {part: lora_settings(recipe.lora, part) for part in parts} if is_lora else {}
    weights = {key: shape for key, shape in content.shapes.items() if key != PHOTO_KEY}
    embedded = PHOTO_KEY in content.shapes or content.photo is not None
    return {
        "path": str(path),
        **{key: value for key, value in content.values.items() if key != "recipe"},
        "method": recipe.fit.method,
        "ranks": {part: each.rank for part, each in settings.items()},
        "targets": {part: list(each.targets) for part, each in settings.items() if each.rank},
        "steps": recipe.fit.steps,
        "photo_embedded": embedded,
        "tensors": len(weights),
        "parameters": sum(math.prod(shape) for shape in weights.values()),
        "bytes": Path(path).stat().st_size,
        "privacy": _privacy(content.values, embedded),
        "recipe": recipe.to_dict(),
    }


def _privacy(values: Mapping[str, Any], embedded: bool) -> str:
    """Says what a file tells about the person and the machine that made it."""
    told = [f"the base's name {values['base']!r}"]
    told += [f"the day of the fit {values['date']}"] if values.get("date") else []
    told += ["its settings, seed and seconds"] if values["seconds"] else []
    told += ["the photo in the base's latents"] if embedded else []
    return f"this file can redraw its photo; it also holds {', '.join(told)} (see strip)"


def check_fits(adapter: Adapter, base: Base) -> None:
    """Checks that an adapter was made for a base.

    Raises:
        AdapterFileError: it was made for another.
    """
    if not adapter.fingerprint:
        return  # of another tool, which didn't say; its tensors' names and shapes are checked all the same
    if adapter.fingerprint != base.fingerprint:
        raise AdapterFileError(
            f"the adapter was made for base {adapter.base!r} ({adapter.fingerprint}) and this is "
            f"{base.name!r} ({base.fingerprint}); choose that base, or fit the photo again on this one"
        )


def _modelspec(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the entries of ModelSpec 1.0.1, which lists of models show; tensors are those of the file."""
    _, kind = adapter._known_base or ("", adapter.base)
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{kind}/lora",
        "implementation": "diffusers",
        "title": adapter.title,
        "resolution": f"{adapter.resolution}x{adapter.resolution}",
        "trigger_phrase": adapter.rare_tokens,
        "hash_sha256": f"0x{kohya.content_hash(tensors)}",
    }
    entries |= {"date": adapter.date} if adapter.date else {}
    return {f"modelspec.{key}": value for key, value in entries.items()}


def _diffusers_metadata(adapter: Adapter) -> dict[str, Any]:
    """Returns what diffusers has to know to load the adapters at the right strength.

    `save_lora_weights` writes every field of a `LoraConfig`. Here it is only those that matter, so that other
    versions of peft, which refuse fields they don't know, can read the file too.
    """
    from lora_unitune.adapter.layers import lora_config, patterns

    metadata: dict[str, Any] = {}
    for part in adapter.parts:
        rank = lora_settings(adapter.recipe.lora, part).rank
        if not rank:
            continue
        config = lora_config(part, adapter.recipe.lora).to_dict()
        for key in _DIFFUSERS_ENTRIES:
            value = config[key]
            metadata[f"{part}.{key}"] = sorted(value) if isinstance(value, (set, tuple)) else value
        found = patterns(adapter.tensors, adapter.recipe.lora, part)
        metadata |= {f"{part}.{key}": value for key, value in found.items()}
    return metadata


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{name}: tensor {shown(key)} isn't finite; fit the photo again")
