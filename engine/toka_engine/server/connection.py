"""One HTTP connection: uvicorn's httptools protocol with the limits that uvicorn lacks.

Owns: how long a client may take to send a request, how large its head may be, how long it may leave an answer
unread, how many connections there are; and telling a running request that its client is gone. No routes, no
bodies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from toka_engine.server.errors import ApiError, unavailable

MAX_HEAD_BYTES = 64 * 1024


class Connections(ServerState):
    """The open connections of this process."""

    def __init__(self) -> None:
        super().__init__()
        self._emptied: asyncio.Event | None = None

    async def close_all(self) -> None:
        """Close the idle ones, the others after their answer; return when none is left."""
        for connection in list(self.connections):
            connection.shutdown()
        self._emptied = asyncio.Event()
        self.on_lost()
        await self._emptied.wait()

    def on_lost(self) -> None:
        if self._emptied is not None and not self.connections:
            self._emptied.set()


class ConnectionLimits(msgspec.Struct, frozen=True):
    receive_timeout_s: float
    send_timeout_s: float
    max_connections: int


class Connection(HttpToolsProtocol):
    """See the module. `gone_callbacks` are called once, when the connection is lost."""

    def __init__(self, config: Config, state: Connections, limits: ConnectionLimits) -> None:
        super().__init__(config, state, {})
        self._all = state
        self.gone_callbacks: set[Callable[[], None]] = set()
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._num_parsed_bytes = 0
        self._is_in_head = True
        self.is_gone = False

    # ------------------------------------------------------------ life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(unavailable("Too many connections."))
            return
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self.resume_writing()
        super().connection_lost(exc)
        self.is_gone = True
        callbacks, self.gone_callbacks = self.gone_callbacks, set()
        for callback in callbacks:
            callback()
        self._all.on_lost()

    # ------------------------------------------------------------ receiving

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._is_in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        # The body that came with the head does not count: a parsed head was measured by its own parts.
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        self._num_parsed_bytes = 0
        if self._deadline is None:
            self._start_deadline()

    def on_url(self, url: bytes) -> None:
        self._num_parsed_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_parsed_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._num_parsed_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
            return
        super().on_headers_complete()
        self.scope["state"]["cycle"] = self.cycle

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head = True
        self._num_head_bytes = 0
        self._stop_deadline()
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def watch_for_end(self) -> None:
        """Read on after a body whose last piece paused reading: else the client's leaving would go unseen."""
        if not self.pipeline and not self.is_gone:
            self.flow.resume_reading()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self._limits.receive_timeout_s, self._on_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.pipeline:  # we stopped reading: an earlier request of this connection is still being answered
            self._start_deadline()
        elif self._num_head_bytes == 0 or (self.cycle is not None and self.cycle.response_started):
            self.transport.close()
        else:
            seconds = self._limits.receive_timeout_s
            self._refuse(ApiError(408, f"The request did not arrive within {seconds:g} s.", code="receive_timeout"))

    # ------------------------------------------------------------ sending

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._send_deadline is None:
            # Dropped, not closed: closing would wait for the reader that does not read.
            self._send_deadline = self.loop.call_later(self._limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    def send_400_response(self, msg: str) -> None:
        """Called by the base class for what is not HTTP."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse_head(self) -> None:
        self._refuse(ApiError(431, f"The request's head has more than {MAX_HEAD_BYTES} bytes.", code="head_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answer outside any request and close."""
        self._stop_deadline()
        if self.transport.is_closing():
            return
        body = error.body()
        head = [
            STATUS_LINE[error.status],
            b"content-type: application/json\r\nconnection: close\r\n",
            b"content-length: %d\r\n\r\n" % len(body),
        ]
        self.transport.write(b"".join([*head, body]))
        self.transport.close()


class JoinedWrites:
    """Stands in for the transport of one answer, so that its head and body leave in one write."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._parts: list[bytes] = []

    def __enter__(self) -> None:
        self._cycle.transport = self  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._cycle.transport = self._transport

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()


def connection_factory(config: Config, state: Connections, limits: ConnectionLimits) -> Callable[[], Any]:
    """What `loop.create_server` calls for each connection."""
    return lambda: Connection(config, state, limits)
