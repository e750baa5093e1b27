"""The headers of every answer, whatever it answers, and the line that the log has of each request."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import INFO, MODEL, RunningServer, running_server, speak

_JSON = {"content-type": "application/json"}
_ASKED: dict[str, tuple[str, str, bytes | None, dict[str, str], int]] = {
    "whole": ("POST", "/v1/completions", json.dumps(completion_body()).encode(), _JSON, 200),
    "chat": ("POST", "/v1/chat/completions", json.dumps(chat_body()).encode(), _JSON, 200),
    "stream": ("POST", "/v1/completions", json.dumps(completion_body(stream=True)).encode(), _JSON, 200),
    "models": ("GET", "/v1/models", None, {}, 200),
    "model": ("GET", f"/v1/models/{MODEL}", None, {}, 200),
    "ping": ("GET", "/ping", None, {}, 200),
    "livez": ("GET", "/livez", None, {}, 200),
    "readyz": ("GET", "/readyz", None, {}, 200),
    "metrics": ("GET", "/metrics", None, {}, 200),
    "head": ("HEAD", "/v1/models", None, {}, 200),
    "bad-field": ("POST", "/v1/completions", b'{"model":"smollm2"}', _JSON, 400),
    "no-json": ("POST", "/v1/completions", b"hello", _JSON, 400),
    "no-path": ("GET", "/nothing", None, {}, 404),
    "no-path-under-v1": ("GET", "/v1/nothing", None, {}, 404),
    "no-method": ("DELETE", "/v1/models", None, {}, 405),
    "no-content-type": ("POST", "/v1/completions", b"{}", {}, 415),
    "too-large": ("POST", "/v1/completions", b"", {**_JSON, "content-length": str(10**9)}, 413),
}


@pytest.mark.parametrize(("method", "path", "body", "headers", "expected"), _ASKED.values(), ids=_ASKED)
def test_every_answer_has_a_date_and_a_request_id(
    server: RunningServer, method: str, path: str, body: bytes | None, headers: dict[str, str], expected: int
) -> None:
    status, sent, _ = server.request(method, path, body, headers)
    assert status == expected
    assert sent["x-request-id"]
    assert abs(email.utils.parsedate_to_datetime(sent["date"]).timestamp() - time.time()) < 60
    status, sent, _ = server.request(method, path, body, {**headers, "x-request-id": "my-own:id_1.2/x"})
    assert (status, sent["x-request-id"]) == (expected, "my-own:id_1.2/x")


def test_an_answer_without_a_key_has_a_request_id_too(tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir, env={"TOKA_API_KEY": "key"}) as server:
        status, headers, _ = server.request("GET", "/v1/models")
        assert status == 401
        assert headers["x-request-id"]
        assert headers["date"]


@pytest.mark.parametrize("own", ["", "two words", 'a"b', "a\tb", "x" * 129, "é", "a,b"])
def test_a_request_id_that_is_not_plain_is_replaced(server: RunningServer, own: str) -> None:
    _, headers, _ = server.request("GET", "/ping", None, {"x-request-id": own})
    assert headers["x-request-id"].startswith("req-")


def test_request_ids_differ_between_requests_and_processes(server: RunningServer, tokenizer_dir: Path) -> None:
    with running_server(tokenizer_dir) as other:
        ids = [each.request("GET", "/ping")[1]["x-request-id"] for each in (server, other) for _ in range(20)]
    assert len(set(ids)) == 40


def test_the_openai_client_shows_the_request_id(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hello", extra_headers={"x-request-id": "mine"})
    assert answer._request_id == "mine"


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/ping", "/livez", "/readyz", "/metrics"])
def test_head_is_answered_where_get_is_without_a_body(server: RunningServer, path: str) -> None:
    """The connection goes on: the length is the body's that a GET would have."""
    _, plain, body = server.request("GET", path)
    status, headers, nothing = server.request("HEAD", path)
    assert (status, nothing) == (200, b"")
    assert headers["content-type"] == plain["content-type"]
    assert abs(int(headers["content-length"]) - len(body)) < 100  # metrics change from request to request
    with server.connect() as sock:
        sock.sendall(f"HEAD {path} HTTP/1.1\r\nhost: x\r\n\r\nGET /ping HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        received = b""
        while b"pong" not in received:
            received += sock.recv(65536)
    assert received.count(b"HTTP/1.1 200") == 2


def test_models_state_their_context_length(server: RunningServer) -> None:
    card = json.loads(server.request("GET", "/v1/models")[2])["data"][0]
    assert card["max_model_len"] == INFO.max_request_tokens
    assert json.loads(server.request("GET", f"/v1/models/{MODEL}")[2])["max_model_len"] == INFO.max_request_tokens


# ---------------------------------------------------------------- the log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def logged_server(tokenizer_dir: Path, log: Path, sentence_ids: list[int]) -> Iterator[RunningServer]:
    with log.open("wb") as file, running_server(tokenizer_dir, stderr=file, env={"TOKA_API_KEY": "sk-key"}) as server:
        server.manager.on_submit = lambda submit: speak(server.manager, submit, sentence_ids)
        yield server


def _lines(log: Path, request_id: str) -> list[dict[str, str]]:
    """The fields of the lines about one request; waits for the first."""
    while not (lines := [line for line in log.read_text().splitlines() if f"request_id={request_id} " in line]):
        time.sleep(0.01)
    return [dict(field.partition("=")[::2] for field in line.split(" event=")[1].split()) for line in lines]


def test_the_log_has_a_line_per_request_without_text_or_key(logged_server: RunningServer, log: Path) -> None:
    key = {"authorization": "Bearer sk-key", "content-type": "application/json"}
    bodies: dict[str, Any] = {
        "whole": completion_body(prompt="a secret"),
        "streamed": completion_body(prompt="a secret", stream=True, n=2),
        "refused": completion_body(prompt="a secret", user="a secret", n=0),
    }
    for name, body in bodies.items():
        raw = json.dumps(body).encode()
        logged_server.request("POST", "/v1/completions?key=sk-key", raw, {**key, "x-request-id": name})
    logged_server.request("GET", "/v1/nothing", None, {**key, "x-request-id": "lost"})
    logged_server.request("GET", "/v1/models", None, {"authorization": "Bearer sk-other", "x-request-id": "denied"})
    ((whole,), (streamed,), (refused,), (lost,), (denied,)) = (
        _lines(log, name) for name in ("whole", "streamed", "refused", "lost", "denied")
    )
    assert (whole["path"], whole["method"], whole["status"]) == ("'/v1/completions'", "POST", "200")
    assert (whole["model"], whole["prompt_tokens"], streamed["model"]) == (f"'{MODEL}'", "2", f"'{MODEL}'")
    assert int(streamed["completion_tokens"]) == 2 * int(whole["completion_tokens"]) > 0
    assert float(streamed["seconds"]) >= float(streamed["first_token_s"]) >= 0
    assert (refused["status"], lost["status"], denied["status"]) == ("400", "404", "401")
    for secret in ("secret", SENTENCE[:10], "sk-key", "sk-other"):
        assert secret not in log.read_text()


def test_probes_leave_no_lines(logged_server: RunningServer, log: Path) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/ping"):
        logged_server.request("GET", path)
    logged_server.request("GET", "/v1/models", None, {"authorization": "Bearer sk-key", "x-request-id": "last"})
    _lines(log, "last")
    assert log.read_text().count("event=request ") == 1


def test_a_path_cannot_forge_a_line(logged_server: RunningServer, log: Path) -> None:
    logged_server.request("GET", "/x%0aevent=request%20request_id=forged%20status=200", None, {"x-request-id": "odd"})
    ((odd),) = _lines(log, "odd")
    assert odd["status"] == "404" or "forged" in odd["path"]
    assert not any(line.startswith("event=") for line in log.read_text().splitlines())


def test_access_log_f_leaves_no_lines(tokenizer_dir: Path, log: Path) -> None:
    with log.open("wb") as file, running_server(tokenizer_dir, stderr=file, access_log=False) as server:
        server.request("GET", "/v1/models")
        server.request("GET", "/v1/nothing")
        assert "event=request" not in log.read_text()


@pytest.mark.parametrize("logs", [True, False])
def test_what_is_refused_before_it_is_a_request_has_a_line_too(tokenizer_dir: Path, log: Path, logs: bool) -> None:
    with log.open("wb") as file, running_server(tokenizer_dir, stderr=file, access_log=logs) as server:
        with server.connect() as sock:
            sock.sendall(b"a secret\r\n\r\n")
            head = b"".join(iter(lambda: sock.recv(65536), b"")).partition(b"\r\n\r\n")[0].decode()
        request_id = head.partition("x-request-id: ")[2].partition("\r")[0]
        line = f"event=refused request_id={request_id} status=400 code=invalid_http"
        assert log.read_text().count(line) == int(logs)
        assert "secret" not in log.read_text()
