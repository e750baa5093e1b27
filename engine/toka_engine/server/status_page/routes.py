"""The routes of the status page: the page at `/`, and `/status`, the part of it that changes and may need a key."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request, Response

from toka_engine.server.batches.service import Batches
from toka_engine.server.endpoints.probes import PAGE_CONTENT_PATH
from toka_engine.server.keys.check import KeyCheck
from toka_engine.server.route_helpers import exchange_of
from toka_engine.server.service import Service
from toka_engine.server.status_page.content import gather, read_state
from toka_engine.server.status_page.pages import render_content, render_page
from toka_engine.server.status_page.samples import LoadSamples

PATH = "/"
_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HTML = "text/html; charset=utf-8"


def page_router(service: Service, key_check: KeyCheck, batches: Batches, samples: LoadSamples) -> APIRouter:
    """Return the routes. The page shows nothing that a key guards; its script asks for that with the reader's key."""
    router = APIRouter(default_response_class=Response, include_in_schema=False)

    @router.get(PATH)
    async def page(request: Request) -> Response:
        content = None
        if not key_check.is_asking:
            content = await gather(service, samples, batches, exchange_of(request))
        nonce = secrets.token_urlsafe(16)
        policy = f"{_NOTHING}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"
        text = render_page(read_state(service), content, nonce)
        return Response(text, media_type=_HTML, headers={**_HEADERS, "content-security-policy": policy})

    @router.get(PAGE_CONTENT_PATH)
    async def content(request: Request) -> Response:
        exchange = exchange_of(request)
        key_check.check(exchange)
        text = render_content(await gather(service, samples, batches, exchange))
        return Response(text, media_type=_HTML, headers={**_HEADERS, "content-security-policy": _NOTHING})

    return router
