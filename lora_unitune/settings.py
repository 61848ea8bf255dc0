"""The sections of a recipe as frozen dataclasses: each setting's default, range and help, declared once.

A section checks its own values. The command line takes the ranges and the help of its options from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from lora_unitune.errors import RecipeError, SettingError

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})|([1-9]\d{0,9})|", re.ASCII)
_BOX = re.compile(r"(\d{1,7}), *(\d{1,7}), *(\d{1,7}), *(\d{1,7})|", re.ASCII)

S = TypeVar("S", bound="Section")


def _number(default: float, low: float, high: float, help: str, *, above: bool = False) -> Any:
    """A number in [low, high], or in (low, high] with `above`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "help": help})


def _value(default: Any, help: str, **metadata: Any) -> Any:
    """A string, a choice, a list of names, or a boolean."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Section:
    """A section of a recipe. Its fields are checked on construction: invalid values raise a RecipeError."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        values = {setting.name: getattr(self, setting.name) for setting in dataclasses.fields(self)}
        for name, value in checked_values(type(self), self.section, values).items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class PhotoSettings(Section):
    """What the base sees of the photo, and at what size."""

    section: ClassVar[str] = "photo"

    size: str = _value(
        "",
        "Size at which the base processes the photo: WIDTHxHEIGHT, or a total number of pixels; empty takes the "
        "base's own number of pixels, at the photo's aspect ratio.",
        pattern=_SIZE,
        allowed="WIDTHxHEIGHT such as 768x512, or a number of pixels such as 393216",
    )
    box: str = _value(
        "",
        "Part of the photo to fit and to edit, in its pixels, from its upper left corner on; the base sees some "
        "context too. Empty takes the whole photo.",
        pattern=_BOX,
        allowed="four whole numbers x,y,width,height in pixels of the photo, such as 1200,800,900,900",
        metavar="X,Y,W,H",
    )

    @property
    def exact(self) -> tuple[int, int] | None:
        """The size as (width, height), where both are set."""
        match = _SIZE.fullmatch(self.size)
        return (int(match[1]), int(match[2])) if match and match[1] else None

    @property
    def pixels(self) -> int:
        """The total number of pixels, 0 for the base's own."""
        match = _SIZE.fullmatch(self.size)
        return int(match[3]) if match and match[3] else 0

    @property
    def part(self) -> tuple[int, int, int, int] | None:
        """Left, top, right and bottom of the box, in pixels of the photo; None for the whole photo."""
        if not self.box:
            return None
        left, top, width, height = map(int, self.box.split(","))
        return left, top, left + width, top + height


LARGEST_RANK = 1024


