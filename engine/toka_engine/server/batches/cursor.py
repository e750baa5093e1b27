"""The place in all replicas' lists of files or batches at which a page begins."""

from __future__ import annotations

import re

import msgspec

from toka_engine.server.batches.database import Bound
from toka_engine.server.batches.peers import CURSOR, ORDINAL
from toka_engine.server.exchange import Exchange

_CURSOR = re.compile(rb"([0-9]{1,12}),([0-9]{1,4})")


class Cursor(msgspec.Struct, frozen=True):
    """A file or batch of a replica. Lists are in the order of age, those of the same second in that of ordinals."""

    created_at: int
    ordinal: int

    def encode(self) -> bytes:
        return b"%d,%d" % (self.created_at, self.ordinal)

    def bound_for(self, ordinal: int, *, is_ascending: bool) -> Bound:
        """Return how old the files or batches of another replica are that come behind this place."""
        has_same_second = ordinal > self.ordinal if is_ascending else ordinal < self.ordinal
        if is_ascending:
            return (">=" if has_same_second else ">"), self.created_at
        return ("<=" if has_same_second else "<"), self.created_at


def begin_of(
    after: str | None, cursor: Cursor | None, ordinal: int | None, *, is_ascending: bool
) -> str | Bound | None:
    """Return where the replica `ordinal` begins its part of a list: behind its own file or batch `after`, or behind a
    place in the others' lists.
    """
    if cursor is None or ordinal is None or cursor.ordinal == ordinal:
        return after
    return cursor.bound_for(ordinal, is_ascending=is_ascending)


def read_cursor(exchange: Exchange) -> Cursor | None:
    """Return the cursor that a peer has sent; None without one."""
    found = _CURSOR.fullmatch(exchange.header(CURSOR) or b"")
    return Cursor(int(found[1]), int(found[2])) if found and exchange.header(ORDINAL) else None
