"""Renders a choice whose text is split into reasoning, content and calls, on top of the plain renderers.

Owns: when a choice ends because of its calls, and how many of its tokens are reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec

from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.source import MAX_CALLS, Part
from toka_engine.server.render import Renderer, ShownToken
from toka_engine.server.splitting import Splitter
from toka_engine.server.streams import Choice


class Splitting(msgspec.Struct, frozen=True):
    """The way in which the choices of a request are split."""

    calls: CallReader | None = None
    max_calls: int = MAX_CALLS
    has_reasoning: bool = False
    begins_in_reasoning: bool = False
    call_reason: str = "tool_calls"
    """The finish reason of a choice that ends with calls."""

    def splitter(self) -> Splitter:
        return Splitter(
            self.calls,
            has_reasoning=self.has_reasoning,
            begins_in_reasoning=self.begins_in_reasoning,
            max_calls=self.max_calls,
        )


class SplitRenderer(Renderer):
    """Renders one choice through `inner` and splits what that shows."""

    __slots__ = ("_inner", "_lengths", "_parts", "_splits", "_splitter", "has_parts")

    def __init__(self, inner: Renderer, splits: Splitting, bytes_of: Sequence[bytes]) -> None:
        super().__init__(bytes_of)
        self._inner = inner
        self._splits = splits
        self._splitter = splits.splitter()
        self._parts: list[Part] = []
        self._lengths: list[int] = []
        """The bytes of each token, kept where reasoning may have to be counted."""
        self.has_parts = False
        """The choice has any part at all."""

    def advance(self, choice: Choice) -> str:
        """Take what has come for `choice`; return its text, whose parts `take_parts` has."""
        if self.finish_reason is not None:
            return ""
        if self._splits.has_reasoning:
            self._lengths += [len(self._bytes_of[token]) for token in choice.tokens]
        text = self._inner.advance(choice)
        self._parts += self._splitter.feed(text)
        if self._inner.finish_reason is not None:
            self._end(choice, self._inner.finish_reason)
        elif self._splitter.is_complete:
            self.num_tokens = choice.num_taken
            choice.generation.cut(choice)
            self.finish_reason = self._splits.call_reason
        return text

    def _end(self, choice: Choice, reason: str) -> None:
        if self._splits.has_reasoning and choice.whole_tokens is not None:
            self._lengths = [len(self._bytes_of[token]) for token in choice.whole_tokens.tolist()]
        self._parts += self._splitter.finish()
        self.num_tokens = self._inner.num_tokens
        has_all_calls = self._splitter.num_calls > 0 and reason != "length"
        self.finish_reason = self._splits.call_reason if has_all_calls or self._splitter.is_complete else reason

    def take_shown(self) -> list[ShownToken]:
        return self._inner.take_shown()

    def take_parts(self) -> list[Part]:
        """Return the parts that the last `advance` has added."""
        parts, self._parts = self._parts, []
        self.has_parts = self.has_parts or bool(parts)
        return parts

    @property
    def cut_text(self) -> str:
        return self._inner.cut_text

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Return how many of the completion tokens are reasoning, its tags included. Valid at the end."""
        if not self._splits.has_reasoning:
            return None
        wanted = self._splitter.num_reasoning_bytes
        if not wanted:
            return 0
        ends = accumulate(self._lengths)
        return next((index for index, end in enumerate(ends, start=1) if end >= wanted), len(self._lengths))


class SplitRenderers:
    """The renderers of one request, in the order of its choices, for the format that writes their parts."""

    def __init__(self, splits: Splitting, new_inner: Callable[[], Renderer], bytes_of: Sequence[bytes]) -> None:
        self.all: list[SplitRenderer] = []
        self._splits = splits
        self._new_inner = new_inner
        self._bytes_of = bytes_of

    def add(self) -> SplitRenderer:
        """Make the renderer of the next choice."""
        self.all.append(SplitRenderer(self._new_inner(), self._splits, self._bytes_of))
        return self.all[-1]


class Assembled(NamedTuple):
    """A whole answer put together from its parts; calls as names and arguments."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]


def assemble(parts: Sequence[Part]) -> Assembled:
    """Return the answer that streamed `parts` add up to."""
    texts: dict[str, list[str]] = {"reasoning": [], "content": []}
    names: list[str] = []
    arguments: list[list[str]] = []
    for part in parts:
        if part.kind == "call":
            names.append(part.text)
            arguments.append([])
        elif part.kind == "arguments":
            arguments[part.call].append(part.text)
        else:
            texts[part.kind].append(part.text)
    calls = [(name, "".join(pieces)) for name, pieces in zip(names, arguments, strict=True)]
    return Assembled("".join(texts["reasoning"]), "".join(texts["content"]), calls)
