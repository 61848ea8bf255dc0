"""Rare tokens: chosen tokens are rare, stable and deterministic; unusable ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_unitune.errors import PromptError
from lora_unitune.families import Base
from lora_unitune.families.sd import ClipVocabulary
from lora_unitune.training.rare_tokens import check_rare_tokens, find_rare_tokens, rank_rare_tokens

# The words tests/conftest.py builds its tokenizer from.
COMMON = set(
    "the with photo fox cat dog horse house tree boat car red blue green night day city snow".split()
)
RARE = set("beikk zqrt sksq ohwx plfz jmnq wxyv qorb tzlk".split())


@pytest.fixture
def tokenizer(base15: Base) -> Any:
    return base15.tokenizer


@pytest.fixture
def vocabulary(tokenizer: Any) -> ClipVocabulary:
    return ClipVocabulary(tokenizer)


def test_found_tokens_are_single_stable_tokens(tokenizer: Any) -> None:
    for word in rank_rare_tokens(ClipVocabulary(tokenizer)):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids).strip() == word
        assert word.isascii() and word.islower() and 3 <= len(word) <= 5


def test_rare_words_rank_before_common_ones(tokenizer: Any) -> None:
    ranked = rank_rare_tokens(ClipVocabulary(tokenizer))
    assert set(ranked) >= RARE
    first = ranked[: len(RARE) - 2]
    assert not COMMON & set(first)


def test_long_embeddings_are_left_out(tokenizer: Any) -> None:
    embeddings = torch.ones(len(tokenizer), 4)
    index = tokenizer("sksq", add_special_tokens=False)["input_ids"][0]
    late = rank_rare_tokens(ClipVocabulary(tokenizer)).index("sksq")
    embeddings[index] = 1e-3
    assert rank_rare_tokens(ClipVocabulary(tokenizer, embeddings)).index("sksq") <= late
    embeddings[index] = 1e3
    assert "sksq" not in rank_rare_tokens(ClipVocabulary(tokenizer, embeddings))


def test_the_same_tokens_every_time_and_limit_is_a_prefix(tokenizer: Any) -> None:
    embeddings = torch.randn(len(tokenizer), 4, generator=torch.Generator().manual_seed(0))
    ranked = rank_rare_tokens(ClipVocabulary(tokenizer, embeddings))
    assert ranked == rank_rare_tokens(ClipVocabulary(tokenizer, embeddings))
    assert ranked[:3] == rank_rare_tokens(ClipVocabulary(tokenizer, embeddings), limit=3)
    assert len(set(ranked)) == len(ranked)


def test_joined_tokens_stay_one_token_each_in_front_of_a_prompt(tokenizer: Any) -> None:
    tokens = find_rare_tokens(ClipVocabulary(tokenizer), count=3)
    assert len(tokens.split()) == 3
    alone = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    prompted = tokenizer(f"{tokens} a red fox", add_special_tokens=False)["input_ids"]
    assert len(alone) == 3 and prompted[:3] == alone
    assert check_rare_tokens(ClipVocabulary(tokenizer), tokens) == tokens


def test_too_many_rare_tokens_say_how_many_there_are(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"500 rare tokens .* has \d+; lower prompt.rare_token_count"):
        find_rare_tokens(ClipVocabulary(tokenizer), count=500)


def test_spaces_are_tidied_and_words_of_several_tokens_are_allowed(tokenizer: Any) -> None:
    assert check_rare_tokens(ClipVocabulary(tokenizer), "  zqrt   beikkpic ") == "zqrt beikkpic"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("ZQRT", "doesn't survive"),
        ("zqrt!", "doesn't survive"),
        ("<|endoftext|>", "doesn't survive"),
        ("zqrt " * 12, "at most"),
    ],
)
def test_unusable_tokens_get_one_line(tokenizer: Any, text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        check_rare_tokens(ClipVocabulary(tokenizer), text)
    assert "\n" not in str(caught.value)
