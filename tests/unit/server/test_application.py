"""The FastAPI application: the same answers with and without the fast path, its OpenAPI document and its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import openapi_spec_validator
import pytest
from toka_engine.messages import Submit
from toka_engine.server.chat_plan import ChatRequest
from toka_engine.server.endpoints.completions import CompletionRequest
from toka_engine.server.endpoints.responses import ResponsesRequest
from toka_engine.server.endpoints.tokenize import DetokenizeRequest, TokenizeRequest

from tests.unit.server.conftest import chat_body, completion_body
from tests.unit.server.harness import MODEL, RunningServer, each, end, running_server, speak, streams_of

_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"
_RESPONSES = "/v1/responses"
_KEY = "sk-key"


def _start(tokenizer_dir: Path, sentence_ids: list[int], log: Path, **settings: Any) -> Iterator[RunningServer]:
    with (
        log.open("wb") as file,
        running_server(
            tokenizer_dir, env={"TOKA_API_KEY": _KEY}, stderr=file, max_body_bytes=100_000, **settings
        ) as server,
    ):
        manager = server.manager
        no_token = 10**7

        def answer(submit: Submit) -> None:
            ids = [no_token] if submit.max_tokens == 13 else sentence_ids
            if not submit.deliver_each:
                speak(manager, submit, ids)
                return
            streams = streams_of(submit)
            tokens = each(streams * len(ids), [token for token in ids for _ in streams])
            ends = end(streams, len(ids) + 1)
            changes = {name: getattr(ends, name) for name in ends.__struct_fields__ if name.startswith("ended")}
            manager.send(msgspec.structs.replace(tokens, **changes))  # one message: how events are cut is no chance

        manager.on_submit = answer
        yield server


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard error of the server without the fast path."""
    return tmp_path_factory.mktemp("logs") / "log"


