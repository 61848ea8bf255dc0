"""A tokenizer -> rare tokens: short words a base has no strong association with (UniTune, arXiv 2210.09477).

A CLIP tokenizer numbers its tokens in the order its merges were learned, from frequent to rare, and a token
that training hardly ever met keeps an embedding close to where it started, which is short.
The first ranks tokens, the second says which of them training met.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from lora_unitune.errors import PromptError

_WHOLE_WORD = re.compile(r"([a-z]{3,5})</w>")
_VOWELS = frozenset("aeiouy")


def rank_rare_tokens(tokenizer: Any, embeddings: Tensor | None = None, limit: int = 50) -> list[str]:
    """Lists a tokenizer's rare tokens, the rarest first.

    Kept are whole words of 3 to 5 lowercase letters that are one token and come back unchanged from encoding
    and decoding. With embeddings, the longer half of them is left out: those are words that training met. Of
    the rest, late vocabulary positions go first, and strings that can't be spoken get a start over those that
    look like words.

    Args:
        tokenizer: a CLIP tokenizer.
        embeddings: (vocabulary, width), the text encoder's token embeddings; None ranks by position alone.
        limit: how many to return at most.

    Returns:
        The tokens as plain words.
    """
    candidates = [
        (index, match.group(1))
        for token, index in tokenizer.get_vocab().items()
        if (match := _WHOLE_WORD.fullmatch(token))
    ]
    candidates.sort(reverse=True)
    if embeddings is not None:
        norms = embeddings.detach().float().norm(dim=1).tolist()
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
        if _encode(tokenizer, word) == [index] and tokenizer.decode([index]).strip() == word:
            ranked.append(word)
    return ranked


def find_rare_tokens(tokenizer: Any, embeddings: Tensor | None = None, count: int = 2) -> str:
    """Chooses rare tokens to stand for a photo.

    Args:
        tokenizer: a CLIP tokenizer.
        embeddings: (vocabulary, width), the text encoder's token embeddings, or None.
        count: how many tokens.

    Returns:
        The tokens, joined by spaces.

    Raises:
        PromptError: the tokenizer hasn't that many.
    """
    found = rank_rare_tokens(tokenizer, embeddings, limit=count)
    if len(found) < count:
        raise PromptError(
            f"{count} rare tokens are asked for and the base's tokenizer has {len(found)}; lower "
            "prompt.rare_token_count or choose your own with prompt.rare_tokens"
        )
    return " ".join(found)


def check_rare_tokens(tokenizer: Any, text: str) -> str:
    """Checks rare tokens that a person chose.

    Args:
        tokenizer: a CLIP tokenizer.
        text: one or more words; each may be several tokens.

    Returns:
        The text with single spaces between its words.

    Raises:
        PromptError: there is no word, the tokenizer changes it, or it leaves no room for a prompt.
    """
    words = text.split()
    if not words:
        raise PromptError(
            "the rare tokens are empty; give a word or two such as 'sks', or leave prompt.rare_tokens unset"
        )
    special = {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    for word in words:
        ids = _encode(tokenizer, word)
        if not ids or special & set(ids) or tokenizer.decode(ids).strip() != word:
            raise PromptError(
                f"the rare token {word!r} doesn't survive the base's tokenizer; choose lowercase letters"
            )
    cleaned = " ".join(words)
    used, room = len(_encode(tokenizer, cleaned)), tokenizer.model_max_length - 2
    if used > room // 2:
        raise PromptError(
            f"the rare tokens {cleaned!r} take {used} of the {room} tokens of a prompt; "
            f"at most {room // 2} may, so choose fewer or shorter ones"
        )
    return cleaned


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Returns a text's token ids, without the ones for start and end."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _looks_like_a_word(text: str) -> bool:
    """Says whether letters could be spoken: with a vowel, and nowhere three consonants in a row."""
    shape = "".join("v" if letter in _VOWELS else "c" for letter in text)
    return "v" in shape and "ccc" not in shape
