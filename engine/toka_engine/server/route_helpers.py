"""The two things that every route of the application does: find its exchange, and answer with JSON."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request, Response

from toka_engine.server.exchange import Exchange


def exchange_of(request: Request) -> Exchange:
    """Return the exchange that `front` has made for this request."""
    exchange: Exchange = request.scope["state"]["exchange"]
    return exchange


def json_response(answer: Any, status: int = 200) -> Response:
    """Return `answer`, a struct, as JSON."""
    return Response(msgspec.json.encode(answer), status, media_type="application/json")
