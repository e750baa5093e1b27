"""Text that arrives in pieces, and the parts that are read from it.

Owns: what every reader of a format shares. A reader is a generator that yields where it needs more text, so that it
reads as straight code and keeps its place. It decides only what no later text can change: the same text gives the same
parts, however it was cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Literal, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""A reader's course: it yields for more text, and returns a `T`."""
Kind: TypeAlias = Literal["reasoning", "content", "call", "arguments"]
MAX_HELD = 64 * 1024
"""The most characters that are held back until it is clear whether they are a call; longer ones are content."""
MAX_CALLS = 128
MAX_NAME = 64


class Part(NamedTuple):
    """A piece of an answer. `text` of a call is its function's name; `call` is the number of the call."""

    kind: Kind
    text: str
    call: int = 0


class Source:
    """The text that has come and is not read yet."""

    __slots__ = ("is_ended", "text")

    def __init__(self) -> None:
        self.text = ""
        self.is_ended = False

    def take(self, count: int) -> str:
        """Remove and return the first `count` characters."""
        taken, self.text = self.text[:count], self.text[count:]
        return taken

    def skip_blanks(self) -> Steps[None]:
        """Drop white space up to the first other character, or to the end."""
        while True:
            self.text = self.text.lstrip()
            if self.text or self.is_ended:
                return
            yield

    def match(self, pattern: re.Pattern[str], could_be: re.Pattern[str]) -> Steps[re.Match[str] | None]:
        """Return the match at the beginning; None where none can come. `could_be` matches all that may become one, and
        must match to the end.
        """
        while True:
            if found := pattern.match(self.text):
                return found
            if self.is_ended or len(self.text) > MAX_HELD or not could_be.fullmatch(self.text):
                return None
            yield


class Parts:
    """The parts read so far. Once `is_complete`, no further ones are taken."""

    __slots__ = ("_max_calls", "_news", "follows_call", "is_complete", "num_calls")

    def __init__(self, max_calls: int = MAX_CALLS) -> None:
        self._max_calls = max_calls
        self._news: list[Part] = []
        self.num_calls = 0
        self.is_complete = False
        """The answer has all the calls that it may have: what follows is not wanted."""
        self.follows_call = False
        """The last part belonged to a call."""

    def reasoning(self, text: str) -> None:
        self._add("reasoning", text)

    def content(self, text: str) -> None:
        if text:
            self.follows_call = False
        self._add("content", text)

    def call(self, name: str) -> None:
        """Begin a call of function `name`."""
        self.num_calls += not self.is_complete
        self._add("call", name)

    def arguments(self, text: str) -> None:
        self._add("arguments", text)

    def end_call(self) -> None:
        self.follows_call = True
        self.is_complete = self.num_calls >= self._max_calls

    def take(self) -> list[Part]:
        news, self._news = self._news, []
        return news

    def _add(self, kind: Kind, text: str) -> None:
        if not text or self.is_complete:
            return
        news = self._news
        if news and kind != "call" and news[-1].kind == kind:
            news[-1] = Part(kind, news[-1].text + text, news[-1].call)
        else:
            news.append(Part(kind, text, max(0, self.num_calls - 1)))


class Marks:
    """Finds the first of some fixed texts."""

    __slots__ = ("_beginnings", "_firsts", "_longest", "_pattern")

    def __init__(self, marks: tuple[str, ...]) -> None:
        ordered = sorted(set(marks), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._beginnings = frozenset(mark[:length] for mark in ordered for length in range(1, len(mark)))
        self._firsts = frozenset(mark[0] for mark in ordered)
        self._longest = max(map(len, ordered), default=1)

    def search(self, text: str) -> re.Match[str] | None:
        return self._pattern.search(text)

    def num_held(self, text: str) -> int:
        """Return how many of the last characters may begin a mark."""
        if self._firsts.isdisjoint(text[1 - self._longest :]):
            return 0
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
