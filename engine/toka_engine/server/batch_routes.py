"""The routes of files and batches."""

from __future__ import annotations

from functools import partial

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from toka_engine.server import batch_documents as documents
from toka_engine.server.batch_relay import list_together, pass_on
from toka_engine.server.batches.service import Batches
from toka_engine.server.endpoints import batches as batch_endpoint
from toka_engine.server.endpoints import completions, synchronous
from toka_engine.server.endpoints import files as file_endpoint
from toka_engine.server.route_helpers import exchange_of, json_response
from toka_engine.server.service import Service


def add_batch_routes(router: APIRouter, batches: Batches, service: Service) -> None:
    """Add the routes to the router of /v1, which checks the key."""
    _add_file_routes(router, batches)
    _add_synchronous_route(router, batches, service)
    _add_batch_routes(router, batches, service)


def _add_file_routes(router: APIRouter, batches: Batches) -> None:
    path = file_endpoint.PATH

    @router.post(path, openapi_extra=documents.UPLOAD_FILE)
    async def upload_file(request: Request) -> Response:
        return json_response(await file_endpoint.upload_file(exchange_of(request), batches))

    @router.get(path, openapi_extra=documents.LIST_FILES)
    async def list_files(request: Request) -> Response:
        page, purpose = file_endpoint.read_file_page(request.query_params), request.query_params.get("purpose")
        list_own = partial(file_endpoint.list_files, exchange_of(request), page, purpose, batches)
        return await list_together(request, batches, page, list_own)

    @router.get(path + "/{file_id}", openapi_extra=documents.FIND_FILE)
    async def find_file(request: Request, file_id: str) -> Response:
        if (answer := await pass_on(request, batches, file_id, f"{path}/{file_id}")) is not None:
            return answer
        return json_response(await file_endpoint.find_file(exchange_of(request), file_id, batches))

    @router.delete(path + "/{file_id}", openapi_extra=documents.DELETE_FILE)
    async def delete_file(request: Request, file_id: str) -> Response:
        if (answer := await pass_on(request, batches, file_id, f"{path}/{file_id}")) is not None:
            return answer
        return json_response(await file_endpoint.delete_file(exchange_of(request), file_id, batches))

    @router.get(path + "/{file_id}/content", openapi_extra=documents.READ_FILE)
    async def read_file(request: Request, file_id: str) -> Response:
        if (answer := await pass_on(request, batches, file_id, f"{path}/{file_id}/content")) is not None:
            return answer
        content = await file_endpoint.find_content(exchange_of(request), file_id, batches)
        kind = "application/octet-stream"
        return StreamingResponse(file_endpoint.read_content(content), headers=content.headers, media_type=kind)


def _add_synchronous_route(router: APIRouter, batches: Batches, service: Service) -> None:
    handler, maximum = batches.handlers[completions.PATH], batches.config.max_choices_per_request

    @router.post(synchronous.PATH, openapi_extra=documents.SYNCHRONOUS_BATCH)
    async def answer_all(request: Request) -> Response:
        answers = await synchronous.answer_all(exchange_of(request), service, handler, maximum)
        return Response(answers, media_type="application/json")


def _add_batch_routes(router: APIRouter, batches: Batches, service: Service) -> None:
    path = batch_endpoint.PATH

    @router.post(path, openapi_extra=documents.CREATE_BATCH)
    async def create_batch(request: Request) -> Response:
        exchange = exchange_of(request)
        wanted = await batch_endpoint.read_batch(exchange, service, batches)
        body = msgspec.json.encode(wanted)
        if (answer := await pass_on(request, batches, wanted.input_file_id, path, body)) is not None:
            return answer
        return json_response(await batch_endpoint.create_batch(exchange, wanted, batches))

    @router.get(path, openapi_extra=documents.LIST_BATCHES)
    async def list_batches(request: Request) -> Response:
        page = batch_endpoint.read_batch_page(request.query_params)
        list_own = partial(batch_endpoint.list_batches, exchange_of(request), page, batches)
        return await list_together(request, batches, page, list_own)

    @router.get(path + "/{batch_id}", openapi_extra=documents.FIND_BATCH)
    async def find_batch(request: Request, batch_id: str) -> Response:
        if (answer := await pass_on(request, batches, batch_id, f"{path}/{batch_id}")) is not None:
            return answer
        return json_response(await batch_endpoint.find_batch(exchange_of(request), batch_id, batches))

    @router.post(path + "/{batch_id}/cancel", openapi_extra=documents.CANCEL_BATCH)
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        if (answer := await pass_on(request, batches, batch_id, f"{path}/{batch_id}/cancel")) is not None:
            return answer
        return json_response(await batch_endpoint.cancel_batch(exchange_of(request), batch_id, batches))
