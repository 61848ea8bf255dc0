"""A vocabulary -> rare tokens: short words a base has no strong association with (UniTune, arXiv 2210.09477).

A tokenizer of byte pairs numbers its tokens in the order its merges were learned, from frequent to rare, and a token
that training hardly ever met keeps an embedding close to where it started, which is short.
The first ranks tokens, the second says which of them training met.
"""

from __future__ import annotations

import re

from lora_unitune.errors import PromptError
from lora_unitune.families import Vocabulary

_SHORT_WORD = re.compile(r"[a-z]{3,5}")
_VOWELS = frozenset("aeiouy")


def rank_rare_tokens(vocabulary: Vocabulary, limit: int = 50) -> list[str]:
    """Lists a vocabulary's rare tokens, the rarest first.

    Kept are words of 3 to 5 lowercase letters that are one token and come back unchanged from encoding and
    decoding. Where there are embeddings, the longer half of them is left out: those are words that training
    met. Of the rest, late vocabulary positions go first, and strings that can't be spoken get a start over
    those that look like words.

    Args:
        vocabulary: The base's.
        limit: How many to return at most.

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
        vocabulary: The base's.
        count: How many tokens.

    Returns:
        The tokens, joined by spaces.

    Raises:
        PromptError: The vocabulary hasn't that many.
    """
    found = rank_rare_tokens(vocabulary, limit=count)
    if len(found) < count:
        raise PromptError(
            f"{count} rare tokens are asked for and the base's tokenizer has {len(found)}; lower "
            "prompt.rare_token_count or choose your own with prompt.rare_tokens"
        )
    return " ".join(found)


def check_rare_tokens(vocabulary: Vocabulary, text: str) -> str:
    """Checks rare tokens that a person chose.

    Args:
        vocabulary: The base's.
        text: One or more words; each may be several tokens.

    Returns:
        The text with single spaces between its words.

    Raises:
        PromptError: There is no word, the tokenizer changes it, or it leaves too few tokens for a prompt.
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
    """Says whether letters could be spoken: with a vowel, and nowhere three consonants in a row."""
    shape = "".join("v" if letter in _VOWELS else "c" for letter in text)
    return "v" in shape and "ccc" not in shape
