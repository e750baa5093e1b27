"""Logprobs of prompts in answers, and what else is done to choices that have their logprobs: shifting, choosing.

Owns: the two forms that logprobs of a prompt have: as the first tokens of a choice with `echo`, and vLLM's
`prompt_logprobs`. Pure.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from toka_engine.messages import Int32s, PromptLogprobs
from toka_engine.server.answers import FinishedChoice, PromptByToken, PromptTokenLogprob, plain_logprob
from toka_engine.server.render import ShownToken
from toka_engine.server.streams import Generation, TopTokens


class PromptScores:
    """The logprobs of one prompt, put together from what has come."""

    def __init__(self, prompt: Int32s, found: Sequence[PromptLogprobs], num_top: int) -> None:
        """Keep the `num_top` likeliest tokens of each position."""
        self._prompt = prompt
        self._logprobs = np.full(prompt.size, np.nan, np.float32)
        self._ranks = np.zeros(prompt.size, np.int32)
        self._top_tokens = np.full((prompt.size, num_top), -1, np.int32)
        self._top_logprobs = np.full((prompt.size, num_top), np.nan, np.float32)
        for each in found:
            span, shape = slice(each.start, each.start + each.logprobs.size), (each.logprobs.size, each.top_width)
            self._logprobs[span], self._ranks[span] = each.logprobs, each.ranks
            if num_top:
                self._top_tokens[span] = each.top_tokens.reshape(shape)[:, :num_top]
                self._top_logprobs[span] = each.top_logprobs.reshape(shape)[:, :num_top]

    def list_shown(self, bytes_of: Sequence[bytes]) -> list[ShownToken]:
        """Return the prompt's tokens as a choice with `echo` shows them; the first one has no logprob."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        shown, end = [], 0
        rows = zip(self._prompt.tolist(), self._logprobs.tolist(), self._list_tops(), strict=True)
        for token, logprob, top in rows:
            begin, end = end, end + len(decode(bytes_of[token]))
            shown.append(ShownToken(token, logprob, top, begin, end, is_prompt=True))
        return shown

    def list_by_token(self, label_of: Callable[[int], bytes]) -> PromptByToken:
        """Return vLLM's form: at each position but the first the prompt's token and the likeliest ones, by id."""
        found: PromptByToken = []
        rows = zip(self._prompt.tolist(), self._logprobs.tolist(), self._ranks.tolist(), self._list_tops(), strict=True)
        for token, logprob, rank, top in rows:
            ranked = [(token, logprob, rank), *((each, value, place + 1) for place, (each, value) in enumerate(top))]
            entries = {
                str(each): PromptTokenLogprob(plain_logprob(value), at, label_of(each).decode("utf-8", "replace"))
                for each, value, at in ranked
            }
            found.append(entries if found else None)
        return found

    def _list_tops(self) -> list[TopTokens]:
        return [
            [(token, logprob) for token, logprob in zip(*row, strict=True) if token >= 0]
            for row in zip(self._top_tokens.tolist(), self._top_logprobs.tolist(), strict=True)
        ]


class PromptLogprobForms(msgspec.Struct, frozen=True):
    """The forms in which a request asks for the logprobs of its prompts; -1: not at all."""

    bytes_of: Sequence[bytes]
    label_of: Callable[[int], bytes]
    echo_top: int
    listed_top: int

    def list_echoed(self, generation: Generation, prompt: int) -> list[ShownToken]:
        """Return the tokens of a prompt with which its choices begin; none if they do not."""
        if self.echo_top < 0:
            return []
        return self._put_together(generation, prompt, self.echo_top).list_shown(self.bytes_of)

    def list_by_token(self, generation: Generation, prompt: int) -> PromptByToken | UnsetType:
        if self.listed_top < 0:
            return UNSET
        return self._put_together(generation, prompt, self.listed_top).list_by_token(self.label_of)

    @staticmethod
    def _put_together(generation: Generation, prompt: int, num_top: int) -> PromptScores:
        return PromptScores(generation.prompts[prompt], generation.prompt_logprobs[prompt], num_top)


NO_PROMPT_LOGPROBS = PromptLogprobForms((), lambda _: b"", -1, -1)


def move_shown(shown: list[ShownToken], offset: int) -> list[ShownToken]:
    """Return `shown` of a text that stands `offset` characters behind its choice's begin."""
    return [token._replace(begin=token.begin + offset, end=token.end + offset) for token in shown] if offset else shown


def batched(choices: Sequence[FinishedChoice], size: int) -> list[Sequence[FinishedChoice]]:
    """Return the choices prompt by prompt, of which each has `size`."""
    return [choices[begin : begin + size] for begin in range(0, len(choices), size)]


def choose_best(choices: Sequence[FinishedChoice], num_sampled: int, num_returned: int) -> list[FinishedChoice]:
    """Return, of each prompt's `num_sampled` choices, the `num_returned` of the highest mean logprob, best first.

    All are returned, in their order, where as many were sampled.
    """
    if not num_returned or num_returned == num_sampled:
        return list(choices)
    chosen = []
    for group in batched(choices, num_sampled):
        chosen += sorted(group, key=_mean_logprob, reverse=True)[:num_returned]
    return chosen


def _mean_logprob(choice: FinishedChoice) -> float:
    logprobs = [token.logprob for token in choice.shown if not math.isnan(token.logprob)]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
