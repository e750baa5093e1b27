"""Requests with `timeout_s`: what has no end by then is a 504, and its streams are cancelled at once."""

from __future__ import annotations

import json
import socket
from typing import Any

import openai
import pytest
from toka_engine.messages import Refused, Submit

from tests.unit.server.conftest import chat_body, client_of, completion_body
from tests.unit.server.harness import MODEL, RunningServer, each, running_server, speak, streams_of

_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": completion_body(),
    "/v1/chat/completions": chat_body(),
    "/v1/responses": {"model": MODEL, "input": "Hello"},
    "/v1/messages": {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]},
}


def all_cancelled(server: RunningServer) -> bool:
    manager = server.manager
    return {stream for submit in manager.submits for stream in streams_of(submit)} == manager.cancelled


@pytest.mark.parametrize("path", _BODIES)
def test_an_answer_that_does_not_come_in_time_is_a_504_and_its_streams_end(server: RunningServer, path: str) -> None:
    server.manager.on_submit = lambda submit: None
    status, answer = server.post(path, {**_BODIES[path], "timeout_s": 0.2})
    assert status == 504
    assert answer["error"]["code" if path != "/v1/messages" else "type"] in ("deadline_exceeded", "timeout_error")
    assert "timeout_s" in answer["error"]["message"]
    server.manager.wait_for(lambda: all_cancelled(server))


@pytest.mark.parametrize("path", _BODIES)
def test_a_wrong_time_is_named(server: RunningServer, path: str) -> None:
    for wrong in (0, -1, 86401, "1", True):
        status, answer = server.post(path, {**_BODIES[path], "timeout_s": wrong})
        assert status == 400
        assert "timeout_s" in answer["error"]["message"]
        assert not server.manager.submits


@pytest.mark.parametrize("path", _BODIES)
@pytest.mark.parametrize("fields", [{}, {"timeout_s": 100.0}], ids=["alone", "beside a longer one"])
def test_a_header_gives_as_little_time_as_a_field(server: RunningServer, path: str, fields: dict[str, float]) -> None:
    server.manager.on_submit = lambda submit: None
    status, answer = server.post(path, {**_BODIES[path], **fields}, {"x-request-timeout-ms": "200"})
    assert status == 504, answer
    (submit,) = server.manager.submits
    assert 0 < submit.timeout_s <= 0.2
    server.manager.wait_for(lambda: all_cancelled(server))


def test_a_header_counts_for_every_request_of_a_synchronous_batch(server: RunningServer) -> None:
    server.manager.on_submit = lambda submit: None
    requests = [completion_body(), completion_body(timeout_s=0.1)]
    path, headers = "/custom/synchronous-batch-completions", {"x-request-timeout-ms": "200"}
    status, answers = server.post(path, {"requests": requests}, headers)
    assert status == 200
    assert [answer["error"]["code"] for answer in answers] == ["deadline_exceeded"] * 2
    server.manager.wait_for(lambda: all_cancelled(server))


def test_the_shorter_of_field_and_header_counts(server: RunningServer) -> None:
    headers = {"x-request-timeout-ms": "86400000"}
    assert server.post("/v1/completions", completion_body(timeout_s=50.0), headers)[0] == 200
    assert server.post("/v1/completions", completion_body(), headers)[0] == 200
    first, second = (submit.timeout_s for submit in server.manager.submits)
    assert 40 < first <= 50
    assert 86_000 < second <= 86_400


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "86400001", "soon", "", "9" * 5000, "²"])
def test_a_wrong_header_is_named(server: RunningServer, wrong: str) -> None:
    raw = json.dumps(completion_body(stream=True)).encode()
    headers = {"content-type": "application/json", "x-request-timeout-ms": wrong}
    status, _, answer = server.request("POST", "/v1/completions", raw, headers)
    assert status == 400
    assert "x-request-timeout-ms" in json.loads(answer)["error"]["message"]
    assert not server.manager.submits


