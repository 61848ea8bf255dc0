"""Recipes: every setting of a fit and an edit, as frozen dataclasses that read and write TOML.

A recipe's TOML sections carry the names of the fields of `Recipe`, and their keys the names of the fields of
the section's dataclass. Keys, types and ranges are strict: anything else is a `RecipeError` that says what is
allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lora_unitune.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

_PACKAGE_FOLDER = Path(__file__).resolve().parent


def _between(low: float, high: float) -> dict[str, Any]:
    """Metadata of a number in [low, high]."""
    return {"low": low, "high": high}


def _above(low: float, high: float) -> dict[str, Any]:
    """Metadata of a number in (low, high]."""
    return {"low": low, "high": high, "open": True}


class _Checked:
    """Checks (and normalises lists to tuples, whole numbers to floats) the fields of a settings section."""

    def __post_init__(self) -> None:
        section = _SECTION_OF[type(self).__name__]
        hints = get_type_hints(type(self))
        for setting in dataclasses.fields(self):  # type: ignore[arg-type]
            name = f"{section}.{setting.name}"
            value = getattr(self, setting.name)
            checked = _checked_value(name, value, hints[setting.name], setting.metadata)
            object.__setattr__(self, setting.name, checked)


@dataclass(frozen=True)
class PhotoSettings(_Checked):
    """How the photo is read.

    Attributes:
        resolution: Side of the square photo in pixels; 0 takes the base's own.
    """

    resolution: int = field(default=0, metadata=_between(0, 4096))


@dataclass(frozen=True)
class LoraSettings(_Checked):
    """Low-rank adapters (arXiv 2106.09685): rank r, alpha and adapted modules of each part of the base.

    Attributes:
        unet_rank: Rank of the UNet's adapters.
        unet_alpha: Their alpha; an adapter's output is scaled by alpha / rank.
        unet_targets: Ends of the names of the UNet modules that are adapted.
        text_encoder_rank: Rank of the text encoder's adapters; 0 leaves the text encoder as it is.
        text_encoder_alpha: Their alpha.
        text_encoder_targets: Ends of the names of the text encoder's modules that are adapted.
        text_encoder_2_rank: The same for the second text encoder, of bases that have one.
        text_encoder_2_alpha: Likewise.
        text_encoder_2_targets: Likewise.
    """

    unet_rank: int = field(default=8, metadata=_between(1, 1024))
    unet_alpha: float = field(default=8.0, metadata=_above(0, 4096))
    unet_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoder_rank: int = field(default=4, metadata=_between(0, 1024))
    text_encoder_alpha: float = field(default=4.0, metadata=_above(0, 4096))
    text_encoder_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    text_encoder_2_rank: int = field(default=4, metadata=_between(0, 1024))
    text_encoder_2_alpha: float = field(default=4.0, metadata=_above(0, 4096))
    text_encoder_2_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class FitSettings(_Checked):
    """The training on one photo.

    Attributes:
        method: "lora" trains low-rank adapters; "full" trains all weights of the same parts.
        steps: Optimizer steps.
        batch_size: Noised copies of the photo in one forward pass.
        gradient_accumulation: Forward passes per optimizer step.
        unet_learning_rate: Learning rate of the UNet's adapters.
        text_encoder_learning_rate: Learning rate of the text encoders' adapters.
        optimizer: Name of an optimizer, see `training/optimizers.py`; "auto" is adamw, or adamw8bit for many
            weights on a GPU.
        weight_decay: Decoupled weight decay.
        max_gradient_norm: Gradients are clipped to this norm; 0 leaves them alone.
        warmup_steps: Steps over which the learning rate grows linearly from 0.
        decay_share: Share of the steps, the last ones, over which the learning rate falls linearly to 0.
        precision: Number format of the forward pass; "auto" picks one for the device.
        gradient_checkpointing: Trades time for memory by recomputing activations.
        quantize: Rounds the frozen base's linear layers to 8 or 4 bits (QLoRA, arXiv 2305.14314).
    """

    method: Literal["lora", "full"] = "lora"
    steps: int = field(default=64, metadata=_between(1, 100_000))
    batch_size: int = field(default=4, metadata=_between(1, 1024))
    gradient_accumulation: int = field(default=1, metadata=_between(1, 1024))
    unet_learning_rate: float = field(default=4e-4, metadata=_above(0, 1))
    text_encoder_learning_rate: float = field(default=1e-4, metadata=_above(0, 1))
    optimizer: str = "auto"
    weight_decay: float = field(default=0.0, metadata=_between(0, 1))
    max_gradient_norm: float = field(default=1.0, metadata=_between(0, 1e6))
    warmup_steps: int = field(default=0, metadata=_between(0, 100_000))
    decay_share: float = field(default=0.0, metadata=_between(0, 1))
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    quantize: Literal["none", "int8", "nf4"] = "none"


@dataclass(frozen=True)
class PromptSettings(_Checked):
    """The rare tokens that stand for the photo.

    Attributes:
        rare_tokens: The tokens, separated by spaces; "" finds them in the base's tokenizer.
        rare_token_count: How many are looked for.
    """

    rare_tokens: str = ""
    rare_token_count: int = field(default=2, metadata=_between(1, 8))


@dataclass(frozen=True)
class EditSettings(_Checked):
    """The sampler's settings.

    Attributes:
        steps: Sampling steps of a full run, from pure noise.
        guidance: Classifier-free guidance weight w (arXiv 2207.12598); 1 switches guidance off.
        guidance_start: Share of a full run's denoising, the noisiest part, that goes without guidance
            (arXiv 2404.07724).
        guidance_stop: Share of it after which guidance ends.
        guidance_rescale: phi of arXiv 2305.08891, section 3.4; 0 switches it off.
        strength: How much noise the photo gets before sampling starts (t0 of SDEdit, arXiv 2108.01073); 1 is
            pure noise.
        adapter_scale: Multiplies the adapter's output; 0 is the plain base.
        unconditional: Which weights predict the empty prompt's branch: "adapter" or "base".
        residual: Adds to the photo, step by step, only what the prompt changes against the rare tokens alone
            (FlowEdit, arXiv 2412.08629); below strength 1.
    """

    steps: int = field(default=25, metadata=_between(1, 1000))
    guidance: float = field(default=5.0, metadata=_between(1, 100))
    guidance_start: float = field(default=0.0, metadata=_between(0, 1))
    guidance_stop: float = field(default=1.0, metadata=_between(0, 1))
    guidance_rescale: float = field(default=0.7, metadata=_between(0, 1))
    strength: float = field(default=0.95, metadata=_above(0, 1))
    adapter_scale: float = field(default=1.0, metadata=_between(0, 4))
    unconditional: Literal["adapter", "base"] = "adapter"
    residual: bool = False


@dataclass(frozen=True)
class Recipe:
    """Every setting of a fit and the defaults of its edits."""

    photo: PhotoSettings = field(default_factory=PhotoSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    edit: EditSettings = field(default_factory=EditSettings)

    def __post_init__(self) -> None:
        for name, kind in _SECTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise RecipeError(f"recipe section {name} has to be a {kind.__name__}, not {value!r}")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Reads a shipped recipe by its name ("pocket/default") or any TOML file by its path.

        Args:
            name_or_path: A name out of `available_recipes()`, or a path ending in .toml.

        Returns:
            The recipe, with defaults where the file says nothing.

        Raises:
            RecipeError: No such recipe, or its content isn't a valid one.
        """
        name = str(name_or_path)
        path = Path(name) if name.endswith(".toml") else _recipe_folder() / f"{name}.toml"
        if not name.endswith(".toml") and name not in available_recipes():
            raise RecipeError(
                f"unknown recipe {name!r}{_nearest(name, available_recipes())}; give one of "
                f"{', '.join(available_recipes())}, or the path of a .toml file"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"recipe file {name!r} doesn't exist; check the path") from None
        except UnicodeDecodeError:
            raise RecipeError(f"recipe file {name!r} isn't UTF-8 text; give a TOML file") from None
        except OSError as error:
            raise RecipeError(f"recipe file {name!r} can't be read: {error.strerror or error}") from None
        try:
            return cls.from_toml(text)
        except RecipeError as error:
            raise RecipeError(f"recipe {name}: {error}") from None

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Reads a recipe from TOML text.

        Raises:
            RecipeError: The text isn't TOML, or a key, type or value isn't allowed.
        """
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"not valid TOML: {' '.join(str(error).split())}") from None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from nested dictionaries, as `to_dict` returns; missing keys keep their defaults.

        Raises:
            RecipeError: A key, type or value isn't allowed.
        """
        return cls(**_sections_with(cls(), settings))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the recipe as nested dictionaries that JSON and TOML can hold (tuples as lists)."""
        sections = dataclasses.asdict(self)
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in sections.items()
        }

    def to_toml(self) -> str:
        """Returns the recipe as TOML with every value written out."""
        blocks = []
        for name, section in self.to_dict().items():
            lines = [f"{key} = {_toml_value(value)}" for key, value in section.items()]
            blocks.append("\n".join([f"[{name}]", *lines]))
        return "\n\n".join(blocks) + "\n"

    def override(self, assignments: Sequence[str]) -> Recipe:
        """Returns a copy with some settings replaced.

        Args:
            assignments: Texts like "fit.steps=50", "lora.unet_targets=to_q,to_v" or "fit.precision=bf16".

        Raises:
            RecipeError: An assignment isn't of that form, or its key, type or value isn't allowed.
        """
        changes: dict[str, dict[str, Any]] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            section, dot, key = name.strip().partition(".")
            if not equals or not dot or not key:
                raise RecipeError(
                    f"can't read the setting {assignment!r}; write SECTION.KEY=VALUE, as in fit.steps=50"
                )
            kind = _setting_kind(section, key)
            changes.setdefault(section, {})[key] = _parse_value(f"{section}.{key}", text.strip(), kind)
        return Recipe(**_sections_with(self, changes))


_SECTIONS: dict[str, type] = {
    "photo": PhotoSettings,
    "lora": LoraSettings,
    "fit": FitSettings,
    "prompt": PromptSettings,
    "edit": EditSettings,
}
_DEFAULTS = {"sd": "sd15/8gb", "sdxl": "sdxl/12gb"}
_SECTION_OF = {kind.__name__: name for name, kind in _SECTIONS.items()}


def available_recipes() -> list[str]:
    """Returns the names of the recipes that ship with the package, sorted, such as "pocket/default"."""
    folder = _recipe_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.toml"))


def default_recipe(base_name: str, family: str) -> Recipe:
    """Returns the recipe for a base when the user names none.

    Args:
        base_name: Name, folder or hub id of the base, as the user gave it.
        family: The base's family, "sd" or "sdxl".
    """
    return Recipe.load("pocket/default" if base_name == "pocket" else _DEFAULTS[family])


def _recipe_folder() -> Path:
    """Returns the recipes in an installed package, or the top-level ones of a source checkout."""
    installed = _PACKAGE_FOLDER / "recipes"
    return installed if installed.is_dir() else _PACKAGE_FOLDER.parent / "recipes"


def _nearest(name: str, names: Iterable[str]) -> str:
    """Returns a suggestion, " (did you mean 'steps'?)", or nothing when no name is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _setting_kind(section: str, key: str) -> Any:
    """Returns the type of a setting.

    Raises:
        RecipeError: There is no such section or key.
    """
    if section not in _SECTIONS:
        nearest = _nearest(section, _SECTIONS)
        names = ", ".join(_SECTIONS)
        raise RecipeError(f"unknown recipe section {section!r}{nearest}; the sections are {names}")
    kinds = get_type_hints(_SECTIONS[section])
    if key not in kinds:
        nearest = _nearest(key, kinds)
        raise RecipeError(f"unknown setting {key!r} of {section}{nearest}; it has {', '.join(kinds)}")
    return kinds[key]


