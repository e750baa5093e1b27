"""A line of a batch as a request: it goes through the same handler as a client's, and its answer is kept.

Owns: what an `Exchange` is without a connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toka_engine.server.exchange import JSON, BodyBudget, Exchange


class LineConnection:
    """Stands where a request's connection does; it is lost when the line is given up."""

    def __init__(self) -> None:
        self.is_gone = False
        self.gone_callbacks: set[Callable[[], None]] = set()

    def watch_for_end(self) -> None:
        """Do nothing: nobody is at the other end."""

    def lose(self) -> None:
        """Give the line up: the generation that runs for it is cancelled."""
        self.is_gone = True
        callbacks, self.gone_callbacks = self.gone_callbacks, set()
        for callback in callbacks:
            callback()


class LineExchange(Exchange):
    """A request of a batch, whose answer is kept in `status` and `body`."""

    def __init__(self, path: str, body: bytes, connection: LineConnection, owner: str, min_priority: int = 0) -> None:
        """`owner`: who sent the batch."""
        scope = {
            "method": "POST",
            "path": path,
            "headers": [(b"content-type", JSON)],
            "state": {"connection": connection, "cycle": None},
        }
        super().__init__(scope, _unused, _unused)
        self.owner = owner
        self.min_priority = min_priority
        self._request_body = body
        self.body = b""

    async def read_json(self, budget: BodyBudget) -> bytes:
        return self._request_body

    async def answer(
        self, status: int, body: bytes, kind: bytes = JSON, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        self.status, self.body = status, body
        self._is_complete = True

    async def begin_events(self) -> None:
        raise AssertionError("a batch's lines are not streamed")


async def _unused(*_: Any) -> None:
    raise AssertionError("a batch's line has no connection to read or write")
