"""OpenTelemetry spans of requests, sent over OTLP by HTTP where the standard environment variables ask for them.

A request has a span, below that of the caller (W3C traceparent), and one each for its time in the queue, its prefill
and its decode, as far as they are known. They are made when the request is over, out of stamps that are taken anyway;
the SDK sends them from a thread of its own. No text of prompts or answers. The SDK is an optional extra and is imported
here alone, when it is asked for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toka_engine.errors import ConfigError
from toka_engine.server.exchange import Exchange
from toka_engine.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("toka.server")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_FLUSH_S = 2.0
_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}
"""The endpoints that are traced, with what the semantic conventions for generative AI call them."""


def make_tracing(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return what sends spans; None where `environment` does not ask for it. Raises ConfigError."""
    endpoint = next((name for name in _ENDPOINTS if environment.get(name)), None)
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if endpoint is None or is_off or exporter == "none":
        return None
    if exporter != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER={exporter[:100]} is not supported: it must be otlp or none")
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol[:100]} is not supported: it must be http/protobuf")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{endpoint} asks for traces, which need the extra `traces` (pip install 'toka[traces]'): {error}"
        ) from error
    named = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "toka"}
    resource = Resource.create({**named, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # that waits as long as `flush` may not
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    logger.info("event=tracing endpoint=%s", endpoint)
    return Tracing(provider)


class Tracing:
    """Records requests that are over."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("toka", __version__)
        self._extract = TraceContextTextMapPropagator().extract
        self._in_context = set_span_in_context
        self._server_kind = SpanKind.SERVER
        self._error_status = StatusCode.ERROR

    def record(self, exchange: Exchange) -> None:
        """Make the spans of a request that is over, if it is one that generates."""
        operation = _OPERATIONS.get(exchange.path)
        if operation is None or exchange.method != "POST":
            return
        now_s = time.monotonic()
        epoch_ns = time.time_ns() - int(now_s * 1e9)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers}
        span = self._tracer.start_span(
            f"{operation} {exchange.model}".rstrip(),
            context=self._extract(headers),
            kind=self._server_kind,
            attributes=_attributes_of(exchange, operation),
            start_time=epoch_ns + int(exchange.started_s * 1e9),
        )
        if exchange.status >= 500 or exchange.failure_code is not None:
            span.set_status(self._error_status, exchange.failure_code)
        if span.is_recording():
            context = self._in_context(span)
            for name, start_s, end_s in _phases_of(exchange, now_s):
                child = self._tracer.start_span(name, context=context, start_time=epoch_ns + int(start_s * 1e9))
                child.end(epoch_ns + int(end_s * 1e9))
        span.end(epoch_ns + int(now_s * 1e9))

    def flush(self) -> None:
        """Send what is left; blocks for a moment at most. The SDK's own limit of time is without effect: where nobody
        answers, it would try for ten seconds with each batch of spans.
        """
        sender = threading.Thread(target=self._provider.force_flush, name="traces", daemon=True)
        sender.start()
        sender.join(_FLUSH_S)


def _attributes_of(exchange: Exchange, operation: str) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "toka",
        "http.request.method": exchange.method,
        "url.path": exchange.path,
        "http.response.status_code": exchange.status,
        "toka.request_id": exchange.request_id.decode("latin-1"),
    }
    if exchange.model:
        attributes["gen_ai.request.model"] = exchange.model
    if exchange.usage is not None:
        attributes["gen_ai.usage.input_tokens"] = exchange.usage.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = exchange.usage.completion_tokens
        attributes["toka.usage.cached_tokens"] = exchange.usage.prompt_tokens_details.cached_tokens
    if exchange.first_token_s is not None:
        attributes["toka.time_to_first_token_s"] = exchange.first_token_s
    return attributes


def _phases_of(exchange: Exchange, end_s: float) -> list[tuple[str, float, float]]:
    """Return names, starts and ends. A whole answer does not tell its first token: its phase is `generate`."""
    times = exchange.times
    if times is None:
        return []
    if times.admitted_s is None:
        return [("queue", times.submitted_s, end_s)]
    phases = [("queue", times.submitted_s, times.admitted_s)]
    if exchange.first_token_s is None:
        return [*phases, ("generate", times.admitted_s, end_s)]
    first_s = max(exchange.started_s + exchange.first_token_s, times.admitted_s)
    return [*phases, ("prefill", times.admitted_s, first_s), ("decode", first_s, end_s)]
