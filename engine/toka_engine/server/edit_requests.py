"""Makes the edits of logits, and what else a request says token by token of its end, from the request's fields.

Owns: `logit_bias`, `allowed_token_ids`, `bad_words`, `min_tokens`, `stop_token_ids`: their ranges, and what they mean
together. Each refusal is a 400 that names the field. Pure: no I/O, no state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from toka_engine.messages import LogitEdits, WordList
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.request import MAX_BIAS, MAX_EDITED_TOKENS, MAX_WORD_CHARACTERS, GenerationRequest

EncodeWord: TypeAlias = Callable[[str], Sequence[int]]
"""Gives the token ids of a text as it stands within another text."""

Tokens: TypeAlias = tuple[int, ...]

_BARRED = float("-inf")


class TokenRules(msgspec.Struct, frozen=True):
    """The checked fields."""

    bias: dict[int, float]
    """By token id; minus infinity: never sampled."""
    allowed_ids: tuple[int, ...]
    """No other token is sampled; empty: all may be."""
    min_tokens: int
    stop_ids: tuple[int, ...]
    words: tuple[Tokens, ...] = ()
    """The last token of each, of which all have two or more, is never sampled behind the others."""

    def make_edits(self, stop_ids: Sequence[int]) -> LogitEdits | None:
        """Return the edits for a stream that ends at `stop_ids`; None if there are none. Raises a 400 where they leave
        no token.
        """
        end_ids = tuple(stop_ids) if self.min_tokens else ()
        if not (self.bias or self.allowed_ids or end_ids or self.words):
            return None
        barred = {token for token, value in self.bias.items() if value == _BARRED}.union(end_ids)
        if self.allowed_ids and barred.issuperset(self.allowed_ids):
            raise invalid(
                "allowed_token_ids", "'allowed_token_ids' has no token that 'bad_words' and 'min_tokens' leave."
            )
        return LogitEdits(
            bias_ids=np.array(list(self.bias), np.int32),
            bias_values=np.array(list(self.bias.values()), np.float32),
            allowed_ids=np.array(self.allowed_ids, np.int32),
            end_ids=np.array(end_ids, np.int32),
            min_tokens=self.min_tokens if end_ids else 0,
            words=WordList(
                ids=np.array([word[-1] for word in self.words], np.int32),
                lengths=np.array([len(word) - 1 for word in self.words], np.int32),
                tokens=np.array([token for word in self.words for token in word[:-1]], np.int32),
            ),
        )


NO_RULES = TokenRules({}, (), 0, ())


def check_token_rules(request: GenerationRequest, vocab_size: int, encode_word: EncodeWord) -> TokenRules:
    """Check the fields. Raises a 400 that names the one that is wrong."""
    given = request.logit_bias or request.allowed_token_ids or request.bad_words or request.min_tokens
    if not given and not request.stop_token_ids and request.allowed_token_ids is None:
        return NO_RULES
    if request.allowed_token_ids == []:
        raise invalid("allowed_token_ids", "'allowed_token_ids' is empty: no token is left.", "invalid_value")
    bias = _check_bias(request.logit_bias or {}, vocab_size)
    barred, words = _find_barred(request.bad_words or [], encode_word)
    bias |= dict.fromkeys(barred, _BARRED)
    return TokenRules(
        bias=bias,
        allowed_ids=_check_ids("allowed_token_ids", request.allowed_token_ids or [], vocab_size),
        min_tokens=request.min_tokens or 0,
        stop_ids=_check_ids("stop_token_ids", request.stop_token_ids or [], vocab_size),
        words=words,
    )


def _check_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    if len(given) > MAX_EDITED_TOKENS:
        raise _too_many("logit_bias", len(given))
    bias: dict[int, float] = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) < vocab_size):
            shown = name if len(name) <= 20 else f"{name[:20]}..."
            raise invalid("logit_bias", f"'logit_bias' has the token id '{shown}'; valid are 0 to {vocab_size - 1}.")
        if not -MAX_BIAS <= value <= MAX_BIAS:
            message = f"'logit_bias' of token {name} must be from {-MAX_BIAS:g} to {MAX_BIAS:g}."
            raise invalid("logit_bias", message, "invalid_value")
        bias[int(name)] = value
    return bias


def _check_ids(field: str, given: list[int], vocab_size: int) -> tuple[int, ...]:
    if len(given) > MAX_EDITED_TOKENS:
        raise _too_many(field, len(given))
    for token in given:
        if not 0 <= token < vocab_size:
            raise invalid(field, f"'{field}' has token id {token}; valid are 0 to {vocab_size - 1}.", "invalid_value")
    return tuple(dict.fromkeys(given))


def _find_barred(words: list[str], encode_word: EncodeWord) -> tuple[list[int], tuple[Tokens, ...]]:
    """Return the tokens that are words by themselves, and the words of several tokens; of each word as it stands, and
    with a space before it.
    """
    if len(words) > MAX_EDITED_TOKENS:
        raise _too_many("bad_words", len(words))
    if sum(map(len, words)) > MAX_WORD_CHARACTERS:
        message = f"'bad_words' has more than {MAX_WORD_CHARACTERS} characters."
        raise invalid("bad_words", message, "invalid_value")
    found: dict[Tokens, None] = {}
    for index, word in enumerate(words):
        if not word:
            raise invalid("bad_words", f"'bad_words[{index}]' is empty.", "invalid_value")
        plain, spaced = (tuple(encode_word(text)) for text in (word, f" {word}"))
        if not plain:
            raise invalid("bad_words", f"'bad_words[{index}]' has no tokens.", "invalid_value")
        found[plain] = None
        if spaced[-len(plain) :] != plain:  # else it is barred with the other
            found[spaced] = None
    return [ids[0] for ids in found if len(ids) == 1], tuple(ids for ids in found if len(ids) > 1)


def _too_many(field: str, count: int) -> ApiError:
    return invalid(field, f"'{field}' has {count} entries; at most {MAX_EDITED_TOKENS} are allowed.", "invalid_value")
