"""An adapter in memory, and its file.

The file is safetensors. Its keys and its "lora_adapter_metadata" are those of diffusers' `save_lora_weights`,
so a plain pipeline loads it; a second header entry, "lora_unitune", holds what an edit needs besides the tensors.
It can be written in kohya's layout too, for ComfyUI and A1111. docs/file-format.md specifies the format.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_unitune.adapter import dora, hub, kohya
from lora_unitune.adapter.checks import is_line, shown
from lora_unitune.adapter.compose import as_convolutions, plain
from lora_unitune.adapter.foreign import stated_base
from lora_unitune.adapter.header import (
    FORMAT_VERSION,
    METADATA_CHECKS,
    METADATA_KEY,
    OPTIONAL_CHECKS,
    PHOTO_KEY,
    RANKS_KEY,
    Content,
    open_source,
    read_content,
)
from lora_unitune.adapter.int8 import INT8_SUFFIX, pack, unpack
from lora_unitune.adapter.source import Source
from lora_unitune.errors import AdapterFileError, SettingError
from lora_unitune.families import FAMILIES, Base, Family, Size
from lora_unitune.output import check_ending, write_atomically
from lora_unitune.recipe import Recipe

Layout = Literal["diffusers", "kohya"]

_DIFFUSERS_ENTRIES = ("r", "lora_alpha", "target_modules", "use_rslora")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The result of a fit: the trained tensors and everything an edit needs, without the base model.

    Attributes:
        tensors: Tensors by "<part>.<module>.lora_A.weight" and "...lora_B.weight" (method "lora"), or by
            "<part>.<parameter>" (method "full"); float32, on the CPU.
        rare_tokens: The words that stand for the photo; "" if it needs none, None if the file doesn't say.
        recipe: Every setting of the fit, and the default settings of its edits.
        base: Name of the base it was fitted on, as the user specified it.
        fingerprint: Fingerprint of that base; "" for an adapter of another tool.
        photo_latents: (1, c, h, w) float32, the photo encoded by the base; None if the photo isn't stored.
        size: (width, height) in pixels at which the base processed the photo; (0, 0) if unknown.
        seed: Seed of the fit.
        seconds: Duration of the training, in seconds.
        date: Day of the fit, YYYY-MM-DD, or "".
        family: Name of the base's family, a key of `FAMILIES`.
        photo_digest: 32 hexadecimal digits of the photo's upright sRGB pixels, or "".
        photo_size: (width, height) of the photo itself in pixels, which its recipe's box is in; () if unknown.
        prediction: What the base predicts, as diffusers names it, or "".
        magnitudes: Magnitudes of a DoRA of another tool, float32 (out, 1, ...) or (1, in, ...) by "<part>.<module>".
        entries: Header entries of another tool's file, such as its author, which a conversion keeps.
        notes: Notes for the user on what was read, one sentence each; not stored in the file.
        history: Loss of each step of the fit; not stored in the file.
    """

    tensors: dict[str, Tensor]
    rare_tokens: str | None
    recipe: Recipe
    base: str
    fingerprint: str
    photo_latents: Tensor | None
    size: Size
    seed: int
    seconds: float
    date: str = ""
    family: str = next(iter(FAMILIES))
    photo_digest: str = ""
    photo_size: Size | tuple[()] = ()
    prediction: str = ""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    history: tuple[float, ...] = ()

    @classmethod
    def load(cls, place: str | Path, trigger: str | None = None) -> Adapter:
        """Loads an adapter in any supported layout; safetensors only, never a pickle.

        Args:
            place: Path of a file in diffusers', kohya's or PEFT's layout, of this package or another tool, or
                of a PEFT folder; or "hub://owner/name", followed by "/file.safetensors" if it has several files.
            trigger: Trigger words of the adapter, "" if it needs none; None takes those in the file, which
                another tool may not have stored.

        Raises:
            AdapterFileError: The file doesn't exist, isn't an adapter, is damaged, or has the wrong tensors.
            SettingError: The hub address is invalid, or names a repository with several files.
            HubError: The hub can't be reached, or has no such file.
        """
        return read(open_source(place), trigger)

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        dtype: torch.dtype = torch.float16,
        layout: Layout = "diffusers",
    ) -> None:
        """Writes the adapter file atomically.

        Args:
            path: Path of the file; its name ends in .safetensors.
            overwrite: Whether an existing file may be replaced.
            dtype: Dtype of the tensors in the file; int8 (with scales) is read by this package only.
            layout: "diffusers", or "kohya" for ComfyUI, A1111 and kohya's scripts.

        Raises:
            OutputError: The file already exists, its name ends otherwise, or it can't be written.
            AdapterFileError: A tensor has values that `dtype` can't hold.
            SettingError: The adapter is of method "full", which kohya's layout doesn't support, or `dtype` is
                int8 and the layout or the method doesn't support it.
        """
        if dtype == torch.int8 and (layout != "diffusers" or not self.is_low_rank):
            raise SettingError("8 bits are for adapters of method 'lora', in this package's own files")
        check_ending(path, ".safetensors")
        tensors = self._file_tensors(torch.float16 if dtype == torch.int8 else dtype)
        _check_finite("this adapter", tensors)
        if dtype == torch.int8:
            photo = {key: tensor for key, tensor in tensors.items() if key == PHOTO_KEY}
            packed = {
                key.replace(".weight", INT8_SUFFIX): tensor for key, tensor in pack(self.tensors).items()
            }
            tensors = {**packed, **photo}
        metadata = {"format": "pt"}
        if layout == "kohya":
            tensors, entries = self._as_kohya(tensors)
            metadata |= entries
        elif self.recipe.fit.method == "lora" and dtype != torch.int8:
            metadata["lora_adapter_metadata"] = json.dumps(_diffusers_metadata(self), sort_keys=True)
            tensors |= {
                key: tensor.to(dtype).contiguous()
                for part in self.parts
                for key, tensor in dora.for_peft(self.tensors, self.magnitudes, part).items()
            }
            tensors = {self.kind.names.in_file(key): tensor for key, tensor in tensors.items()}
        if self.fingerprint:
            metadata |= {METADATA_KEY: self.header(), **_modelspec(self, tensors)}
        else:
            metadata |= self.entries
        metadata |= {key: kohya.alias(metadata[key]) for key in [kohya.ALIAS_KEY] if key in metadata}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata), overwrite)

    def push_to_hub(
        self,
        repo: str,
        *,
        name: str = "adapter.safetensors",
        license: str = "other",
        pictures: Sequence[str | Path] = (),
        private: bool = False,
        dry_run: bool = False,
    ) -> hub.Upload:
        """Uploads the adapter with a model card to the Hugging Face hub, with the user's stored login.

        Args:
            repo: Repository on the hub, owner/name.
            name: Name of the file in the repository.
            license: License identifier of the hub, such as "cc-by-4.0".
            pictures: Paths of up to two sample images (PNG, JPEG, WebP or AVIF) to show in the card.
            private: Whether a new repository is private.
            dry_run: Whether to prepare the upload without sending it.

        Returns:
            The upload; its `url` is empty after a dry run.

        Raises:
            SettingError: A name, the license or a sample image is invalid.
            HubError: The hub can't be reached, or refuses the upload.
        """
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise SettingError(f"name = {name!r} isn't allowed; give one such as adapter.safetensors")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            self.save(path)
            upload = hub.prepare_push(path, repo, license=license, pictures=pictures, private=private)
        return upload if dry_run else replace(upload, url=hub.push(upload))

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of a SHA-256 of the tensors as float16; the same for a saved copy."""
        digest = hashlib.sha256()
        magnitudes = {f"{layer}.{dora.KOHYA}": each.half() for layer, each in self.magnitudes.items()}
        for key, tensor in sorted({**self._file_tensors(torch.float16), **magnitudes}.items()):
            digest.update(key.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def kind(self) -> Family:
        """The family of its base."""
        return FAMILIES[self.family]

    @property
    def is_low_rank(self) -> bool:
        """Whether it is the base's weights plus B A: neither of method "full" nor a DoRA, which replace them."""
        return self.recipe.fit.method == "lora" and not self.magnitudes

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its base that can be adapted."""
        return tuple(self.kind.parts)

    @property
    def title(self) -> str:
        """Title shown in lists of models."""
        return f"{self.rare_tokens or ''}: one photo, on {self.base}".removeprefix(": ")

    def size_on(self, base: Base) -> Size:
        """Returns its images' (width, height) in pixels on a base; the base's own if it doesn't say."""
        return self.size if all(self.size) else base.size

    def scale_of(self, part: str) -> float:
        """Returns alpha / rank, what the product of a layer's two matrices is multiplied by."""
        settings = self.recipe.lora.get(part)
        return settings.scale if settings else 0.0

    def trained_scale(self, scale: float) -> float | dict[str, float]:
        """Returns what `Mount.use` takes for a multiple of the trained strength: each part's weight is undone."""
        if self.recipe.fit.method == "full":
            return scale
        return {part: scale * undone for part, undone in self.undone_weights().items()}

    def undone_weights(self) -> dict[str, float]:
        """Returns the factor from each part's strength in the file to the trained one."""
        return {part: 1 / settings.weight for part, settings in self.recipe.lora.items()}

    def header(self) -> str:
        """Returns the content of the file's "lora_unitune" entry, as JSON."""
        own = {"recipe": self.recipe.to_dict(), "format_version": FORMAT_VERSION}
        values = own | {name: getattr(self, name) for name in METADATA_CHECKS if name not in own}
        values |= {name: getattr(self, name) for name in OPTIONAL_CHECKS if getattr(self, name)}
        return json.dumps(values, sort_keys=True)

    def _as_kohya(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors with alphas by kohya's names, and kohya's header entries."""
        if self.recipe.fit.method != "lora":
            raise SettingError("an adapter of method 'full' has no kohya layout; fit the photo with 'lora'")
        photo = tensors.pop(PHOTO_KEY, None)
        lora = self.recipe.lora
        padded, lower = kohya.zero_padded(tensors, {part: settings.rank for part, settings in lora.items()})
        scales = {part: settings.scale for part, settings in lora.items()}
        renamed = kohya.to_kohya(padded, scales, self.kind, self.magnitudes)
        settings = next(each for each in (lora[self.kind.denoiser], *lora.values()) if each.rank)
        entries = kohya.header(
            renamed, settings.rank, settings.alpha or settings.rank, (self._known_base or [""])[0]
        )
        entries |= self._kohya_details()
        entries |= {} if photo is None else {PHOTO_KEY: kohya.photo_text(photo)}
        return renamed, entries | ({RANKS_KEY: json.dumps(lower, sort_keys=True)} if lower else {})

    def _kohya_details(self) -> dict[str, str]:
        """Returns the header entries that dialogs of other tools show."""
        words, size = self.rare_tokens, self.size
        tags = json.dumps({"photo": {words: 1}}) if words else ""
        base = "" if self.base == "unknown" else self.base
        resolution = "({}, {})".format(*size) if all(size) else ""
        values = {"output_name": words or self.base, "sd_model_name": base, "tag_frequency": tags}
        return {f"ss_{key}": text for key, text in {**values, "resolution": resolution}.items() if text}

    def sidecar(self) -> dict[str, Any]:
        """Returns the content of the JSON file beside an adapter that A1111, Forge and InvokeAI read."""
        version = (self._known_base or [""])[0]
        return {
            "description": self.entries.get("modelspec.description", self.title),
            "sd version": self.kind.names.in_dialogs.get(version, "Unknown"),
            "activation text": self.rare_tokens or "",
            "preferred weight": 1.0,
            "notes": "",
        }

    @property
    def _known_base(self) -> tuple[str, str] | None:
        """The base model's names in kohya's header and in ModelSpec, from the tensors or the family's only one."""
        names = self.kind.names
        only = next(iter(names.kinds.values())) if len(names.kinds) == 1 else None
        shapes = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
        return names.kind_of(shapes, self.prediction) or only

    def _file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the tensors as stored in a file, including the photo's latents."""
        photo = {} if self.photo_latents is None else {PHOTO_KEY: self.photo_latents}
        tensors = {**self.tensors, **photo}
        return {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}


def read(source: Source, trigger: str | None = None) -> Adapter:
    """Reads an adapter's tensors, after all of its header has been checked.

    Args:
        source: The adapter's file or folder.
        trigger: Trigger words of the adapter, "" if it needs none; None takes those in the header.

    Raises:
        AdapterFileError: The source isn't an adapter, is damaged, or has the wrong tensors.
        SettingError: The trigger isn't one printable line.
    """
    words = None if trigger is None else " ".join(trigger.split())
    if trigger and words and not is_line(words):
        raise SettingError(f"trigger = {trigger[:80]!r} isn't allowed; give one line of words")
    content = read_content(source)
    stored = source.tensors(content.keys.values())
    apart = {key for key, _ in content.magnitudes.values()}
    tensors = {key: stored[name].float() for key, name in content.keys.items() if key not in apart}
    photo_latents = tensors.pop(PHOTO_KEY, _photo_of(content))
    photo = {} if photo_latents is None else {PHOTO_KEY: photo_latents}
    _check_finite(source.name, {**tensors, **photo})
    tensors = unpack(tensors) if content.eight_bit else plain(tensors)
    for layer, factor in content.factors.items():
        tensors[f"{layer}.lora_B.weight"] *= factor
    for layer, rank in content.ranks.items():
        tensors[f"{layer}.lora_A.weight"] = tensors[f"{layer}.lora_A.weight"][:rank].contiguous()
        tensors[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B.weight"][:, :rank].contiguous()
    magnitudes = {
        layer: stored[content.keys[key]].float().reshape(shape).contiguous()
        for layer, (key, shape) in content.magnitudes.items()
    }
    family = FAMILIES[content.values["family"]]
    tensors = as_convolutions(tensors, family, stated_base(source.metadata))
    values = content.values | ({} if words is None else {"rare_tokens": words})
    return Adapter(tensors=tensors, photo_latents=photo_latents, magnitudes=magnitudes, **values)


def _photo_of(content: Content) -> Tensor | None:
    """Returns the photo's latents stored in the header, or None."""
    if content.photo is None:
        return None
    shape, dtype_name, values = content.photo
    dtype = {"float16": torch.float16, "float32": torch.float32}[dtype_name]
    return torch.frombuffer(bytearray(values), dtype=dtype).reshape(shape).float()


def _modelspec(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the entries of ModelSpec 1.0.1; `tensors` are those stored in the file."""
    _, kind = adapter._known_base or ("", adapter.base)
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{kind}/lora",
        "implementation": "diffusers",
        "title": adapter.title,
        "resolution": "{}x{}".format(*adapter.size),
        "trigger_phrase": adapter.rare_tokens or "",
        "hash_sha256": f"0x{kohya.content_hash(tensors)}",
    }
    entries |= {"date": adapter.date} if adapter.date else {}
    predicted = {"epsilon": "epsilon", "v_prediction": "v"}.get(adapter.prediction)
    entries |= {"prediction_type": predicted} if predicted else {}
    return {f"modelspec.{key}": value for key, value in entries.items()}


def _diffusers_metadata(adapter: Adapter) -> dict[str, Any]:
    """Returns the metadata that diffusers needs to load the adapters at the right scale.

    `save_lora_weights` writes every field of a `LoraConfig`. Here only those that matter are written, so that other
    versions of PEFT, which refuse unknown fields, can read the file too.
    """
    from lora_unitune.adapter.layers import lora_config, patterns

    metadata: dict[str, Any] = {}
    for part, settings in adapter.recipe.lora.items():
        if not settings.rank:
            continue
        config = lora_config(settings).to_dict()
        for key in _DIFFUSERS_ENTRIES:
            value = config[key]
            metadata[f"{part}.{key}"] = sorted(value) if isinstance(value, (set, tuple)) else value
        lower = patterns(adapter.tensors, settings, part)
        metadata |= {f"{part}.{key}": value for key, value in lower.items()}
        if dora.has_magnitudes(adapter.magnitudes, part):
            metadata[f"{part}.use_dora"] = True
    return metadata


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{name}: tensor {shown(key)} isn't finite; fit the photo again")
