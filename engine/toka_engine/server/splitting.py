"""Splits one choice's text, while it comes, into reasoning, content, and calls of functions.

Owns: the order of the parts of an answer, and what is held back: no more than could begin a tag or a call. White space
around reasoning and before calls belongs to neither. Text that turns out to be no call is content.
"""

from __future__ import annotations

from toka_engine.server.calls.formats import CallReader
from toka_engine.server.calls.source import MAX_CALLS, MAX_NAME, Marks, Part, Parts, Source, Steps

_MAX_CUT_MARKUP = 3 * MAX_NAME
"""The longest text, in characters, that stands between two calls, or in a call before its name ends."""
REASONING_BEGIN = "<think>"
REASONING_END = "</think>"
_REASONING_ENDS = Marks((REASONING_END,))


class Splitter:
    """Splits one text. What it returns does not depend on the pieces in which the text comes."""

    def __init__(
        self,
        calls: CallReader | None = None,
        *,
        has_reasoning: bool = False,
        begins_in_reasoning: bool = False,
        max_calls: int = MAX_CALLS,
    ) -> None:
        """`calls` None: there are no calls. `has_reasoning`: the text may begin with reasoning between tags;
        `begins_in_reasoning`: its opening tag stands in the prompt.
        """
        self._calls = calls
        self._has_reasoning = has_reasoning
        self._begins_in_reasoning = begins_in_reasoning
        self._source = Source()
        self._parts = Parts(max_calls)
        self._marks = Marks((*calls.marks, *calls.hidden)) if calls else Marks(())
        self._is_before_content = has_reasoning
        self._num_bytes = 0
        self.num_reasoning_bytes = 0
        """The bytes of text up to the end of the reasoning, its closing tag included; valid once that has come."""
        self._steps = self._run()
        self._is_over = False
        self._advance()

    @property
    def is_complete(self) -> bool:
        """Return whether all that the answer may have is there, so that no more text is wanted."""
        return self._parts.is_complete

    @property
    def num_calls(self) -> int:
        return self._parts.num_calls

    def feed(self, text: str) -> list[Part]:
        """Take the next piece; return what can be shown now."""
        self._source.text += text
        if self._is_before_content:
            self._num_bytes += len(text.encode())
        self._advance()
        return self._parts.take()

    def finish(self) -> list[Part]:
        """Return what is left, now that no more text comes."""
        self._source.is_ended = True
        self._advance()
        return self._parts.take()

    def _advance(self) -> None:
        if not self._is_over:
            try:
                next(self._steps)
            except StopIteration:
                self._is_over = True

    def _run(self) -> Steps[None]:
        if self._has_reasoning:
            yield from self._read_reasoning()
            self._is_before_content = False
        calls = self._calls
        if calls is None:
            yield from self._read_plain()
            return
        if calls.is_at_beginning:
            yield from calls.read(self._source, self._parts, "")
        while not self._parts.is_complete:
            blanks, mark = yield from self._read_content()
            if not mark:
                return
            if mark in calls.marks and (yield from calls.read(self._source, self._parts, mark)):
                continue
            if self._is_cut_markup():
                return
            self._parts.content(blanks if mark in calls.hidden else blanks + mark)

    def _is_cut_markup(self) -> bool:
        """Whether what is left belongs to calls: it stands behind one, and has been held to the end because it may be
        the rest of that one or the beginning of another.
        """
        source = self._source
        return source.is_ended and self._parts.follows_call and len(source.text) <= _MAX_CUT_MARKUP

    def _read_plain(self) -> Steps[None]:
        source = self._source
        while True:
            self._parts.content(source.take(len(source.text)))
            if source.is_ended:
                return
            yield

    def _read_content(self) -> Steps[tuple[str, str]]:
        """Hand on content up to the first mark; return the white space before the mark, and the mark ("": the end)."""
        source, parts = self._source, self._parts
        while True:
            found = self._marks.search(source.text)
            if found is None and source.is_ended:
                if not self._is_cut_markup():
                    parts.content(source.text)
                source.text = ""
                return "", ""
            end = found.start() if found else len(source.text) - self._marks.num_held(source.text)
            shown = source.text[:end].rstrip()
            parts.content(shown)
            source.take(len(shown))
            if found:
                blanks = source.take(end - len(shown))
                return blanks, source.take(len(found[0]))
            yield

    # ------------------------------------------------------------ reasoning

    def _read_reasoning(self) -> Steps[None]:
        source = self._source
        while not self._begins_in_reasoning:
            rest = source.text.lstrip()
            if rest.startswith(REASONING_BEGIN):
                break
            if source.is_ended or not REASONING_BEGIN.startswith(rest):
                return
            yield
        yield from self._skip_opening()
        yield from self._read_inside()
        self.num_reasoning_bytes = self._num_bytes - len(source.text.encode())
        yield from source.skip_blanks()

    def _skip_opening(self) -> Steps[None]:
        """Drop an opening tag, which some models repeat, and the white space around it."""
        source = self._source
        yield from source.skip_blanks()
        while REASONING_BEGIN.startswith(source.text) and source.text != REASONING_BEGIN and not source.is_ended:
            yield
        source.text = source.text.removeprefix(REASONING_BEGIN)
        yield from source.skip_blanks()

    def _read_inside(self) -> Steps[None]:
        source = self._source
        while True:
            found = _REASONING_ENDS.search(source.text)
            if found is None and source.is_ended:
                self._parts.reasoning(source.take(len(source.text)))
                return
            end = found.start() if found else len(source.text) - _REASONING_ENDS.num_held(source.text)
            shown = source.text[:end].rstrip()
            self._parts.reasoning(shown)
            source.take(len(shown))
            if found:
                source.take(end - len(shown) + len(REASONING_END))
                return
            yield
