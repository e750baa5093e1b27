"""The query parameters of lists: `after`, `limit`, `order`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from toka_engine.server.errors import invalid

_ORDERS = ("asc", "desc")


class Page(msgspec.Struct, frozen=True):
    """The part of a list that is asked for."""

    after: str | None
    limit: int
    is_ascending: bool


def read_page(query: Mapping[str, str], default: int, maximum: int, others: Collection[str] = ()) -> Page:
    """Return the page that `query` asks for. Raises a 400 that names the parameter; `others` are the list's own."""
    for name in query:
        if name not in ("after", "limit", "order", *others):
            raise invalid(name[:100], f"Unknown parameter: '{name[:100]}'.", "unknown_parameter")
    limit = query.get("limit", str(default))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 6 and 1 <= int(limit) <= maximum):
        raise invalid("limit", f"'limit' must be an integer from 1 to {maximum}.", "invalid_value")
    order = query.get("order", "desc")
    if order not in _ORDERS:
        raise invalid("order", "'order' must be 'asc' or 'desc'.", "invalid_value")
    return Page(query.get("after"), int(limit), order == "asc")
