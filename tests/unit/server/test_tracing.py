"""OpenTelemetry spans, as a real collector of OTLP over HTTP gets them from a running server."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from toka_engine.control_messages import Drained
from toka_engine.errors import ConfigError
from toka_engine.messages import Submit
from toka_engine.server.tracing import make_tracing

from tests.engine_process import WAIT_S
from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import MODEL, RunningServer, ScriptedManager, running_server, speak, start

_TRACE, _CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
_SECRET = "a prompt that nobody else may read"
_JSON = {"content-type": "application/json"}


class Collector:
    """Takes spans; `wait_for` returns those that fit, once there are so many."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[Any] = []
        self.raw = b""
        self._changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def take(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert path == "/v1/traces"
        message = ExportTraceServiceRequest.FromString(body)
        with self._changed:
            self.raw += body
            for group in message.resource_spans:
                self.resources.append(group.resource)
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
            self._changed.notify_all()

    def wait_for(self, request_id: str) -> Any:
        """Return the span of the request with this id."""

        def find() -> Any:
            return next((s for s in self.spans if attributes_of(s).get("toka.request_id") == request_id), None)

        with self._changed:
            assert self._changed.wait_for(lambda: find() is not None, WAIT_S), "no span came"
            return find()

    def children_of(self, span: Any) -> list[Any]:
        """Return those in the order of their starts. They end before their parent, so they have come with it."""
        found = [each for each in self.spans if each.parent_span_id == span.span_id]
        return sorted(found, key=lambda each: each.start_time_unix_nano)

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


def attributes_of(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    own = Collector()
    yield own
    own.close()


@pytest.fixture(scope="module")
def traced_process(tokenizer_dir: Path, collector: Collector) -> Iterator[RunningServer]:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "20",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=tests",
    }
    with running_server(tokenizer_dir, env=environment) as process:
        yield process


@pytest.fixture
def traced(traced_process: RunningServer, sentence_ids: list[int]) -> RunningServer:
    manager = traced_process.manager

    def answer(submit: Submit) -> None:
        manager.send(start(submit, 1))
        speak(manager, submit, sentence_ids)

    manager.on_submit = answer
    return traced_process


def ask(server: RunningServer, path: str, body: dict[str, Any], **headers: str) -> str:
    """Return the request's id."""
    _, sent, _ = server.request("POST", path, json.dumps(body).encode(), {**_JSON, **headers})
    return sent["x-request-id"]


def test_a_streamed_request_has_a_span_below_its_callers_and_three_below_it(
    traced: RunningServer, collector: Collector
) -> None:
    body = chat_body(stream=True, messages=[{"role": "user", "content": _SECRET}])
    span = collector.wait_for(ask(traced, "/v1/chat/completions", body, traceparent=f"00-{_TRACE}-{_CALLER}-01"))
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (_TRACE, _CALLER)
    assert span.name == f"chat {MODEL}"
    attributes = attributes_of(span)
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == MODEL
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.usage.input_tokens"] > 10
    assert attributes["gen_ai.usage.output_tokens"] > 5
    assert attributes["toka.usage.cached_tokens"] == 1
    children = collector.children_of(span)
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    assert {child.trace_id.hex() for child in children} == {_TRACE}
    bounds = [(child.start_time_unix_nano, child.end_time_unix_nano) for child in children]
    assert span.start_time_unix_nano <= bounds[0][0]
    assert [end for _, end in bounds[:-1]] == [begin for begin, _ in bounds[1:]]
    assert bounds[-1][1] == span.end_time_unix_nano
    (resource,) = {str(resource) for resource in collector.resources}
    assert "toka" in resource
    assert "deployment.environment" in resource


def test_a_whole_answer_has_its_queue_and_its_generation(traced: RunningServer, collector: Collector) -> None:
    span = collector.wait_for(ask(traced, "/v1/completions", completion_body(prompt=_SECRET)))
    assert not span.parent_span_id
    assert [child.name for child in collector.children_of(span)] == ["queue", "generate"]
    assert attributes_of(span)["gen_ai.operation.name"] == "text_completion"


def test_a_failed_request_says_so_and_has_the_phases_that_it_reached(
    traced: RunningServer, collector: Collector
) -> None:
    refused = collector.wait_for(ask(traced, "/v1/completions", completion_body(temperature=9)))
    assert refused.status.code == 2
    assert collector.children_of(refused) == []
    traced.manager.on_submit = lambda submit: None
    late = collector.wait_for(ask(traced, "/v1/completions", completion_body(timeout_s=0.1)))
    assert (late.status.code, late.status.message) == (2, "deadline_exceeded")
    assert attributes_of(late)["http.response.status_code"] == 504
    assert [child.name for child in collector.children_of(late)] == ["queue"]


def test_no_text_leaves_the_server(traced: RunningServer, collector: Collector) -> None:
    for stream in (False, True):
        collector.wait_for(ask(traced, "/v1/completions", completion_body(prompt=_SECRET, stream=stream)))
    assert _SECRET.encode() not in collector.raw
    assert SENTENCE[:20].encode() not in collector.raw


def test_a_caller_that_does_not_sample_gets_no_spans(traced: RunningServer, collector: Collector) -> None:
    unsampled = ask(traced, "/v1/completions", completion_body(), traceparent=f"00-{_TRACE}-{_CALLER}-00")
    collector.wait_for(ask(traced, "/v1/completions", completion_body()))
    assert unsampled not in {attributes_of(span).get("toka.request_id") for span in collector.spans}


def test_other_paths_have_no_spans(traced: RunningServer, collector: Collector) -> None:
    for path in ("/metrics", "/v1/models", "/ping"):
        traced.request("GET", path)
    collector.wait_for(ask(traced, "/v1/completions", completion_body()))
    assert {attributes_of(span).get("url.path") for span in collector.spans} <= {
        None, "/v1/completions", "/v1/chat/completions",
    }  # fmt: skip


def test_a_drain_sends_what_is_left(tokenizer_dir: Path, collector: Collector, sentence_ids: list[int]) -> None:
    environment = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces", "OTEL_SERVICE_NAME": "mine"}

    def answer(manager: ScriptedManager, submit: Submit) -> None:
        speak(manager, submit, sentence_ids)

    with running_server(tokenizer_dir, env=environment, answer=answer, drain_endpoint_delay_s=0.0) as server:
        request_id = ask(server, "/v1/completions", completion_body())
        server.drain()
        server.wait_control(Drained)
    collector.wait_for(request_id)
    assert any("mine" in str(resource) for resource in collector.resources)


def test_a_collector_that_is_not_there_stops_nothing(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "10"}
    with running_server(tokenizer_dir, env=environment) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        for _ in range(5):
            assert server.post("/v1/completions", completion_body())[0] == 200


def test_a_collector_that_never_answers_holds_up_no_drain(tokenizer_dir: Path, sentence_ids: list[int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_TIMEOUT": "3600"}
        with running_server(tokenizer_dir, env=environment, drain_endpoint_delay_s=0.0) as server:
            server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
            assert server.post("/v1/completions", completion_body())[0] == 200
            server.drain()
            server.wait_control(Drained)
            assert server.process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_unasked_for_it_is_not_even_loaded(environment: dict[str, str]) -> None:
    code = (
        "import sys\nfrom toka_engine.server.tracing import make_tracing\n"
        f"assert make_tracing({environment!r}) is None\n"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extra_the_start_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces.*toka\[traces\]"):
        make_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"})


def test_another_protocol_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL=grpc is not supported"):
        make_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_another_exporter_is_refused_by_name_and_an_empty_one_is_none_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER=console is not supported"):
        make_tracing({**asked, "OTEL_TRACES_EXPORTER": "console"})
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"toka\[traces\]"):  # as without the variable
        make_tracing({**asked, "OTEL_TRACES_EXPORTER": ""})
