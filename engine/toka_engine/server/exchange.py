"""One HTTP request and its answer, on top of ASGI: reads a bounded body, writes JSON or server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

from toka_engine.portable import HeapKeeper
from toka_engine.server.connection import Connection, Cycle, JoinedWrites, UnsizedBody, close_if_body_is_unasked
from toka_engine.server.errors import ApiError, ClientGoneError, unavailable
from toka_engine.server.generation_times import GenerationTimes
from toka_engine.server.headers import IGNORED, REQUEST_ID, choose_request_id, date, list_ignored
from toka_engine.server.keys.use import KeyUse
from toka_engine.server.request import Usage

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"


_LARGE_BODY_BYTES = 1024 * 1024
_HEAP = HeapKeeper()


Handler: TypeAlias = Callable[["Exchange"], Awaitable[None]]
"""An endpoint that answers through the exchange. Raises ApiError and ClientGoneError."""


class BodyBudget:
    """Limits the bytes of bodies that are held at once, over all requests."""

    def __init__(self, max_body_bytes: int, max_total_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._max_total_bytes = max_total_bytes
        self._held_bytes = 0

    def take(self, num_bytes: int) -> None:
        if self._held_bytes + num_bytes > self._max_total_bytes:
            raise unavailable("Too many large requests at once.")
        self._held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._held_bytes -= num_bytes


class Exchange:
    """A request, and what has been answered to it so far."""

    key: KeyUse | None = None
    """The API key that the request carries; None where none is asked for."""
    owner: str | None = None
    """Whose request it is, where that is not said by its key."""
    holds_place = False
    """Whether the request counts in what its key runs at once."""

    def __init__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.connection: Connection = scope["state"]["connection"]
        self._cycle: Cycle = scope["state"]["cycle"]
        self.request_id = choose_request_id(self.headers)
        self.started_s = time.monotonic()
        self.model = ""
        self.min_priority: int | None = None
        """The lowest number that the request's priority may be; None: its own counts."""
        self.usage: Usage | None = None
        self.times: GenerationTimes | None = None
        """The moments of its generation, once that has begun."""
        self.first_token_s: float | None = None
        """Seconds from the request's head to the first event of a stream."""
        self.status = 0
        """The answer's status; 0 until it has begun."""
        self.further_headers: tuple[tuple[bytes, bytes], ...] = ()
        """Headers that this request's answer has in any case, beside those of every answer."""
        self.ignored: list[str] = []
        """The fields of the request that have no effect, as the answer names them."""
        self._is_stream = False
        self._unchunked: UnsizedBody | None = None
        """The body of a stream to a client of HTTP/1.0."""
        self._is_complete = False
        self.body_bytes = 0
        self.error_event: Callable[[ApiError], bytes] = _error_event
        """Writes the last event of a stream that fails."""
        self.failure: Exception | None = None
        """The exception that has been answered."""
        self.failure_code: str | None = None
        """The code of an answer that is an error, "" for one without; None: it is none. It outlives `failure`."""
        self._receive = receive
        self._send = send

    def ignore(self, names: Iterable[str]) -> None:
        """Name these fields in the answer as without effect. To be called before the answer begins."""
        self.ignored += names

    def header(self, wanted: bytes) -> bytes | None:
        return next((value for name, value in self.headers if name == wanted), None)

    async def read_json(self, budget: BodyBudget) -> bytes | bytearray:
        """Return the raw body, in one buffer that its parts fill as they come. Raises 415, 413 or ClientGoneError."""
        first = dict(reversed(self.headers)).get  # of a name's values, the first
        _check_encoding(first(b"content-encoding", b""))
        kind = first(b"content-type", b"")
        if kind != JSON and kind.partition(b";")[0].strip().lower() != JSON:
            raise ApiError(415, "The content-type must be application/json.", code="unsupported_media_type")
        declared = first(b"content-length", b"")
        if declared.isdigit() and int(declared) > budget.max_body_bytes:
            raise _too_large(budget)
        held = 0
        buffer = bytearray()
        try:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("the client closed the connection")
                part: bytes = message.get("body", b"")
                if held + len(part) > budget.max_body_bytes:
                    raise _too_large(budget)
                budget.take(len(part))
                held += len(part)
                self.body_bytes = held
                is_last = not message.get("more_body")
                if is_last and not buffer:  # nearly every body comes whole
                    return part
                buffer += part
                if is_last:
                    return buffer
        finally:
            budget.give_back(held)
            self.connection.watch_for_end()

    async def read_parts(self, progress_bytes: int) -> AsyncIterator[bytes]:
        """Yield the parts of a body of any size as they come; the deadline moves on with each `progress_bytes`. Raises
        415 and ClientGoneError.
        """
        _check_encoding(self.header(b"content-encoding") or b"")
        held = 0
        try:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("the client closed the connection")
                part: bytes = message.get("body", b"")
                held += len(part)
                if held >= progress_bytes:
                    held = 0
                    self.connection.extend_deadline()
                yield part
                if not message.get("more_body"):
                    return
        finally:
            self.connection.watch_for_end()

    async def answer(
        self, status: int, body: bytes, kind: bytes = JSON, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        """Write a whole answer."""
        self.status = status
        close_if_body_is_unasked(self._cycle)
        fixed = [*self._fixed_headers(), (b"content-type", kind), (b"content-length", b"%d" % len(body))]
        with JoinedWrites(self._cycle):
            await self._send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
            await self._send({"type": "http.response.body", "body": body})
        self._is_complete = True

    def _fixed_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        fixed = ((b"date", date()), (REQUEST_ID, self.request_id), *self.further_headers)
        return (*fixed, (IGNORED, list_ignored(self.ignored))) if self.ignored else fixed

    async def send(self, message: Any) -> None:
        """Pass on what an ASGI application sends, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            close_if_body_is_unasked(self._cycle)
            message = {**message, "headers": [*self._fixed_headers(), *message["headers"]]}
        elif not message.get("more_body"):
            self._is_complete = True
        await self._send(message)

    async def begin_events(self) -> None:
        self.status = 200
        body = UnsizedBody(self._cycle)
        self._is_stream, self._unchunked = True, None if body.is_chunked else body
        self.first_token_s = time.monotonic() - self.started_s
        headers = [*self._fixed_headers(), (b"content-type", EVENTS)]
        headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        headers += body.headers
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write_events(self, events: bytes) -> None:
        """Write complete events; waits while the client does not read."""
        if self._unchunked is not None:
            self._unchunked.announce(events)
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_events(self, events: bytes) -> None:
        self._is_complete = True
        if self._unchunked is not None:
            self._unchunked.announce(events)
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    def release(self) -> None:
        """Let go of the request, and return the memory of a large body to the system; the allocator would keep it."""
        self.failure = None  # its traceback holds the body, and in a circle this exchange
        if self.body_bytes > _LARGE_BODY_BYTES:
            _HEAP.give_back(time.monotonic())

    async def fail(self, error: ApiError) -> None:
        """Answer with `error`; in a stream that has begun, as its last event, after which the connection
        closes. An answer that has begun otherwise is cut; one that is complete stays.
        """
        if not self.status:
            await self.answer(error.status, error.body(), headers=error.headers)
        elif not self._is_complete:
            if self._is_stream:
                await self.end_events(self.error_event(error))
            self.connection.transport.close()


def _check_encoding(encoding: bytes) -> None:
    """Raise a 415 for a compressed body."""
    encoding = encoding.strip().lower()
    if encoding not in (b"", b"identity"):
        shown = encoding[:50].decode("latin-1")
        message = f"The content-encoding '{shown}' is not supported: send the body uncompressed."
        wanted = ((b"accept-encoding", b"identity"),)
        raise ApiError(415, message, code="unsupported_content_encoding", headers=wanted)


def _error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


def _too_large(budget: BodyBudget) -> ApiError:
    return ApiError(413, f"The body has more than {budget.max_body_bytes} bytes.", code="body_too_large")
