"""`/v1/batches`: many requests in a file, answered into a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from toka_engine.server.batches.cursor import Cursor, begin_of
from toka_engine.server.batches.database import Database
from toka_engine.server.batches.records import Batch, BatchList, StoredBatch, new_batch_id, new_file_id, now
from toka_engine.server.batches.service import Batches
from toka_engine.server.decoding import BodyDecoder
from toka_engine.server.endpoints.files import check_life, no_file
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.exchange import Exchange
from toka_engine.server.keys.check import owner_of
from toka_engine.server.paging import Page, read_page
from toka_engine.server.service import Service

PATH = "/v1/batches"
_WINDOW = re.compile(r"([1-9][0-9]{0,2})h")
_MAX_HOURS = 7 * 24
_MAX_LISTED, _DEFAULT_LISTED = 100, 20
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512


class ExpiresAfter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The time for which result files are kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(description="3600 to 2592000")]


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body that creates a batch."""

    input_file_id: str
    endpoint: Annotated[str, Meta(description="the path that every line's url names")]
    completion_window: Annotated[str, Meta(description="hours as Nh, up to 168h; OpenAI's clients send 24h")] = "24h"
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


_decoder = BodyDecoder(BatchRequest)


async def read_batch(exchange: Exchange, service: Service, batches: Batches) -> BatchRequest:
    """Return the body that creates a batch. Raises a 400 that names the field, and 501 where none can be created."""
    if batches.peers is None:
        batches.opened()
    return await service.read(exchange, _decoder)


async def create_batch(exchange: Exchange, request: BatchRequest, batches: Batches) -> Batch:
    """Create and start a batch. Raises a 400 that names the field."""
    opened, owner = batches.opened(), owner_of(exchange)
    if request.endpoint not in batches.handlers:
        served = ", ".join(batches.handlers)
        raise invalid("endpoint", f"'endpoint' must be one of: {served}.", "invalid_value")
    hours = _read_window(request.completion_window)
    _check_metadata(request.metadata)
    life_s = None
    if request.output_expires_after is not None:
        life_s = check_life(request.output_expires_after.seconds, "output_expires_after.seconds")
    file = await opened.database.run(Database.find_file, owner, request.input_file_id)
    if file is None:
        raise no_file(request.input_file_id, "input_file_id")
    if file.purpose != "batch":
        message = f"The file's purpose is '{file.purpose}'; a batch reads one of purpose 'batch'."
        raise invalid("input_file_id", message, "invalid_value")
    at = now()
    batch = Batch(
        id=new_batch_id(batches.ordinal),
        endpoint=request.endpoint,
        input_file_id=file.id,
        completion_window=request.completion_window,
        status="validating",
        created_at=at,
        expires_at=at + hours * 3600,
        metadata=request.metadata,
    )
    output_id, error_id = new_file_id(batches.ordinal), new_file_id(batches.ordinal)
    stored = StoredBatch(owner=owner, batch=batch, output_id=output_id, error_id=error_id, results_expire_s=life_s)
    if not await opened.database.run(Database.add_batch, stored):
        raise no_file(request.input_file_id, "input_file_id")  # deleted a moment ago
    batches.start(stored)
    return batch


def _read_window(text: str) -> int:
    found = _WINDOW.fullmatch(text)
    if found is None or int(found[1]) > _MAX_HOURS:
        message = f"'completion_window' must be 1h to {_MAX_HOURS}h, as '24h'."
        raise invalid("completion_window", message, "invalid_value")
    return int(found[1])


def _check_metadata(metadata: dict[str, str] | None) -> None:
    for key, value in (metadata or {}).items():
        if len(key) > _MAX_KEY or len(value) > _MAX_VALUE:
            message = f"'metadata' has keys of up to {_MAX_KEY} and values of up to {_MAX_VALUE} characters."
            raise invalid("metadata", message, "invalid_value")
    if metadata is not None and len(metadata) > _MAX_METADATA:
        raise invalid("metadata", f"'metadata' has at most {_MAX_METADATA} keys.", "invalid_value")


async def find_batch(exchange: Exchange, batch_id: str, batches: Batches) -> Batch:
    """Return one of the caller's batches. Raises a 404."""
    owner = owner_of(exchange)
    run = batches.find_run(owner, batch_id)
    if run is not None:
        return run.stored.batch  # newer than the database while a disk is full
    stored = await batches.opened().database.run(Database.find_batch, owner, batch_id)
    if stored is None:
        raise _no_batch(batch_id)
    return stored.batch


def read_batch_page(query: Mapping[str, str]) -> Page:
    """Return the page of batches that is asked for, the newest first. Raises a 400."""
    page = read_page(query, _DEFAULT_LISTED, _MAX_LISTED)
    if page.is_ascending:
        raise invalid("order", "Batches are listed with the newest first.", "unsupported_parameter")
    return page


async def list_batches(exchange: Exchange, page: Page, batches: Batches, cursor: Cursor | None = None) -> BatchList:
    """Return one page of the caller's batches. `cursor`: where it begins, if that is another replica's batch."""
    opened, owner = batches.opened(), owner_of(exchange)
    after = begin_of(page.after, cursor, batches.ordinal, is_ascending=False)
    if isinstance(after, str) and await opened.database.run(Database.find_batch, owner, after) is None:
        raise _no_batch(after, "after")
    found = await opened.database.run(Database.list_batches, owner, after=after, limit=page.limit + 1)
    shown = [stored.batch for stored in found[: page.limit]]
    return BatchList(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > page.limit,
    )


async def cancel_batch(exchange: Exchange, batch_id: str, batches: Batches) -> Batch:
    """End a batch: lines in flight are given up, answered ones are kept. Raises a 404, and a 409 if it is over."""
    batches.opened()
    run = batches.find_run(owner_of(exchange), batch_id)
    if run is not None and run.stored.batch.status != "cancelling":
        await run.cancel()
    if run is None or run.stored.is_over:
        batch = await find_batch(exchange, batch_id, batches)
        raise ApiError(409, f"The batch is over: it is {batch.status}.", code="batch_over")
    return run.stored.batch


def _no_batch(batch_id: str, param: str = "batch_id") -> ApiError:
    return ApiError(404, f"There is no batch '{batch_id[:100]}'.", param=param, code="batch_not_found")
