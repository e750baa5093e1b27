"""Requests for files and batches of another replica: passed on to it, or answered from all replicas' lists together.

Owns: which request is whose. A request that a peer has passed on is answered here or refused, never passed on again.
"""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from toka_engine.server.batches.cursor import Cursor, read_cursor
from toka_engine.server.batches.peers import Peers, headers_of, read_answer, read_whole
from toka_engine.server.batches.records import ordinal_of
from toka_engine.server.batches.service import Batches
from toka_engine.server.errors import ApiError, unavailable
from toka_engine.server.exchange import Exchange
from toka_engine.server.keys.check import owner_of
from toka_engine.server.paging import Page
from toka_engine.server.route_helpers import exchange_of, json_response


class _Part(msgspec.Struct):
    """A replica's page of a list."""

    data: list[msgspec.Raw]
    has_more: bool


class _Item(msgspec.Struct):
    id: str
    created_at: int


class _Merged(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool


_decode_part = msgspec.json.Decoder(_Part).decode
_decode_item = msgspec.json.Decoder(_Item).decode


async def pass_on(
    request: Request, batches: Batches, stored_id: str, path: str, body: bytes | None = None
) -> Response | None:
    """Return the answer of the replica that has `stored_id`; None if this one answers. Raises a 421, and a 503."""
    exchange, peers = exchange_of(request), batches.peers
    if peers is None or peers.check_addressed(exchange, is_open=batches.is_open):
        return None
    if not _is_elsewhere(peers, batches, stored_id):
        return None
    answer = await peers.ask(exchange, path, stored_id, body)
    return StreamingResponse(read_answer(answer), answer.status_code, headers_of(answer))


def _is_elsewhere(peers: Peers, batches: Batches, stored_id: str) -> bool:
    """Tell whether an id is of another replica, or of this ordinal while its predecessor still has the folder."""
    ordinal = ordinal_of(stored_id)
    return ordinal is not None and not (ordinal == peers.ordinal and batches.is_open)


async def list_together(
    request: Request, batches: Batches, page: Page, list_own: Callable[[Cursor | None], Awaitable[Any]]
) -> Response:
    """Answer a list with the files or batches of all replicas. `list_own` lists those of this one, behind a cursor."""
    exchange, peers = exchange_of(request), batches.peers
    if peers is None or peers.check_addressed(exchange, is_open=batches.is_open):
        return json_response(await list_own(read_cursor(exchange)))
    cursor = await _find_cursor(exchange, peers, batches, page)
    path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    parts: dict[int, bytes] = {}
    if batches.is_open:
        parts[peers.ordinal] = msgspec.json.encode(await list_own(cursor))
    header = cursor.encode() if cursor else b""
    parts |= await peers.ask_all(exchange, path, header, is_open=batches.is_open)
    return Response(msgspec.json.encode(_merge(parts, page)), media_type="application/json")


async def _find_cursor(exchange: Exchange, peers: Peers, batches: Batches, page: Page) -> Cursor | None:
    """Return where the page begins; None if it is the first, and for an id that this replica would have and has not."""
    if page.after is None:
        return None
    if not _is_elsewhere(peers, batches, page.after):
        created_at = await batches.find_age(owner_of(exchange), page.after)
        return None if created_at is None else Cursor(created_at, peers.ordinal)
    kind = "files" if page.after.startswith("file-") else "batches"
    answer = await peers.ask(exchange, f"/v1/{kind}/{page.after}", page.after)
    body = await read_whole(answer)
    if answer.status_code == 404:
        raise ApiError(404, f"There is no '{page.after[:100]}'.", param="after", code="not_found")
    if answer.status_code != 200:
        raise unavailable("The replica that has the list's beginning does not answer.")
    ordinal = ordinal_of(page.after)
    return Cursor(_decode_item(body).created_at, peers.ordinal if ordinal is None else ordinal)


def _merge(parts: dict[int, bytes], page: Page) -> _Merged:
    """Return one page of several replicas' pages of the same list."""

    def numbered(ordinal: int, part: _Part) -> Iterator[tuple[tuple[int, int], str, msgspec.Raw]]:
        for raw in part.data:
            item = _decode_item(raw)
            yield (item.created_at, ordinal), item.id, raw

    read = {ordinal: _decode_part(data) for ordinal, data in parts.items()}
    rows = [numbered(ordinal, part) for ordinal, part in read.items()]
    merged = list(heapq.merge(*rows, key=lambda row: row[0], reverse=not page.is_ascending))
    shown = merged[: page.limit]
    return _Merged(
        data=[raw for _, _, raw in shown],
        first_id=shown[0][1] if shown else None,
        last_id=shown[-1][1] if shown else None,
        has_more=len(merged) > page.limit or any(part.has_more for part in read.values()),
    )