@pytest.fixture(scope="module")
def fast(tokenizer_dir: Path, sentence_ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Any:
    yield from _start(tokenizer_dir, sentence_ids, tmp_path_factory.mktemp("logs") / "log")


@pytest.fixture(scope="module")
def routed(tokenizer_dir: Path, sentence_ids: list[int], log: Path) -> Any:
    yield from _start(tokenizer_dir, sentence_ids, log, http_fast_path=False)


def _exchange(server: RunningServer, request: bytes) -> bytes:
    """Send `request`, and another that closes the connection; return all that comes, without what differs each time."""
    with server.connect() as sock:
        sock.sendall(request + b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    for pattern in (rb"date: [^\r]*", rb"req-[0-9a-f-]+", rb"cmpl-[0-9a-f]{24}", rb'"created":\d+'):
        received = re.sub(pattern, b"_", received)
    return received


def _request(path: str, body: bytes, extra: str = "", *, method: str = "POST", version: str = "1.1") -> bytes:
    head = f"{method} {path} HTTP/{version}\r\nhost: x\r\n{extra}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


_AUTHORIZED = f"authorization: Bearer {_KEY}\r\ncontent-type: application/json\r\n"
_BODIES: dict[str, dict[str, Any]] = {
    "whole": {},
    "logprobs": {"logprobs": True},
    "several": {"n": 3, "stop": ["Paris"]},
    "stream": {"stream": True},
    "stream-usage": {"stream": True, "n": 2, "stream_options": {"include_usage": True}},
    "unknown-model": {"model": "gpt-4"},
    "unknown-field": {"foo": 1},
    "unsupported": {"logit_bias": {"5": 1}},
    "out-of-range": {"temperature": 3},
    "too-long": {"max_tokens": 5000},
    "defect": {"max_tokens": 13},
    "defect-in-stream": {"max_tokens": 13, "stream": True},
    "too-large": {"user": "x" * 200_000},
}


def _requests() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path, make in ((_COMPLETIONS, completion_body), (_CHAT, chat_body)):
        name = path.split("/")[2]
        for case, fields in _BODIES.items():
            logprobs = {"logprobs": 2} if path == _COMPLETIONS and "logprobs" in fields else {}
            body = json.dumps({**make(**fields), **logprobs}).encode()
            found[f"{name}-{case}"] = _request(path, body, _AUTHORIZED)
        plain = json.dumps(make()).encode()
        found[f"{name}-http-1.0"] = _request(path, json.dumps(make(stream=True)).encode(), _AUTHORIZED, version="1.0")
        found[f"{name}-no-json"] = _request(path, b"{", _AUTHORIZED)
        found[f"{name}-no-key"] = _request(path, plain, "content-type: application/json\r\n")
        found[f"{name}-wrong-key"] = _request(path, plain, "authorization: Bearer x\r\n")
        found[f"{name}-no-content-type"] = _request(path, plain, f"authorization: Bearer {_KEY}\r\n")
        found[f"{name}-gzip"] = _request(path, plain, _AUTHORIZED + "content-encoding: gzip\r\n")
        found[f"{name}-request-id"] = _request(path, plain, _AUTHORIZED + "x-request-id: mine\r\n")
        found[f"{name}-query"] = _request(path + "?a=b", plain, _AUTHORIZED)
        found[f"{name}-put"] = _request(path, plain, _AUTHORIZED, method="PUT")
        found[f"{name}-head"] = _request(path, b"", _AUTHORIZED, method="HEAD")
        found[f"{name}-slash"] = _request(path + "/", plain, _AUTHORIZED)
    return found


@pytest.mark.parametrize("request_bytes", _requests().values(), ids=_requests())
def test_the_fast_path_changes_no_byte_of_an_answer(
    fast: RunningServer, routed: RunningServer, request_bytes: bytes
) -> None:
    with_fast_path, without = _exchange(fast, request_bytes), _exchange(routed, request_bytes)
    assert with_fast_path == without
    assert with_fast_path.startswith(b"HTTP/1.1 ")


def test_a_defect_behind_the_router_is_logged_once_and_counted(routed: RunningServer, log: Path) -> None:
    before = log.read_text().count("event=request_failed")
    answer = _exchange(routed, _request(_COMPLETIONS, json.dumps(completion_body(max_tokens=13)).encode(), _AUTHORIZED))
    assert answer.startswith(b"HTTP/1.1 500")
    written = log.read_text()
    assert written.count("event=request_failed") == before + 1
    assert "Exception in ASGI application" not in written
    metrics = routed.request("GET", "/metrics")[2].decode()
    assert 'toka_requests_total{endpoint="/v1/completions",status="500"}' in metrics


# ---------------------------------------------------------------- the document


@pytest.fixture(scope="module")
def document(fast: RunningServer) -> dict[str, Any]:
    status, headers, body = fast.request("GET", "/openapi.json")  # without a key
    assert (status, headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = json.loads(body)
    return found


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    openapi_spec_validator.validate(document)


def test_the_document_names_every_route_and_its_routes_are_served(
    fast: RunningServer, document: dict[str, Any]
) -> None:
    assert set(document["paths"]) == {
        *(_COMPLETIONS, _CHAT, "/v1/models", "/v1/models/{name}", "/ping", "/livez", "/readyz", "/health", "/metrics"),
        *("/version", "/load", "/tokenize", "/detokenize", "/tokenizer_info"),
        *("/v1/messages", "/v1/messages/count_tokens"),
        *(_RESPONSES, f"{_RESPONSES}/{{response_id}}", f"{_RESPONSES}/{{response_id}}/input_items"),
        f"{_RESPONSES}/input_tokens",
        *("/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"),
        "/custom/synchronous-batch-completions",
        *("/v1/batches", "/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel"),
    }
    for path, operations in document["paths"].items():
        for method in operations:
            status, _, _ = fast.request(method.upper(), path.replace("{name}", MODEL))
            assert str(status) in operations[method]["responses"]


def test_the_document_names_every_field_of_a_request(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for struct in (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest):
        assert set(schemas[struct.__name__]["properties"]) == set(struct.__struct_fields__)
        assert schemas[struct.__name__]["additionalProperties"] is False


def _assert_conforms(document: dict[str, Any], name: str, value: Any) -> None:
    schema = {**document, "$ref": f"#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema).validate(value)


_ANSWERS = {
    "completion": (_COMPLETIONS, completion_body(logprobs=2, n=2), "CompletionRequest", "Completion"),
    "ids": (_COMPLETIONS, completion_body(prompt=[[5, 6], [7]], stop="x"), "CompletionRequest", "Completion"),
    "chat": (_CHAT, chat_body(logprobs=True, top_logprobs=2), "ChatRequest", "ChatCompletion"),
    "response": (_RESPONSES, {"model": MODEL, "input": "Hello", "tools": []}, "ResponsesRequest", "Response"),
    "token-ids": (_CHAT, chat_body(return_token_ids=True), "ChatRequest", "ChatCompletion"),
    "tokenize": ("/tokenize", {"prompt": "Hi", "return_token_strs": True}, "TokenizeRequest", "TokenizeAnswer"),
    "detokenize": ("/detokenize", {"tokens": [5, 6]}, "DetokenizeRequest", "DetokenizeAnswer"),
    "error": (_CHAT, chat_body(n=0), "ChatRequest", "ErrorAnswer"),
}


@pytest.mark.parametrize(("path", "body", "request_name", "answer_name"), _ANSWERS.values(), ids=_ANSWERS)
def test_requests_and_answers_are_what_the_document_says(
    fast: RunningServer, document: dict[str, Any], path: str, body: Any, request_name: str, answer_name: str
) -> None:
    _assert_conforms(document, request_name, body)
    _, answer = fast.post(path, body, {"authorization": f"Bearer {_KEY}"})
    _assert_conforms(document, answer_name, answer)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/models", "ModelList"),
        (f"/v1/models/{MODEL}", "ModelCard"),
        ("/ping", "Pong"),
        ("/livez", "Alive"),
        ("/readyz", "Readiness"),
        ("/version", "Version"),
        ("/load", "Load"),
        ("/tokenizer_info", "TokenizerInfo"),
        ("/nothing", "ErrorAnswer"),
    ],
)
def test_what_is_read_is_what_the_document_says(
    fast: RunningServer, document: dict[str, Any], path: str, name: str
) -> None:
    answer = fast.request("GET", path, None, {"authorization": f"Bearer {_KEY}"})[2]
    _assert_conforms(document, name, json.loads(answer))


# ---------------------------------------------------------------- the page


def test_the_page_shows_every_path_and_field_and_loads_nothing(fast: RunningServer, document: dict[str, Any]) -> None:
    status, headers, body = fast.request("GET", "/docs")  # without a key
    page = body.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"(?i)https?://|<script|<link|<img|src=|@import|url\(", page)
    for path in document["paths"]:
        assert path in page
    for schema in document["components"]["schemas"].values():
        for field in schema["properties"]:
            assert f"<code>{field}</code>" in page


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_the_documents_answer_head_and_refuse_a_post(fast: RunningServer, path: str) -> None:
    assert fast.request("HEAD", path)[::2] == (200, b"")
    status, headers, _ = fast.request("POST", path)
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert headers["x-request-id"]
