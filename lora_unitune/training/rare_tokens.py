"""Rare tokens: short words that a base has no strong association with (UniTune, arXiv 2210.09477).

A BPE tokenizer numbers its tokens in the order of its merges, from frequent to rare, which ranks them. A token
that hardly occurred in training keeps an embedding of small norm, close to its initialization, which identifies
the untrained ones.
"""

from __future__ import annotations

import re

from lora_unitune.errors import PromptError
from lora_unitune.families import Vocabulary

_SHORT_WORD = re.compile(r"[a-z]{3,5}")
_VOWELS = frozenset("aeiouy")


def rank_rare_tokens(vocabulary: Vocabulary, limit: int = 50) -> list[str]:
    """Returns a vocabulary's rare tokens, the rarest first.

    Candidates are words of 3 to 5 lowercase letters that are a single token and survive encoding and decoding.
    If there are embeddings, the half with larger norms is excluded, as trained. The rest is ranked by vocabulary
    position, last first, with unpronounceable strings moved ahead of word-like ones.

    Args:
        vocabulary: The base's vocabulary.
        limit: Maximum number of tokens.

    Returns:
        The tokens as plain words.
    """
    candidates = [(index, word) for word, index in vocabulary.words().items() if _SHORT_WORD.fullmatch(word)]
    candidates.sort(reverse=True)
    norms = vocabulary.norms()
    if norms is not None:
        middle = sorted(norms[index] for index, _ in candidates)[len(candidates) // 2] if candidates else 0.0
        candidates = [candidate for candidate in candidates if norms[candidate[0]] <= middle]
    position = {word: rank for rank, (_, word) in enumerate(candidates)}

    def rarity(candidate: tuple[int, str]) -> int:
        _, word = candidate
        return position[word] + (len(candidates) // 4 if _looks_like_a_word(word) else 0)

    ranked: list[str] = []
    for index, word in sorted(candidates, key=rarity):
        if len(ranked) == limit:
            break
        if vocabulary.encode(word) == [index] and vocabulary.decode([index]) == word:
            ranked.append(word)
    return ranked


def find_rare_tokens(vocabulary: Vocabulary, count: int = 2) -> str:
    """Chooses rare tokens to stand for a photo.

    Args:
        vocabulary: The base's vocabulary.
        count: Number of tokens.

    Returns:
        The tokens, joined by spaces.

    Raises:
        PromptError: The vocabulary has fewer rare tokens.
    """
    tokens = rank_rare_tokens(vocabulary, limit=count)
    if len(tokens) < count:
        raise PromptError(
            f"{count} rare tokens are asked for and the base's tokenizer has {len(tokens)}; lower "
            "prompt.rare_token_count or choose your own with prompt.rare_tokens"
        )
    return " ".join(tokens)


def check_rare_tokens(vocabulary: Vocabulary, text: str) -> str:
    """Checks rare tokens chosen by the user.

    Args:
        vocabulary: The base's vocabulary.
        text: One or more words; each may be several tokens.

    Returns:
        The text with single spaces between its words.

    Raises:
        PromptError: There is no word, the tokenizer changes one, or they leave too few tokens for a prompt.
    """
    words = text.split()
    if not words:
        raise PromptError(
            "the rare tokens are empty; give a word or two such as 'sks', or leave prompt.rare_tokens unset"
        )
    special = vocabulary.special()
    for word in words:
        ids = vocabulary.encode(word)
        if not ids or special & set(ids) or vocabulary.decode(ids) != word:
            raise PromptError(
                f"the rare token {word!r} doesn't survive the base's tokenizer; choose lowercase letters"
            )
    cleaned = " ".join(words)
    used, length = len(vocabulary.encode(cleaned)), vocabulary.prompt_length
    if used > length // 2:
        raise PromptError(
            f"the rare tokens {cleaned!r} take {used} of the {length} tokens of a prompt; "
            f"at most {length // 2} may, so choose fewer or shorter ones"
        )
    return cleaned


def _looks_like_a_word(text: str) -> bool:
    """Returns whether a string is pronounceable: it has a vowel, and no three consonants in a row."""
    shape = "".join("v" if letter in _VOWELS else "c" for letter in text)
    return "v" in shape and "ccc" not in shape