def test_all_choices_of_all_prompts_end(server: RunningServer) -> None:
    server.manager.on_submit = lambda submit: None
    body = completion_body(prompt=["Hello", "The capital"], n=3, timeout_s=0.2)
    assert server.post("/v1/completions", body)[0] == 504
    server.manager.wait_for(lambda: len(server.manager.cancelled) == 6)


def test_openais_client_does_not_try_again(server: RunningServer) -> None:
    server.manager.on_submit = lambda submit: None
    client = client_of(server).with_options(max_retries=2)
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model=MODEL, prompt="Hello", extra_body={"timeout_s": 0.2})
    assert raised.value.status_code == 504
    assert len(server.manager.submits) == 1


def test_a_stream_that_takes_too_long_ends_with_the_error_behind_its_tokens(server: RunningServer) -> None:
    server.manager.on_submit = lambda submit: server.manager.send(each(streams_of(submit), [504]))
    raw = json.dumps(completion_body(stream=True, timeout_s=5.0)).encode()
    status, _, answer = server.request("POST", "/v1/completions", raw, {"content-type": "application/json"})
    assert status == 200
    first, last = (json.loads(event.removeprefix(b"data: ")) for event in answer.split(b"\n\n")[:-1])
    assert first["choices"][0]["text"]
    assert last["error"]["code"] == "deadline_exceeded"
    server.manager.wait_for(lambda: all_cancelled(server))


def test_a_client_that_does_not_read_holds_nothing_beyond_its_time(server: RunningServer) -> None:
    """Its connection is full, so that the request's task waits to write: the streams end nevertheless."""
    manager = server.manager

    def flood(submit: Submit) -> None:
        streams = streams_of(submit)
        for _ in range(200):
            manager.send(each(streams * 500, [504] * 500))

    manager.on_submit = flood
    raw = json.dumps(completion_body(stream=True, max_tokens=2000, timeout_s=2.0)).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sock.sendall(head + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        manager.wait_for(lambda: all_cancelled(server) and bool(manager.submits))


def test_an_answer_in_time_is_as_without_the_field(server: RunningServer) -> None:
    for path, body in _BODIES.items():
        status, answer = server.post(path, {**body, "timeout_s": 86400})
        assert status == 200, answer
    assert not server.manager.cancelled
    assert all(86000 < submit.timeout_s <= 86400 for submit in server.manager.submits)
    server.post("/v1/completions", completion_body())
    assert server.manager.submits[-1].timeout_s == 0.0


def test_what_cannot_start_in_time_is_a_429_that_says_when_to_come_again(server: RunningServer) -> None:
    refusal = "the request would start in about 34.0 s, after its 'timeout_s'"
    server.manager.on_submit = lambda submit: server.manager.send(
        Refused(submit.first_stream, refusal, "deadline_unreachable", 31)
    )
    raw = json.dumps(chat_body(timeout_s=3.0, stream=True)).encode()
    status, headers, answer = server.request("POST", "/v1/chat/completions", raw, {"content-type": "application/json"})
    assert (status, headers["retry-after"]) == (429, "31")
    assert json.loads(answer)["error"]["code"] == "deadline_unreachable"
    assert json.loads(answer)["error"]["param"] == "timeout_s"
    assert json.loads(answer)["error"]["message"] == refusal


def test_the_deadline_counts_in_the_metrics(server: RunningServer) -> None:
    server.manager.on_submit = lambda submit: None
    server.post("/v1/completions", completion_body(timeout_s=0.1))
    page = server.request("GET", "/metrics")[2].decode()
    assert 'toka_requests_total{endpoint="/v1/completions",status="504"}' in page


def test_another_replica_takes_what_one_cannot_start_in_time(tokenizer_dir: Any, sentence_ids: list[int]) -> None:
    with running_server(tokenizer_dir, dp_size=2) as server:

        def refuse(submit: Submit) -> None:
            server.managers[0].send(Refused(submit.first_stream, "late", "deadline_unreachable", 9))

        server.managers[0].on_submit = refuse
        server.managers[1].on_submit = lambda submit: speak(server.managers[1], submit, sentence_ids)
        for _ in range(2):
            assert server.post("/v1/completions", completion_body(timeout_s=60.0))[0] == 200
