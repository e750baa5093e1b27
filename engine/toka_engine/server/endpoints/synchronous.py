"""`POST /custom/synchronous-batch-completions`: the original's endpoint for many completions in one request, as JSON.

Each request of the body goes through the completions endpoint as if it had come alone. The original answers in pickled
bytes; this answer is a JSON list in the order of the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from toka_engine.server.batches.line_exchange import LineConnection, LineExchange
from toka_engine.server.deadlines import TIMEOUT_HEADER
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.endpoints import completions
from toka_engine.server.errors import invalid
from toka_engine.server.exchange import Exchange, Handler
from toka_engine.server.failures import answer_failure
from toka_engine.server.keys.check import owner_of
from toka_engine.server.service import Service

PATH = "/custom/synchronous-batch-completions"
_OBJECTS: dict[str, Any] = {"type": "array", "items": {"type": "object"}}


class SynchronousBatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Completion requests that are answered together, as one list."""

    requests: Annotated[
        list[msgspec.Raw], Meta(description="bodies of completion requests", extra_json_schema=_OBJECTS)
    ]


_decoder = BodyDecoder(SynchronousBatchRequest)


async def answer_all(exchange: Exchange, service: Service, answer_one: Handler, max_requests: int) -> bytes:
    """Return the answers as a JSON list; in the place of a refused request stands its error. Raises ApiError."""
    service.serving_engine()
    requests = (await service.read(exchange, _decoder)).requests
    if not 0 < len(requests) <= max_requests:
        message = f"'requests' must have 1 to {max_requests} entries (`max_choices_per_request`)."
        raise invalid("requests", message, "invalid_value")
    connections = [LineConnection() for _ in requests]
    lose_all = _losing(connections)
    exchange.connection.gone_callbacks.add(lose_all)
    try:
        ask = (
            _ask(exchange, bytes(body), connection, service, answer_one)
            for body, connection in zip(requests, connections, strict=True)
        )
        return b"[" + b",".join(await asyncio.gather(*ask)) + b"]"
    finally:
        exchange.connection.gone_callbacks.discard(lose_all)


def _losing(connections: list[LineConnection]) -> Callable[[], None]:
    def lose_all() -> None:
        for connection in connections:
            connection.lose()

    return lose_all


async def _ask(
    whole: Exchange, body: bytes, connection: LineConnection, service: Service, answer_one: Handler
) -> bytes:
    exchange = LineExchange(completions.PATH, body, connection, owner_of(whole))
    exchange.key = whole.key
    exchange.headers += [header for header in whole.headers if header[0] == TIMEOUT_HEADER]
    try:
        await answer_one(exchange)
    except Exception as error:  # the outermost point of one request, as in `front`
        await answer_failure(exchange, error, service.metrics)
    return exchange.body or b"null"
