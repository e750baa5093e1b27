"""Grammars that the workers hold: their numbers, who uses them, and which of them slots may refer to.

The server sends a source with each request; here equal sources become one number, and the workers get each source once.
A grammar that no stream uses stays with the workers while it is among the last used. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from toka_engine.grammar.source import GrammarSource
from toka_engine.messages import Grammar

MAX_GRAMMARS = 256
MAX_SOURCE_BYTES = 64 << 20
"""Grammars, and the bytes of their sources, that are kept where no stream uses them."""


@dataclass(slots=True, eq=False)
class KnownGrammar:
    """A grammar that has been sent to the workers."""

    number: int
    source: GrammarSource
    num_waiting: int
    """Workers that have not compiled it yet."""
    num_users: int = 0
    """Streams that wait or run with it."""

    @property
    def is_ready(self) -> bool:
        return self.num_waiting == 0


class Grammars:
    """All grammars of this replica. `outbox` has what the workers must hear before the next step."""

    def __init__(self) -> None:
        self.num_workers = 1
        """Workers that must have compiled a grammar before it is used."""
        self.outbox: list[Grammar] = []
        self._by_source: OrderedDict[GrammarSource, KnownGrammar] = OrderedDict()  # the last used one at the end
        self._by_number: dict[int, KnownGrammar] = {}
        self._last_number = 0
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._by_number)

    def use(self, source: GrammarSource, num_streams: int) -> KnownGrammar:
        """Return the grammar of `source`, which so many more streams use now."""
        known = self._by_source.get(source)
        if known is None:
            self._last_number += 1
            known = KnownGrammar(self._last_number, source, self.num_workers)
            self._by_source[source] = self._by_number[known.number] = known
            self._num_bytes += len(source.text)
            self.outbox.append(Grammar(known.number, source))
        self._by_source.move_to_end(source)
        known.num_users += num_streams
        return known

    def release(self, known: KnownGrammar, num_streams: int = 1) -> None:
        """Note that so many streams use `known` no more, and forget grammars that nobody has used for long."""
        known.num_users -= num_streams
        if not self._has_too_many:
            return
        for source, oldest in list(self._by_source.items()):
            if not self._has_too_many:
                break
            if not oldest.num_users and oldest.is_ready:
                self._forget(source, oldest)

    def note_compiled(self, number: int) -> bool:
        """Note that one more worker has compiled grammar `number`; return whether all have now."""
        known = self._by_number.get(number)
        if known is None:
            return False
        known.num_waiting -= 1
        return known.is_ready

    def fail(self, number: int) -> KnownGrammar | None:
        """Take out a grammar that a worker cannot compile, and return it; None where another worker was first."""
        known = self._by_number.get(number)
        if known is not None:
            self._forget(known.source, known)
        return known

    def take_outbox(self) -> list[Grammar]:
        outbox, self.outbox = self.outbox, []
        return outbox

    @property
    def _has_too_many(self) -> bool:
        return len(self._by_source) > MAX_GRAMMARS or self._num_bytes > MAX_SOURCE_BYTES

    def _forget(self, source: GrammarSource, known: KnownGrammar) -> None:
        del self._by_source[source], self._by_number[known.number]
        self._num_bytes -= len(source.text)
        self.outbox.append(Grammar(known.number, None))
