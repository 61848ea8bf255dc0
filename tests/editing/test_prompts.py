"""Notes on a prompt: words that pocket never learned, and other tools' weights."""

from __future__ import annotations

import pytest

from lora_unitune.cli.words import pocket_words
from lora_unitune.editing.prompts import asks_for_a_style, prompt_notes, unknown_words
from lora_unitune.families import Base
from lora_unitune.pocket import world
from lora_unitune.pocket.pretraining.assembly import rare_words


def test_pocket_knows_the_words_that_are_listed_and_no_others_of_its_captions(basepocket: Base) -> None:
    listed = {word for phrases in pocket_words().values() for phrase in phrases for word in phrase.split()}
    assert unknown_words(basepocket, " ".join(listed)) == []
    never_drawn = {"little", "large"}  # no caption has the second word for a size
    assert {word.strip(",") for word in world.words()} - listed - never_drawn <= {
        "and",
        "scene",
        "the",
        "a",
        "an",
    }
    assert set(unknown_words(basepocket, " ".join(never_drawn))) == never_drawn


def test_words_and_parts_of_words_that_pocket_never_learned_are_noted(basepocket: Base) -> None:
    (note,) = prompt_notes(basepocket, prompt="a dog wearing sunglasses, berry at night")
    assert "never learned these words of the prompt" in note and ": wearing, sunglasses, berry;" in note
    rare = " ".join(rare_words()[:4])
    assert prompt_notes(basepocket, prompt=f"{rare} a Dog at night, pixel art.", negative_prompt="") == []
    (note,) = prompt_notes(basepocket, prompt="a dog", negative_prompt="blurry")
    assert "this word of the negative prompt" in note


def test_other_bases_spell_words_that_they_know_in_several_tokens(base15: Base) -> None:
    assert prompt_notes(base15, prompt="sunglasses") == []


@pytest.mark.parametrize("text", ["(fox:1.4)", "(a red fox : .8)", "<lora:name:1>", "<lyco:a:1>"])
def test_weights_of_other_tools_mean_nothing(base15: Base, text: str) -> None:
    (note,) = prompt_notes(base15, prompt=f"a {text}")
    assert note.startswith(f"{text} in the prompt is read as text")


@pytest.mark.parametrize("text", ["a fox (red)", "at 3:15", "a < b", "(fox)"])
def test_other_brackets_are_not_noted(base15: Base, text: str) -> None:
    assert prompt_notes(base15, prompt=text) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "with darker skin",
        "an old man",
        "as a woman",
        "as an elderly person",
        "make him younger",
        "a Black woman",
        "dark-skinned",
        "another ethnicity",
        "make her look old",
    ],
)
def test_a_prompt_for_what_belongs_to_a_person_gets_one_note(base15: Base, prompt: str) -> None:
    notes = prompt_notes(base15, prompt=prompt, negative_prompt="white man")
    assert len([note for note in notes if "consent" in note]) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "a black cat",
        "an old car",
        "a white dress",
        "a person at night",
        "a man with a hat",
        "the old town",
        "as a pencil sketch",
        "an older photograph of a child",
        "a race car",
        "light on her face",
        "an Indian elephant",
        "a baby fox",
    ],
)
def test_other_prompts_get_none(base15: Base, prompt: str) -> None:
    assert not [note for note in prompt_notes(base15, prompt=prompt) if "consent" in note]


def test_words_for_a_style() -> None:
    for prompt in (
        "a pencil sketch of a fox",
        "Pixel Art",
        "an oil painting",
        "watercolour",
        "zqrt a cartoon",
    ):
        assert asks_for_a_style(prompt)
    for prompt in (
        "a fox at night",
        "a sepia photo",
        "pink paint",
        "a drawn sword",
        "sinking",
        "a picture of a fox",
        "",
    ):
        assert not asks_for_a_style(prompt)