@dataclass(frozen=True)
class LoraSettings(Section):
    """Training of one part of the base: its low-rank adapters (arXiv 2106.09685) and its learning rate."""

    section: ClassVar[str] = "lora.PART"

    rank: int = field(
        metadata={
            "low": 0,
            "high": LARGEST_RANK,
            "above": False,
            "help": "Rank; 0 leaves the part unchanged.",
        }
    )
    alpha: float = _number(
        0.0, 0, 4096, "The adapter's output is multiplied by alpha / rank; 0 takes the rank, a factor of 1."
    )
    targets: tuple[str, ...] = _value(
        (), "Suffixes of the names of the modules that get an adapter; none takes the family's.", empty=True
    )
    learning_rate: float = _number(0.0, 0, 1, "Learning rate of the part; 0 takes the family's.")
    weight: float = _number(
        1.0,
        0,
        4,
        "Strength of the part in the saved file, relative to what was trained: what an edit, and any other tool "
        'at weight 1, applies. Ignored by method "full".',
        above=True,
    )

    @property
    def scale(self) -> float:
        """alpha / rank, what the product of a layer's two matrices is multiplied by; 0 without adapters."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class FitSettings(Section):
    """The training on one photo."""

    section: ClassVar[str] = "fit"

    method: Literal["lora", "full"] = _value(
        "lora", '"lora" trains low-rank adapters; "full" trains all weights of the same parts.'
    )
    steps: int = _number(64, 1, 100_000, "Optimizer steps.")
    batch_size: int = _number(4, 1, 1024, "Noised copies of the photo in one forward pass.")
    gradient_accumulation: int = _number(1, 1, 1024, "Forward passes for one optimizer step.")
    optimizer: str = _value(
        "auto", "auto, adamw, adamw8bit, paged_adamw8bit or sgd; auto is adamw8bit for many weights on a GPU."
    )
    weight_decay: float = _number(0.0, 0, 1, "Decoupled weight decay.")
    max_gradient_norm: float = _number(
        1.0, 0, 1e6, "Gradients are clipped to this norm; 0 switches clipping off."
    )
    warmup_steps: int = _number(0, 0, 100_000, "Steps over which the learning rate rises linearly from 0.")
    decay_share: float = _number(
        0.0, 0, 1, "Share of the steps, the last ones, over which the learning rate falls linearly to 0."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _value(
        "auto", "Precision of the forward pass; auto chooses one for the device."
    )
    gradient_checkpointing: bool = _value(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    quantize: Literal["none", "int8", "nf4"] = _value(
        "none", "Keep the frozen base's linear layers in 8 or 4 bits (QLoRA, arXiv 2305.14314)."
    )


@dataclass(frozen=True)
class PromptSettings(Section):
    """The rare tokens that stand for the photo."""

    section: ClassVar[str] = "prompt"

    rare_tokens: str = _value(
        "", "The tokens, separated by spaces; empty chooses some from the base's tokenizer."
    )
    rare_token_count: int = _number(2, 1, 8, "Number of rare tokens to choose.")


@dataclass(frozen=True)
class EditSettings(Section):
    """How an edit is sampled."""

    section: ClassVar[str] = "edit"

    steps: int = _number(25, 1, 1000, "Sampling steps of a full run, from pure noise.")
    guidance: float = _number(
        5.0, 1, 100, "Classifier-free guidance (arXiv 2207.12598): low stays with the photo, high follows the "
        "prompt, 1 switches it off."
    )  # fmt: skip
    guidance_start: float = _number(
        0.0, 0, 1, "Share of the denoising, its noisiest part, without guidance (arXiv 2404.07724)."
    )
    guidance_stop: float = _number(1.0, 0, 1, "Share of the denoising after which guidance ends.")
    guidance_rescale: float = _number(
        0.7,
        0,
        1,
        "Rescaling against oversaturated colors at high guidance (phi of arXiv 2305.08891, section 3.4).",
    )
    least_change: float = _number(
        0.0,
        0,
        10,
        "With a residual and guidance against the rare tokens: guidance rises, up to four times, until the prompt "
        "changes some place by this much (in units of x0); 0 keeps it constant.",
    )
    strength: float = _number(
        0.95, 0, 1, "Noise added to the photo before sampling (t0 of SDEdit, arXiv 2108.01073); 1 is pure noise.",
        above=True,
    )  # fmt: skip
    adapter_scale: float = _number(
        1.0, 0, 4, "Scale of the adapter; 1 is the strength in the file, 0 the base alone."
    )
    unconditional: Literal["adapter", "base", "rare"] = _value(
        "adapter",
        "What guidance amplifies the prompt against: the empty prompt with the adapter or with the base alone, "
        "or the rare tokens alone (arXiv 2505.23145), so that only the edit's words are amplified.",
    )
    clip_skip: int = _number(
        1,
        1,
        24,
        "Which layer of a CLIP text encoder prompts are embedded by, counted from its last as A1111 and kohya do; "
        "the fit uses it too, so set it there: --set edit.clip_skip=2.",
    )
    residual: bool = _value(
        False,
        "Add to the photo only what the prompt changes, at every strength (FlowEdit, arXiv 2412.08629).",
    )
    details: bool = _value(
        False,
        "Restore the photo's own pixels, in the edit's light, where the base can't draw them, and its fine detail "
        "where the edit keeps its structure; best from the photo itself, since an adapter holds only its latents.",
    )
    size: Literal["photo", "base"] = _value(
        "photo",
        "Size of the image: the photo's own, where the photo is given, with its own pixels wherever the edit changes "
        "nothing or only the light; or the base's.",
    )


def check_whole(name: str, value: Any, low: int) -> None:
    """Checks an argument that takes a whole number, such as a seed.

    Raises:
        SettingError: It is none from `low` to 2**63 - 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
        raise SettingError(f"{name} = {value!r} isn't allowed; give a whole number from {low} to 2**63 - 1")


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a suggestion, " (did you mean 'steps'?)", or "" when no name is near."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def kind_of(section: type[Section], name: str, key: str) -> Any:
    """Returns the type of a setting.

    Args:
        section: Class of the section.
        name: Name of the section in messages, such as "fit" or "lora.unet".
        key: Name of the setting.

    Raises:
        RecipeError: The section has no such setting.
    """
    kinds = _kinds(section)
    if key not in kinds:
        raise RecipeError(
            f"unknown setting {key!r} of {name}{nearest(key, kinds)}; it has {', '.join(kinds)}"
        )
    return kinds[key]


