"""The FastAPI application: the routes, the key check under /v1, and errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from toka_engine.server import openapi
from toka_engine.server.batch_routes import add_batch_routes
from toka_engine.server.batches.service import Batches
from toka_engine.server.elsewhere import find_instead, find_meant
from toka_engine.server.endpoints import batches as batch_endpoint
from toka_engine.server.endpoints import (
    chat,
    completions,
    files,
    kept_responses,
    messages,
    models,
    probes,
    responses,
    synchronous,
    tokenize,
)
from toka_engine.server.errors import ApiError, invalid
from toka_engine.server.exchange import Exchange, Handler
from toka_engine.server.failures import answer_failure
from toka_engine.server.keys.check import KeyCheck
from toka_engine.server.metrics import CONTENT_TYPE
from toka_engine.server.route_helpers import exchange_of, json_response
from toka_engine.server.service import Service
from toka_engine.version import __version__

DOCUMENT_PATH = "/openapi.json"
PAGE_PATH = "/docs"
_GENERATING_PATHS = (
    *(completions.PATH, chat.PATH, responses.PATH, responses.COUNT_PATH),
    *(messages.PATH, messages.COUNT_PATH),
)
KNOWN_PATHS = (
    *(*_GENERATING_PATHS, models.PATH, *tokenize.PATHS, files.PATH, batch_endpoint.PATH, synchronous.PATH),
    *(*sorted(probes.PATHS), probes.VERSION_PATH, probes.LOAD_PATH, DOCUMENT_PATH, PAGE_PATH),
)
"""The paths of all routes without a parameter."""
LIMITED_PATHS = (*_GENERATING_PATHS, synchronous.PATH)
"""The paths whose POSTs the limits of API keys bound."""


class Answered(Response):
    """A response that its endpoint has written already, through the exchange."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        return


def generating_handlers(service: Service) -> dict[str, Handler]:
    """Return the handlers of the POSTs that generate, by path."""
    anthropic, items = messages.Messages(service), responses.Responses(service)
    return {
        completions.PATH: completions.Completions(service).answer,
        chat.PATH: chat.ChatCompletions(service).answer,
        responses.PATH: items.answer,
        responses.COUNT_PATH: items.count,
        messages.PATH: anthropic.answer,
        messages.COUNT_PATH: anthropic.count,
    }


