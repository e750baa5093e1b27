"""Keeps responses in memory, up to a number and a size; those used longest ago go first.

Owns: what is kept of a response, and the chain by which a request continues an earlier one.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from toka_engine.server.errors import ApiError

MAX_RESPONSES = 10_000
MAX_CHAIN = 200
"""The most responses that one request may continue, one after the other."""
_OVERHEAD_BYTES = 1024
"""The memory of an entry beside its texts."""


class StoredResponse(msgspec.Struct, frozen=True):
    """A response as it was answered, and the items that the request for it brought."""

    owner: str
    """Whose key asked for it; nobody else may read, continue or delete it."""
    body: bytes
    input_items: bytes
    output_items: bytes
    previous_id: str | None

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.input_items) + len(self.output_items) + _OVERHEAD_BYTES


class ResponseStore:
    """The responses of this process."""

    def __init__(self, max_bytes: int, max_responses: int = MAX_RESPONSES) -> None:
        """`max_bytes` 0: nothing is kept."""
        self.max_bytes = max_bytes
        self._max_responses = max_responses
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Keep a response, unless it alone is too large."""
        if response.num_bytes > self.max_bytes:
            return
        self._responses[response_id] = response
        self.num_bytes += response.num_bytes
        while self.num_bytes > self.max_bytes or len(self._responses) > self._max_responses:
            self._drop(next(iter(self._responses)))

    def get(self, owner: str, response_id: str, param: str | None = None) -> StoredResponse:
        """Return a response of `owner`, which counts as used now. Raises a 404; `param` names the field that asked
        for it.
        """
        found = self._responses.get(response_id)
        if found is None or found.owner != owner:
            raise self._missing(response_id, param)
        self._responses.move_to_end(response_id)
        return found

    def delete(self, owner: str, response_id: str) -> None:
        """Drop a response of `owner`. Raises a 404."""
        self.get(owner, response_id)
        self._drop(response_id)

    def items_until(self, owner: str, response_id: str) -> list[bytes]:
        """Return the items of the owner's whole conversation up to `response_id`, earliest first, in lists of JSON.
        Raises a 404 where a part of it is not here any more, and a 400 where it is too long.
        """
        param = "previous_response_id"
        chain: list[StoredResponse] = []
        wanted: str | None = response_id
        while wanted is not None:
            if len(chain) >= MAX_CHAIN:
                message = f"'{param}' continues more than {MAX_CHAIN} responses: send the items as 'input'."
                raise ApiError(400, message, param=param)
            chain.append(self.get(owner, wanted, param))
            wanted = chain[-1].previous_id
        return [part for response in reversed(chain) for part in (response.input_items, response.output_items)]

    def _drop(self, response_id: str) -> None:
        self.num_bytes -= self._responses.pop(response_id).num_bytes

    def _missing(self, response_id: str, param: str | None) -> ApiError:
        shown = response_id if len(response_id) <= 100 else response_id[:100] + "..."
        advice = (
            "This server keeps responses in its own memory, the latest ones of this replica; send the items as 'input'"
            if self.max_bytes
            else "This server keeps no responses (response_store_bytes=0); send the items as 'input'"
        )
        return ApiError(404, f"There is no response '{shown}'. {advice}.", param=param, code="response_not_found")
