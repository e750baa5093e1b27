"""Detokenizes a choice incrementally: UTF-8 is never split, stop strings are held back and cut.

Owns: how much of a choice may be shown. A token's logprobs are released with the text that it completes. At a stop
string the text ends before the match; the tokens shown are those with text before the match; usage counts the tokens up
to the one that completed the match, and none that were generated beyond it.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from toka_engine.messages import FINISH_LENGTH, FINISH_STOP
from toka_engine.server.stops import StopStrings
from toka_engine.server.streams import Choice, TopTokens

_new_decoder = codecs.getincrementaldecoder("utf-8")


class ShownToken(NamedTuple):
    """One output token with its logprobs. `begin`, `end`: its characters in the choice's text, before any
    cut.
    """

    token: int
    logprob: float
    top: TopTokens
    begin: int
    end: int
    is_prompt: bool = False
    """It is shown with `echo`, before the choice's own."""


class Renderer:
    """Renders one choice without stop strings and logprobs: a character is shown when it is complete."""

    __slots__ = ("_bytes_of", "_decode", "finish_reason", "num_tokens")

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        self._bytes_of = bytes_of
        self._decode = _new_decoder("replace").decode
        self.finish_reason: str | None = None
        """The finish reason as the API writes it; None while the choice runs."""
        self.num_tokens = 0
        """The completion tokens that usage counts; valid at the end."""

    def advance(self, choice: Choice) -> str:
        """Take what has come for `choice`; return the text to show now."""
        tokens = choice.tokens
        if len(tokens) == 1:
            text = self._decode(self._bytes_of[tokens[0]])
        else:
            text = self._decode(b"".join(map(self._bytes_of.__getitem__, tokens)))
        choice.num_taken += len(tokens)
        choice.tokens = []
        if choice.finish_reason is not None:
            if choice.whole_tokens is not None:
                text = self._decode(b"".join(map(self._bytes_of.__getitem__, choice.whole_tokens.tolist())))
            text += self._decode(b"", True)
            self.finish_reason = finish_reason_name(choice.finish_reason)
            self.num_tokens = choice.num_tokens
        return text

    def take_shown(self) -> list[ShownToken]:
        """Return the tokens released by the last `advance`; empty without logprobs."""
        return []

    @property
    def cut_text(self) -> str:
        """Return the text from the stop string on at which the choice was cut; "" where it was not."""
        return ""

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Return how many of the completion tokens are reasoning; None where the model has none. Valid at the end."""
        return None


class EmptyRenderer(Renderer):
    """Renders a choice of no token, for which one was sampled because nothing else ends a prompt."""

    def advance(self, choice: Choice) -> str:
        super().advance(choice)
        self.num_tokens = 0
        if self.finish_reason is not None:
            self.finish_reason = finish_reason_name(FINISH_LENGTH)
        return ""


class TrackingRenderer(Renderer):
    """Renders one choice with stop strings, logprobs or both."""

    __slots__ = (
        "_held",
        "_keeps_stop",
        "_keeps_tokens",
        "_min_tokens",
        "_num_decoded",
        "_num_shown",
        "_released",
        "_scanner",
        "_waiting",
    )

    def __init__(
        self,
        bytes_of: Sequence[bytes],
        stops: StopStrings | None,
        *,
        keeps_tokens: bool,
        keeps_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`keeps_stop`: the text ends behind a stop string; `min_tokens`: in the first so many none counts."""
        super().__init__(bytes_of)
        self._scanner = stops.scanner() if stops else None
        self._keeps_stop, self._min_tokens = keeps_stop, min_tokens
        self._keeps_tokens = keeps_tokens
        self._num_decoded = 0
        self._num_shown = 0
        self._held = ""
        self._waiting: deque[ShownToken] = deque()
        self._released: list[ShownToken] = []

    def advance(self, choice: Choice) -> str:
        """Take what has come for `choice`; return the text to show now. Cuts the stream at a stop string."""
        if self.finish_reason is not None:
            return ""
        tokens, choice.tokens = choice.tokens, []
        if choice.whole_tokens is not None:
            tokens = choice.whole_tokens.tolist()
        choice.num_taken += len(tokens)
        logprobs, choice.logprobs = choice.logprobs, []
        tops, choice.tops = choice.tops, {}
        for row, token in enumerate(tokens):
            self.num_tokens += 1
            begin = self._num_decoded
            match = self._take(self._decode(self._bytes_of[token]))
            if self._keeps_tokens:
                end = self._num_decoded + (1 if self._is_within_character() else 0)
                logprob = logprobs[row] if logprobs else float("nan")
                self._waiting.append(ShownToken(token, logprob, tops.get(row, []), begin, end))
            if match is not None:
                return self._cut(choice, match)
        if choice.finish_reason is not None:
            return self._end(choice)
        return self._show(self._num_decoded - (self._scanner.num_held if self._scanner else 0))

    def take_shown(self) -> list[ShownToken]:
        released, self._released = self._released, []
        return released

    @property
    def cut_text(self) -> str:
        return self._held if self.finish_reason is not None else ""

    def _take(self, text: str) -> int | None:
        """Append decoded text; return where the text ends, if it completes a stop string."""
        self._held += text
        self._num_decoded += len(text)
        if self._scanner is None or not text:
            return None
        if self.num_tokens <= self._min_tokens:
            self._scanner.skip(len(text))
            return None
        match = self._scanner.feed(text)
        return None if match is None else match[self._keeps_stop]

    def _is_within_character(self) -> bool:
        return bool(self._decode.__self__.getstate()[0])  # type: ignore[attr-defined]

    def _show(self, position: int) -> str:
        """Show the text up to `position` and release the tokens that it completes."""
        while self._waiting and self._waiting[0].end <= position:
            self._released.append(self._waiting.popleft())
        count = position - self._num_shown
        text, self._held = self._held[:count], self._held[count:]
        self._num_shown = position
        return text

    def _cut(self, choice: Choice, position: int) -> str:
        choice.generation.cut(choice)
        self.finish_reason = finish_reason_name(FINISH_STOP)
        text = self._show(position)
        self._released.extend(token for token in self._waiting if token.begin < position)
        self._waiting.clear()
        return text

    def _end(self, choice: Choice) -> str:
        match = self._take(self._decode(b"", True))
        if match is not None:
            return self._cut(choice, match)
        text = self._show(self._num_decoded)
        self._released.extend(self._waiting)
        self._waiting.clear()
        self.finish_reason = finish_reason_name(choice.finish_reason)
        self.num_tokens = choice.num_tokens
        return text


def finish_reason_name(reason: int | None) -> str:
    """Return FINISH_* as the API writes it."""
    return "stop" if reason == FINISH_STOP else "length"