_KINDS: dict[type[Section], dict[str, Any]] = {}


def _kinds(section: type[Section]) -> dict[str, Any]:
    """Returns the types of a section's settings, cached because resolving type hints is slow."""
    if section not in _KINDS:
        hints = get_type_hints(section)
        _KINDS[section] = {setting.name: hints[setting.name] for setting in dataclasses.fields(section)}
    return _KINDS[section]


def make_section(kind: type[S], name: str, values: Mapping[str, Any], before: S | None = None) -> S:
    """Makes a section, or a changed copy of one.

    Args:
        kind: Class of the section.
        name: Name of the section in messages.
        values: Values of some settings, by name.
        before: The section to change; None starts from the defaults.

    Raises:
        RecipeError: A name, type or value isn't allowed, or a setting without a default is missing.
    """
    checked = checked_values(kind, name, values)
    if before is not None:
        return dataclasses.replace(before, **checked)
    for setting in dataclasses.fields(kind):
        if setting.default is dataclasses.MISSING and setting.name not in checked:
            raise RecipeError(f"{name} has no {setting.name}; give {name}.{setting.name} too")
    return kind(**checked)


def checked_values(kind: type[Section], name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings converted to their types.

    Raises:
        RecipeError: A name, type or value isn't allowed; the message says what is.
    """
    fields = {setting.name: setting for setting in dataclasses.fields(kind)}
    return {
        key: _checked(f"{name}.{key}", value, kind_of(kind, name, key), fields[key].metadata)
        for key, value in values.items()
    }


def _checked(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> Any:
    """Returns a setting's value converted to its type, or raises a RecipeError that says what is allowed."""
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind) or not isinstance(value, str):
            raise RecipeError(f"{name} = {value!r} isn't allowed; choose one of {', '.join(get_args(kind))}")
        return value
    if origin is tuple:
        texts = tuple(value) if isinstance(value, (list, tuple)) else (None,)
        are_names = all(isinstance(text, str) and text and text.isprintable() for text in texts)
        if not are_names or not (texts or metadata.get("empty")):
            raise RecipeError(f"{name} = {value!r} isn't allowed; give a list of one or more names")
        return texts
    if kind is str:
        pattern = metadata.get("pattern")
        if (
            not isinstance(value, str)
            or not value.isprintable()
            or (pattern and not pattern.fullmatch(value))
        ):
            allowed = metadata.get("allowed", "one line of text")
            raise RecipeError(f"{name} = {value!r} isn't allowed; give {allowed}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise RecipeError(f"{name} = {value!r} isn't allowed; give true or false")
        return value
    return _checked_number(name, value, kind, metadata)


def _checked_number(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> int | float:
    """Returns an int or float within its limits, or raises a RecipeError that names them."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right_type = is_number and (kind is float or isinstance(value, int))
    low, high, is_above = limits["low"], limits["high"], limits["above"]
    if not right_type or not low <= value <= high or (is_above and value == low):
        noun = "a whole number" if kind is int else "a number"
        lower = f"above {low:g} and up to" if is_above else f"from {low:g} to"
        raise RecipeError(f"{name} = {value!r} isn't allowed; give {noun} {lower} {high:g}")
    return float(value) if kind is float else int(value)
