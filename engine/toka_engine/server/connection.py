"""An HTTP connection: uvicorn's httptools protocol with the limits that uvicorn lacks.

Owns: how long a client may take to send a request, how large its head may be, how long it may leave an answer
unread, how many connections there are; that an offered upgrade is ignored and not the request; that HTTP/1.0 gets
no chunks; and telling a running request that its client is gone. No routes, no bodies.

uvicorn promises nothing about what is behind its `run`, so that its version is pinned, and this module is the only one
that uses what is there: `HttpToolsProtocol`, because its parser's callbacks and its transport are where such limits can
be set; `RequestResponseCycle` with its attributes `transport`, `keep_alive`, `response_started`, `response_complete`,
`more_body`, `waiting_for_100_continue`, `chunked_encoding` and `expected_content_length`; `STATUS_LINE`; and
`ServerState`, whose connections a drain closes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from toka_engine.server.errors import ApiError, unavailable
from toka_engine.server.half_closed import COMMENT, INTERIM, HalfClosedWatch
from toka_engine.server.headers import REQUEST_ID, choose_request_id, date

logger = logging.getLogger("toka.server.access")

MAX_HEAD_BYTES = 64 * 1024


class Connections(ServerState):
    """The open connections of this process."""

    def __init__(self) -> None:
        super().__init__()
        self._emptied: asyncio.Event | None = None

    async def close_all(self) -> None:
        """Close idle connections at once and the others after their answer; return when none is left."""
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
    logs_refusals: bool
    """Whether the log has a line for what is refused before it is a request."""


class Connection(HttpToolsProtocol):
    """A connection with limits. `gone_callbacks` are called once, when it is lost."""

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
        self._takes_requests = True
        self._running: RequestResponseCycle | None = None
        """The request that is being answered, or was last; `cycle` is the one that arrived last."""
        self._half_closed: HalfClosedWatch | None = None
        self.is_gone = False

    # ------------------------------------------------------------ life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(unavailable("Too many connections."))
            return
        self._start_deadline()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while requests that have arrived are answered, for as long as the client is there."""
        if not self._end_after_answers():
            return False
        if self._half_closed is None:
            self._half_closed = HalfClosedWatch(self.transport, self._probe)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        if self._half_closed is not None:
            self._half_closed.stop()
        self.resume_writing()
        super().connection_lost(exc)
        self.is_gone = True
        callbacks, self.gone_callbacks = self.gone_callbacks, set()
        for callback in callbacks:
            callback()
        self._all.on_lost()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _probe(self) -> bytes:
        """Return what may be sent to see whether the client is there, and is no part of the answer."""
        cycle = self._running
        if cycle is None or cycle.response_complete or self.flow.write_paused:
            return b""
        if not cycle.response_started:
            return INTERIM if cycle.scope["http_version"] == "1.1" else b""
        # Whole answers are never between head and end here, so that this one is a stream, between two events.
        return b"%x\r\n%s\r\n" % (len(COMMENT), COMMENT) if cycle.chunked_encoding else COMMENT

    def _end_after_answers(self) -> bool:
        """Take no further request and close after the answers to those that have arrived whole. Return whether there
        are any.
        """
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is None or last.response_complete or last.more_body:
            return False
        last.keep_alive = False
        self._takes_requests = False
        self._stop_deadline()
        return True

    # ------------------------------------------------------------ receiving

    @property
    def _is_deaf(self) -> bool:
        return not self._takes_requests or self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._is_in_head:
            self._num_head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        # The body that came with the head does not count: a parsed head was measured by its own parts.
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    def _parse(self, data: bytes) -> None:
        """Feed the parser. After a head that offers an upgrade it skips the body: so the head is parsed again without
        the offer, which a server may ignore.
        """
        while data and not self._is_deaf:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_upgrade() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

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
        if self._is_deaf:
            return
        if self.parser.get_method() == b"CONNECT":
            self._refuse(ApiError(405, "This server is no proxy.", code="method_not_allowed"))
            return
        if self.parser.should_upgrade():
            return  # `_parse` comes back with the same head
        self._is_in_head = False
        if self._num_parsed_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
            return
        super().on_headers_complete()
        self.scope["state"]["cycle"] = self.cycle
        if self.scope["http_version"] != "1.1":
            self.cycle.keep_alive = False
            self.cycle.waiting_for_100_continue = False

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and not self._is_deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_in_head = True
        self._num_head_bytes = 0
        self._stop_deadline()
        if self.cycle is not None and not self._is_deaf:
            super().on_message_complete()

    def watch_for_end(self) -> None:
        """Resume reading after a body whose last piece paused it: else the client's disconnect would go unseen."""
        if not self.pipeline and not self.is_gone:
            self.flow.resume_reading()

    def extend_deadline(self) -> None:
        """Let the request that is arriving have the whole of `receive_timeout_s` again: it makes progress."""
        if self._deadline is not None:
            self._stop_deadline()
            self._start_deadline()

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
        elif self._end_after_answers():
            return
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
        """Refuse what is not HTTP; the base class calls this."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse_head(self) -> None:
        self._refuse(ApiError(431, f"The request's head has more than {MAX_HEAD_BYTES} bytes.", code="head_too_large"))

    def _refuse(self, error: ApiError) -> None:
        """Answer outside any request and close; only close, behind the answers to earlier requests."""
        self._stop_deadline()
        if self._is_deaf or self._end_after_answers():
            return
        body = error.body()
        request_id = choose_request_id(self.headers or ())
        if self._limits.logs_refusals:
            logger.info("event=refused request_id=%s status=%d code=%s", request_id.decode(), error.status, error.code)
        head = [
            STATUS_LINE[error.status],
            b"date: %s\r\n%s: %s\r\n" % (date(), REQUEST_ID, request_id),
            b"content-type: application/json\r\nconnection: close\r\n",
            b"content-length: %d\r\n\r\n" % len(body),
        ]
        self.transport.write(b"".join([*head, body]))
        self.transport.close()


Cycle: TypeAlias = RequestResponseCycle
"""uvicorn's side of one request and its answer."""


def close_if_body_is_unasked(cycle: Cycle) -> None:
    """End the connection after an answer to a client that still waits to be asked for its body: whether it will send
    that is not known, and what follows could be taken for it.
    """
    if cycle.waiting_for_100_continue:
        cycle.keep_alive = False


class UnsizedBody:
    """A body whose length is not known at its beginning: in chunks, or ended by the connection for HTTP/1.0."""

    def __init__(self, cycle: Cycle) -> None:
        self._cycle = cycle
        self.is_chunked = cycle.scope["http_version"] == "1.1"
        self.headers = [(b"transfer-encoding", b"chunked")] if self.is_chunked else []
        if not self.is_chunked:
            cycle.chunked_encoding = False

    def announce(self, part: bytes) -> None:
        """Let `part` be sent where the body is not in chunks: uvicorn would refuse it as beyond the length that it was
        told.
        """
        self._cycle.expected_content_length = len(part)


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
    """Return what the event loop's `create_server` calls for each connection."""
    return lambda: Connection(config, state, limits)
