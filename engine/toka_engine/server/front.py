"""The ASGI application that uvicorn calls, in front of FastAPI's.

Owns: what is done around every request, whoever answers it (its exchange, metrics, log line, and a last resort for
errors), and the fast path: POSTs of completions and chat are handed to their endpoints here, because the way through
FastAPI takes some 110 us of CPU time, two thirds of what a request for one token takes otherwise. Answers are the same
with and without it. Not a middleware of Starlette's, which costs a task and a queue per request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from typing import Any

from prometheus_client import Counter

from toka_engine.server.access_log import log_request
from toka_engine.server.cors import Origins
from toka_engine.server.exchange import Exchange, Handler
from toka_engine.server.failures import answer_failure
from toka_engine.server.keys.check import KeyCheck
from toka_engine.server.metrics import Metrics
from toka_engine.server.tracing import Tracing


class Front:
    """Counts, answers and logs each request."""

    def __init__(
        self,
        application: Any,
        *,
        fast_paths: Mapping[str, Handler],
        known_paths: Collection[str],
        key_check: KeyCheck,
        origins: Origins,
        metrics: Metrics,
        logs_requests: bool,
        tracing: Tracing | None = None,
    ) -> None:
        """`fast_paths`: the POSTs that pass `application` by; `known_paths`: those that metrics name."""
        self._application = application
        self._fast_paths = fast_paths
        self._known_paths = frozenset(known_paths)
        self._key_check = key_check
        self._origins = origins
        self._metrics = metrics
        self._logs_requests = logs_requests
        self._counters: dict[tuple[str, int], Counter] = {}
        """The counters found so far: looking one up by its labels costs ten times as much as here."""
        self._tracing = tracing
        self._num_running = 0
        self._idle: asyncio.Event | None = None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        exchange = Exchange(scope, receive, send)
        exchange.further_headers = self._origins.headers(exchange.headers)
        self._num_running += 1
        try:
            preflight = self._origins.preflight(exchange.method, exchange.headers)
            handler = self._fast_paths.get(exchange.path)
            if preflight is not None:
                await exchange.answer(200, b"", b"text/plain", preflight)
            elif handler is not None and exchange.method == "POST":
                self._key_check.check(exchange)
                await handler(exchange)
            else:
                await self._application(_scope_for_routes(scope, exchange), receive, exchange.send)
        except Exception as error:  # the outermost point of one request: a defect of ours ends no other
            await answer_failure(exchange, error, self._metrics)
        finally:
            exchange.release()
            if exchange.holds_place and exchange.key is not None:
                exchange.key.leave()
            self._num_running -= 1
            if self._idle is not None and not self._num_running:
                self._idle.set()
            if exchange.path.startswith("/v1/"):
                self._count(exchange)
            if self._logs_requests:
                log_request(exchange)
            if self._tracing is not None:
                self._tracing.record(exchange)

    async def wait_idle(self) -> None:
        """Return when no request is being answered."""
        if self._num_running:
            self._idle = asyncio.Event()
            await self._idle.wait()

    def _count(self, exchange: Exchange) -> None:
        key = (exchange.path if exchange.path in self._known_paths else "other", exchange.status)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._metrics.requests.labels(key[0], str(key[1]))
        counter.inc()
        self._metrics.request_seconds.observe(time.monotonic() - exchange.started_s)


def _scope_for_routes(scope: dict[str, Any], exchange: Exchange) -> dict[str, Any]:
    """Return the scope that the router sees: a HEAD is routed as the GET whose body the connection leaves out."""
    scope["state"]["exchange"] = exchange
    return {**scope, "method": "GET"} if exchange.method == "HEAD" else scope
