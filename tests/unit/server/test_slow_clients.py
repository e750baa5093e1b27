"""Clients that are slow, silent or too large: their connections close, others are served meanwhile."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from toka_engine.messages import Submit
from toka_engine.server.tokenization import Tokenizer

from tests.unit.server.conftest import completion_body
from tests.unit.server.harness import RunningServer, each, running_server, speak, streams_of

_POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty_process(tokenizer_dir: Path) -> Iterator[RunningServer]:
    with running_server(tokenizer_dir, receive_timeout_s=1.0, send_timeout_s=0.5, max_connections=50) as server:
        yield server


@pytest.fixture
def hasty_server(hasty_process: RunningServer, sentence_ids: list[int]) -> RunningServer:
    manager = hasty_process.manager
    manager.forget()
    manager.on_submit = lambda submit: speak(manager, submit, sentence_ids)
    return hasty_process


def _read_all(sock: socket.socket) -> bytes:
    try:
        return b"".join(iter(lambda: sock.recv(65536), b""))
    except ConnectionResetError:
        return b"reset"


def _assert_has_fixed_headers(answer: bytes) -> None:
    head = answer.partition(b"\r\n\r\n")[0]
    assert head.count(b"\r\ndate: ") == head.count(b"\r\nx-request-id: ") == 1


def test_a_silent_connection_is_closed(hasty_server: RunningServer) -> None:
    with hasty_server.connect() as sock:
        assert _read_all(sock) == b""


@pytest.mark.parametrize(
    "sent",
    [b"P", _POST, _POST + b"content-length: 10\r\n\r\n", _POST + b'content-length: 100\r\n\r\n{"model":'],
    ids=["one-byte", "half-a-head", "no-body", "half-a-body"],
)
def test_a_request_that_does_not_arrive_is_a_408(hasty_server: RunningServer, sent: bytes) -> None:
    with hasty_server.connect() as sock:
        sock.sendall(sent)
        answer = _read_all(sock)
    assert answer.startswith(b"HTTP/1.1 408")
    _assert_has_fixed_headers(answer)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "receive_timeout"


def test_a_head_that_trickles_is_closed_although_bytes_come(hasty_server: RunningServer) -> None:
    with hasty_server.connect() as sock:
        sock.settimeout(0.05)
        sock.sendall(_POST)
        answer = b""
        for _ in range(400):
            try:
                sock.sendall(b"x: y\r\n")
                if not (data := sock.recv(65536)):
                    break
                answer += data
            except TimeoutError:
                continue
            except OSError:
                break
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("line", [b"x: " + b"a" * 70_000, b"x: y\r\n" * 20_000], ids=["long-line", "many-lines"])
def test_a_head_that_is_too_large_is_a_431(hasty_server: RunningServer, line: bytes) -> None:
    with hasty_server.connect() as sock:
        sock.sendall(_POST + line)
        answer = _read_all(sock)
    assert answer.startswith(b"HTTP/1.1 431") or answer == b"reset"
    assert hasty_server.post("/v1/completions", completion_body())[0] == 200


def test_a_long_path_is_a_431(hasty_server: RunningServer) -> None:
    with hasty_server.connect() as sock:
        sock.sendall(b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert _read_all(sock).startswith((b"HTTP/1.1 431", b"reset"))


@pytest.mark.parametrize("sent", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET\r\n\r\n"])
def test_what_is_not_http_is_a_400(hasty_server: RunningServer, sent: bytes) -> None:
    with hasty_server.connect() as sock:
        sock.sendall(sent)
        answer = _read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400")
    _assert_has_fixed_headers(answer)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_body_of_a_declared_size_beyond_the_limit_is_refused_unread(hasty_server: RunningServer) -> None:
    with hasty_server.connect() as sock:
        sock.sendall(_POST + b"content-length: 999999999999\r\n\r\n")
        assert _read_all(sock).startswith(b"HTTP/1.1 413")


def test_an_answer_may_take_longer_than_the_receive_deadline(hasty_server: RunningServer) -> None:
    manager = hasty_server.manager
    waiting: list[Submit] = []
    manager.on_submit = waiting.append
    with hasty_server.connect() as slow, hasty_server.connect() as silent:
        raw = json.dumps(completion_body()).encode()
        slow.sendall(_POST + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        manager.wait_for(lambda: bool(waiting))
        assert _read_all(silent) == b""  # the deadline has passed for both
        speak(manager, waiting[0], [28])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_half_a_request_behind_another_does_not_cut_its_answer(hasty_server: RunningServer, is_streamed: bool) -> None:
    manager = hasty_server.manager
    waiting: list[Submit] = []
    manager.on_submit = waiting.append
    with hasty_server.connect() as slow, hasty_server.connect() as silent:
        raw = json.dumps(completion_body(stream=is_streamed)).encode()
        slow.sendall(_POST + b"content-length: %d\r\n\r\n" % len(raw) + raw + b"GET /pi")
        manager.wait_for(lambda: bool(waiting))
        if is_streamed:
            manager.send(each(streams_of(waiting[0]), [28]))
        assert _read_all(silent) == b""  # the deadline has passed for both
        speak(manager, waiting[0], [28])
        answer = _read_all(slow)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" in answer if is_streamed else b'"usage"' in answer


def test_a_keep_alive_connection_outlives_the_receive_deadline(hasty_server: RunningServer) -> None:
    with hasty_server.connect() as kept, hasty_server.connect() as silent:
        for _ in range(2):
            kept.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while b"pong" not in answer:
                answer += kept.recv(65536)
            assert _read_all(silent) == b""


def test_pipelined_requests_are_answered_in_order(hasty_server: RunningServer) -> None:
    with hasty_server.connect() as sock:
        first = b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n"
        sock.sendall(first + b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = _read_all(sock)
    assert answer.index(b"pong") < answer.index(b"alive")


def test_connections_beyond_the_limit_are_a_503(hasty_server: RunningServer) -> None:
    held = [hasty_server.connect() for _ in range(60)]
    try:
        answers = []
        for sock in held[50:]:
            answers.append(_read_all(sock))
        refusals = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
        assert refusals
        _assert_has_fixed_headers(refusals[0])
        for sock in held[:50]:
            _read_all(sock)
    finally:
        for sock in held:
            sock.close()
    assert hasty_server.request("GET", "/livez")[0] == 200


def test_a_reader_that_stops_is_dropped_and_its_stream_cancelled(
    hasty_server: RunningServer, sentence_ids: list[int], tokenizer: Tokenizer
) -> None:
    manager = hasty_server.manager
    longest = max(range(len(tokenizer.bytes_of)), key=lambda token: len(tokenizer.bytes_of[token]))

    def flood(submit: Submit) -> None:
        for _ in range(400):  # more text than the kernel's buffers hold
            manager.send(each(streams_of(submit), [longest] * submit.num_choices))

    manager.on_submit = flood
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", hasty_server.port))
        raw = json.dumps(completion_body(n=500, max_tokens=1000, stream=True)).encode()
        sock.sendall(_POST + b"content-length: %d\r\n\r\n" % len(raw) + raw)
        manager.wait_for(lambda: len(manager.cancelled) == 500)
    manager.on_submit = lambda submit: speak(manager, submit, sentence_ids)
    assert hasty_server.post("/v1/completions", completion_body())[0] == 200