def make_application(
    service: Service,
    key_check: KeyCheck,
    handlers: Mapping[str, Handler],
    batches: Batches,
    further: Sequence[APIRouter] = (),
) -> FastAPI:
    """Return the application; `handlers` answer the POSTs that generate. The routes of `further` check keys
    themselves.
    """
    application = FastAPI(
        title="toka",
        description="OpenAI-compatible completions and chat of a throughput-first LLM engine.",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    application.include_router(_v1_router(service, key_check, handlers, batches))
    application.include_router(_open_router(service))
    application.include_router(_documents_router(application))
    for router in further:
        application.include_router(router)
    _handle_errors(application, service, key_check)
    return application


def _v1_router(service: Service, key_check: KeyCheck, handlers: Mapping[str, Handler], batches: Batches) -> APIRouter:
    async def check_key(request: Request) -> None:
        key_check.check(exchange_of(request))

    router = APIRouter(dependencies=[Depends(check_key)], default_response_class=Response)

    def add_generating(path: str, operation: dict[str, Any]) -> None:
        async def generate(request: Request) -> Response:
            await handlers[path](exchange_of(request))
            return Answered()

        router.add_api_route(path, generate, methods=["POST"], openapi_extra=operation)

    add_generating(completions.PATH, openapi.COMPLETIONS)
    add_generating(chat.PATH, openapi.CHAT)
    add_generating(responses.PATH, openapi.RESPONSES)
    add_generating(responses.COUNT_PATH, openapi.INPUT_TOKENS)
    add_generating(messages.PATH, openapi.MESSAGES)
    add_generating(messages.COUNT_PATH, openapi.COUNT_TOKENS)
    _add_kept_responses(router, service)

    _add_tokenizing(router, tokenize.Tokenizing(service))

    @router.get(models.PATH, openapi_extra=openapi.MODELS)
    async def list_models() -> Response:
        return json_response(models.list_models(service))

    @router.get(models.PATH + "/{name:path}", openapi_extra=openapi.MODEL)
    async def find_model(name: str) -> Response:
        if not name:
            raise HTTPException(404)
        return json_response(models.find_model(service, name))

    add_batch_routes(router, batches, service)
    return router


def _add_kept_responses(router: APIRouter, service: Service) -> None:
    path = responses.PATH + "/{response_id}"

    @router.get(path, openapi_extra=openapi.RESPONSE)
    async def find_response(request: Request, response_id: str) -> Response:
        return Response(
            kept_responses.find_response(service, exchange_of(request), response_id), media_type="application/json"
        )

    @router.delete(path, openapi_extra=openapi.DELETE_RESPONSE)
    async def delete_response(request: Request, response_id: str) -> Response:
        return json_response(kept_responses.delete_response(service, exchange_of(request), response_id))

    @router.get(path + "/input_items", openapi_extra=openapi.RESPONSE_ITEMS)
    async def list_input_items(request: Request, response_id: str) -> Response:
        return json_response(
            kept_responses.list_input_items(service, exchange_of(request), response_id, request.query_params)
        )


def _add_tokenizing(router: APIRouter, tokenizing: tokenize.Tokenizing) -> None:
    """Add the routes that ask the tokenizer."""

    def add(path: str, handler: Handler, method: str, operation: dict[str, Any]) -> None:
        async def answer(request: Request) -> Response:
            await handler(exchange_of(request))
            return Answered()

        router.add_api_route(path, answer, methods=[method], openapi_extra=operation)

    add(tokenize.TOKENIZE_PATH, tokenizing.tokenize, "POST", openapi.TOKENIZE)
    add(tokenize.DETOKENIZE_PATH, tokenizing.detokenize, "POST", openapi.DETOKENIZE)
    add(tokenize.INFO_PATH, tokenizing.describe, "GET", openapi.TOKENIZER_INFO)


def _open_router(service: Service) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.get("/ping", openapi_extra=openapi.PING)
    async def ping() -> Response:
        return json_response(probes.Pong())

    @router.get("/livez", openapi_extra=openapi.LIVEZ)
    async def livez() -> Response:
        return json_response(probes.Alive())

    @router.get("/readyz", openapi_extra=openapi.READYZ)
    async def readyz() -> Response:
        readiness = probes.check_readiness(service)
        return json_response(readiness, 200 if readiness.ready else 503)

    @router.get("/health", openapi_extra=openapi.HEALTH)
    async def health() -> Response:
        return Response(status_code=200 if service.health.is_ready else 503)

    @router.get(probes.VERSION_PATH, openapi_extra=openapi.VERSION)
    async def version() -> Response:
        return json_response(probes.Version())

    @router.get(probes.LOAD_PATH, openapi_extra=openapi.LOAD)
    async def load() -> Response:
        return json_response(probes.Load(service.streams.num_generations))

    @router.get("/metrics", openapi_extra=openapi.METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    return router


def _documents_router(application: FastAPI) -> APIRouter:
    router = APIRouter(default_response_class=Response, include_in_schema=False)

    @router.get(DOCUMENT_PATH)
    async def document() -> Response:
        return Response(openapi.encoded_document(application), media_type="application/json")

    @router.get(PAGE_PATH)
    async def page() -> Response:
        return HTMLResponse(openapi.make_page(application), headers={"content-security-policy": openapi.PAGE_POLICY})

    return router


# ---------------------------------------------------------------- errors


def _handle_errors(application: FastAPI, service: Service, key_check: KeyCheck) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        await answer_failure(exchange_of(request), error, service.metrics)
        return Answered()

    async def answer_http(request: Request, error: Exception) -> Response:
        exchange = exchange_of(request)
        try:
            if exchange.path == "/v1" or exchange.path.startswith("/v1/"):
                key_check.check(exchange)
            raise _translate(error, exchange)
        except ApiError as translated:
            return await answer(request, translated)

    async def answer_invalid(request: Request, error: Exception) -> Response:
        return await answer(request, _translate_invalid(error))

    application.add_exception_handler(RequestValidationError, answer_invalid)
    application.add_exception_handler(HTTPException, answer_http)
    application.add_exception_handler(Exception, answer)


def _translate(error: Exception, exchange: Exchange) -> ApiError:
    """Return the framework's own refusal in OpenAI's shape: a path that is not served, a method that it lacks."""
    if not isinstance(error, HTTPException):
        raise AssertionError("a handler got an exception that it is not registered for") from error
    path = exchange.path
    if error.status_code in (404, 405) and (instead := find_instead(path)):
        return ApiError(404, f"There is no {path[:200]}: {instead}.", code="not_supported")
    if error.status_code == 405 and path != models.PATH + "/":
        allowed = (error.headers or {}).get("Allow", "").replace("GET", "GET, HEAD")
        message = f"{path[:200]} takes {allowed}, not {exchange.method}."
        return ApiError(405, message, code="method_not_allowed", headers=((b"allow", allowed.encode()),))
    if error.status_code in (404, 405):
        meant = find_meant(path, KNOWN_PATHS)
        advice = f" Did you mean {meant}?" if meant else ""
        return ApiError(404, f"There is no {path[:200]}.{advice}", code="not_found")
    return ApiError(error.status_code, str(error.detail), code="http_error")


def _translate_invalid(error: Exception) -> ApiError:
    """Return a 400 that names the first field which the framework refused."""
    if not isinstance(error, RequestValidationError):
        raise AssertionError("a handler got an exception that it is not registered for") from error
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return invalid(param, f"Invalid value for '{param}': {first['msg']}.", "invalid_value")
