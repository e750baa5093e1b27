"""`GET` and `DELETE /v1/responses/ID`: the responses that are kept, and the items of their input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from toka_engine.server.errors import invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.keys.check import owner_of
from toka_engine.server.paging import read_page
from toka_engine.server.service import Service


class ItemList(msgspec.Struct):
    """Items of a kept response's input."""

    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class Deleted(msgspec.Struct):
    """The answer to the deletion of a response."""

    id: str
    object: str = "response"
    deleted: bool = True


def find_response(service: Service, exchange: Exchange, response_id: str) -> bytes:
    """Return the body of a response that is kept for the caller. Raises a 404."""
    return service.responses.get(owner_of(exchange), response_id).body


def delete_response(service: Service, exchange: Exchange, response_id: str) -> Deleted:
    """Drop a response that is kept for the caller. Raises a 404."""
    service.responses.delete(owner_of(exchange), response_id)
    return Deleted(response_id)


def list_input_items(service: Service, exchange: Exchange, response_id: str, query: Mapping[str, str]) -> ItemList:
    """Return items of the input of a kept response. Raises a 404, and a 400 that names the parameter."""
    wanted = read_page(query, 20, 100)
    items = msgspec.json.decode(service.responses.get(owner_of(exchange), response_id).input_items)
    if not wanted.is_ascending:
        items.reverse()
    if wanted.after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == wanted.after]
        if not places:
            raise invalid("after", "'after' is not the id of an item of this response.", "invalid_value")
        items = items[places[0] + 1 :]
    page = items[: wanted.limit]
    ids = [item["id"] for item in page] or [None]
    return ItemList(page, ids[0], ids[-1], len(items) > wanted.limit)