def _sections_with(recipe: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe's sections, changed; unknown names are a RecipeError."""
    sections = {name: getattr(recipe, name) for name in _SECTIONS}
    for name, values in changes.items():
        if name in _SECTIONS and not isinstance(values, Mapping):
            raise RecipeError(f"{name} has to be a section, not {values!r}; write [{name}] above its keys")
        for key in values if name in _SECTIONS else [""]:
            _setting_kind(name, key)
        sections[name] = dataclasses.replace(sections[name], **values)
    return sections


def _checked_value(name: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """Returns a setting's value in its own type, or raises a RecipeError that names what is allowed."""
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind) or not isinstance(value, str):
            raise RecipeError(f"{name} = {value!r} isn't allowed; choose one of {', '.join(get_args(kind))}")
        return value
    if origin is tuple:
        texts = tuple(value) if isinstance(value, (list, tuple)) else ()
        if not texts or not all(isinstance(text, str) and text and text.isprintable() for text in texts):
            raise RecipeError(f"{name} = {value!r} isn't allowed; give a list of one or more names")
        return texts
    if kind is str:
        if not isinstance(value, str) or not value.isprintable():
            raise RecipeError(f"{name} = {value!r} isn't allowed; give one line of text")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise RecipeError(f"{name} = {value!r} isn't allowed; give true or false")
        return value
    return _checked_number(name, value, kind, limits)


def _checked_number(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> int | float:
    """Returns an int or float within its limits, or raises a RecipeError that names them."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right_type = is_number and (kind is float or isinstance(value, int))
    low, high, is_open = limits["low"], limits["high"], limits.get("open", False)
    if not right_type or not low <= value <= high or (is_open and value == low):
        noun = "a whole number" if kind is int else "a number"
        lower = f"above {low:g} and up to" if is_open else f"from {low:g} to"
        raise RecipeError(f"{name} = {value!r} isn't allowed; give {noun} {lower} {high:g}")
    return float(value) if kind is float else int(value)


def _parse_value(name: str, text: str, kind: Any) -> Any:
    """Reads an override's text in the setting's own type; what can't be read goes on to the check as text."""
    if get_origin(kind) is tuple:
        return [part.strip().strip("\"'") for part in text.strip("[]").split(",") if part.strip()]
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _toml_value(value: Any) -> str:
    """Writes a value as TOML; texts are printable, so JSON's escapes are TOML's."""
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)
