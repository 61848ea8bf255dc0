"""Checks of an edit's texts, and notes on what the base can't do with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_unitune.adapter.adapter import Adapter
from lora_unitune.errors import PromptError, one_line
from lora_unitune.families import Base
from lora_unitune.settings import EditSettings

_WEIGHT = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|<[a-z]+:[^<>]*>", re.IGNORECASE)
"""Weights such as (fox:1.4) and networks such as <lora:name:1>, as other tools write them."""
_WORD = re.compile(r"[^\W\d_]+")
_PEOPLE = "(?:person|people|man|men|woman|women|boy|girl|child|kid|baby|face|lady|guy)"
_TRAITS = "(?:black|white|asian|african|european|indian|arab|latino|latina|hispanic|dark|pale|light)"
_AGES = "(?:young|younger|old|older|aged|elderly|teenage)"
_PERSONAL = re.compile(
    rf"\b(?:(?:skin|complexion)\b|ethnicity\b|gender\b|{_TRAITS}[- ](?:skinned\b|{_PEOPLE}\b)|{_AGES} {_PEOPLE}\b|"
    rf"as an? (?:{_AGES} )?{_PEOPLE}\b|(?:him|her|them|himself|herself) (?:as )?(?:look )?(?:{_AGES}|{_TRAITS})\b)",
    re.IGNORECASE,
)
"""Words for what belongs to a person: skin, origin, age, gender."""

_STYLE = re.compile(
    r"\b(?:sketch|drawing|painting|pixel art|cartoon|comic|anime|manga|water ?colou?r|mosaic|engraving|woodcut|"
    r"etching|line art|ink|crayon|charcoal|pastel|origami|low poly|stained glass|cross ?stitch|graffiti)\b",
    re.IGNORECASE,
)
"""Words for pictures that keep no fine detail of a photo."""


def asks_for_a_style(text: str) -> bool:
    """Returns whether a prompt asks for a picture of another kind than a photo, such as a sketch."""
    return _STYLE.search(text) is not None


def checked_text(name: str, text: Any) -> str:
    """Returns a text for the base's tokenizer; None is the empty text.

    Args:
        name: Name of the argument.
        text: What was given for it.

    Raises:
        PromptError: It isn't one text, or has bytes that aren't UTF-8.
    """
    if text is None:
        return ""
    if not isinstance(text, str):
        given = one_line(repr(text), 80)
        raise PromptError(f"{name} = {given} isn't allowed; give one text, and edit once for each")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{name} = {text!r} has bytes that aren't UTF-8; type it again") from None
    return text


def check_prompt(prompt: Any) -> None:
    """Checks that a prompt is a text that isn't empty.

    Raises:
        PromptError: It isn't.
    """
    if not checked_text("prompt", prompt).strip():
        raise PromptError("the prompt is empty; say in a few words what the photo should become")


def prompt_notes(base: Base, **texts: str) -> list[str]:
    """Returns notes on an edit's texts: what needs care, what is cut off, what means nothing, and unknown words.

    Args:
        base: The base.
        **texts: The complete texts, by the names of their arguments.
    """
    notes = []
    if any(_PERSONAL.search(text) for text in texts.values()):
        notes.append(
            "this asks to change what belongs to a person, such as skin, age or gender: have their consent, and say "
            "that the image is edited"
        )
    for name, text in texts.items():
        shown = name.replace("_", " ")
        _, cut = base.tokenize(text)
        if cut:
            notes.append(f"the {shown} is too long for the base; this was left out: {cut!r}")
        weights = _WEIGHT.findall(text)
        if weights:
            notes.append(f"{' and '.join(weights)} in the {shown} is read as text: weights mean nothing here")
        strange = unknown_words(base, _WEIGHT.sub(" ", text))
        if strange:
            these = "this word" if len(strange) == 1 else "these words"
            notes.append(
                f"{base.name} never learned {these} of the {shown}, which may change the picture at random: "
                f"{', '.join(strange)}; see lora-unitune words"
            )
    return notes


def settings_notes(settings: EditSettings, negative_prompt: str) -> list[str]:
    """Returns notes on what an edit's settings leave without effect."""
    if not negative_prompt or (settings.guidance != 1 and settings.unconditional != "rare"):
        return []
    why = "guidance is 1" if settings.guidance == 1 else "guidance is against the rare tokens"
    return [f"{why}, so the negative prompt has no effect"]


def unknown_words(base: Base, text: str) -> list[str]:
    """Returns the words of a text that the base never learned.

    Known for pocket alone, whose tokenizer has one token for each word of its training and some for their parts,
    with embeddings as small as at the start. Other bases spell words that they know well in several tokens.
    """
    if base.name != "pocket":
        return []
    vocabulary = base.vocabulary()
    norms, known = vocabulary.norms() or [], vocabulary.words()
    untrained = max(norms, default=0.0) / 4
    words = dict.fromkeys(_WORD.findall(text.lower()))
    return [word for word in words if word not in known or norms[known[word]] < untrained]


def complete_prompt(adapter: Adapter | None, *prompts: str) -> str:
    """Returns prompts as one text with the adapter's rare tokens before it.

    Raises:
        PromptError: The adapter doesn't store any, or a text isn't UTF-8.
    """
    if adapter is not None and adapter.rare_tokens is None:
        way = "open it with trigger='WORDS', which stand for its subject, or trigger='' for none"
        raise PromptError(f"the adapter doesn't store rare tokens; {way}")
    words = adapter.rare_tokens if adapter else ""
    return checked_text("trigger or prompt", " ".join(part for part in (words, *prompts) if part))


def earlier_prompts(base: Base, adapter: Adapter | None, turns: Sequence[str], prompt: str) -> str:
    """Returns the prompts of earlier turns as one text: the latest of them that the base's text encoder has room for.

    A turn that samples the whole image again has to be told them.

    Args:
        base: The base.
        adapter: The adapter.
        turns: The prompts of the earlier turns.
        prompt: The prompt of the next turn, which comes after them.
    """
    first = 0
    while first < len(turns) and base.tokenize(complete_prompt(adapter, *turns[first:], prompt))[1]:
        first += 1
    return " ".join(turns[first:])
