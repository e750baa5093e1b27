"""HTTP itself, from raw sockets: upgrades, expectations, pipelining, HTTP/1.0 and clients that half-close."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.unit.server.conftest import SENTENCE, chat_body, completion_body
from tests.unit.server.harness import RunningServer, each, end, speak, streams_of

_UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    "websocket": b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n",
    "two-lines": b"connection: keep-alive\r\nconnection: upgrade\r\nupgrade: TLS/1.0, h2c\r\n",
}
_BODY = json.dumps(completion_body()).encode()


def _post(
    extra: bytes = b"",
    body: bytes = _BODY,
    *,
    version: str = "1.1",
    path: str = "/v1/completions",
    chunked: bool = False,
) -> bytes:
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n".encode() + extra
    if not chunked:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    half = len(body) // 2
    chunks = (b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:], b""))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)


class Reader:
    """Reads one answer after another from a socket, as HTTP/1.1 says where they end."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rb")

    def read(self) -> tuple[int, dict[str, str], bytes]:
        status = int(self._file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if status == 100:
            return status, headers, b""
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, b"".join(self._chunks())
        if "content-length" in headers:
            return status, headers, self._file.read(int(headers["content-length"]))
        return status, headers, self._file.read()

    def read_final(self) -> tuple[int, dict[str, str], bytes]:
        """Read an answer; skip the interim ones."""
        while (answer := self.read())[0] == 100:
            pass
        return answer

    def read_rest(self) -> bytes:
        return self._file.read()

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._file.readline(), 16):
            yield self._file.read(size)
            self._file.readline()
        self._file.readline()


def _send_in_pieces(sock: socket.socket, data: bytes, size: int | None) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for begin in range(0, len(data), size or len(data)):
        sock.sendall(data[begin : begin + (size or len(data))])


def _assert_completion(answer: tuple[int, dict[str, str], bytes]) -> None:
    assert answer[0] == 200, answer
    assert json.loads(answer[2])["choices"][0]["text"] == SENTENCE


# ---------------------------------------------------------------- upgrades


@pytest.mark.parametrize("size", [None, 1, 100])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("upgrade", _UPGRADES.values(), ids=_UPGRADES)
def test_an_upgrade_is_ignored_and_its_request_answered(
    server: RunningServer, upgrade: bytes, chunked: bool, size: int | None
) -> None:
    """The body is whole, and the connection goes on, with and without another upgrade."""
    with server.connect() as sock:
        reader = Reader(sock)
        for extra in (upgrade, b"", upgrade):
            _send_in_pieces(sock, _post(extra, chunked=chunked), size)
            answer = reader.read()
            _assert_completion(answer)
            assert "upgrade" not in answer[1]
            assert answer[1].get("connection") != "close"


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("upgrade", _UPGRADES.values(), ids=_UPGRADES)
def test_pipelined_upgrades_are_answered_in_order(server: RunningServer, upgrade: bytes, size: int | None) -> None:
    ping = b"GET /ping HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n"
    last = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with server.connect() as sock:
        _send_in_pieces(sock, _post(upgrade) + ping + _post() + _post(upgrade, chunked=True) + ping + last, size)
        reader = Reader(sock)
        _assert_completion(reader.read())
        assert b"pong" in reader.read()[2]
        _assert_completion(reader.read())
        _assert_completion(reader.read())
        assert b"pong" in reader.read()[2]
        assert b"alive" in reader.read()[2]
        assert reader.read_rest() == b""


def test_an_upgrade_with_a_body_of_several_packets_streams(server: RunningServer) -> None:
    body = json.dumps(chat_body(stream=True, messages=[{"role": "user", "content": "word " * 1000}])).encode()
    with server.connect() as sock:
        _send_in_pieces(sock, _post(_UPGRADES["h2c"], body, path="/v1/chat/completions"), 1000)
        status, headers, events = Reader(sock).read()
    assert (status, headers["transfer-encoding"]) == (200, "chunked")
    assert events.endswith(b"data: [DONE]\n\n")


def test_an_upgrade_with_a_head_beyond_the_limit_is_a_431(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(_post(_UPGRADES["h2c"] + b"x: " + b"a" * 70_000 + b"\r\n"))
        assert Reader(sock).read()[0] == 431


def test_a_tunnel_is_refused_and_its_bytes_are_no_requests(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n")
        sock.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
        reader = Reader(sock)
        assert 400 <= reader.read()[0] < 500
        assert reader.read_rest() == b""


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    "behind",
    [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"a" * 700_000, b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n"],
    ids=["no-http", "large-head", "tunnel"],
)
def test_what_comes_behind_a_request_does_not_cut_its_answer(
    server: RunningServer, sentence_ids: list[int], behind: bytes, is_streamed: bool
) -> None:
    manager = server.manager
    manager.on_submit = lambda submit: None
    with server.connect() as sock:
        sock.sendall(_post(b"", json.dumps(completion_body(stream=is_streamed)).encode()) + behind)
        manager.wait_for(lambda: bool(manager.submits))
        _pass_time(server)
        speak(manager, manager.submits[0], sentence_ids)
        reader = Reader(sock)
        status, headers, answer = reader.read()
        assert reader.read_rest() == b""
    assert (status, headers.get("connection")) == (200, "close")
    assert b"Paris" in answer


# ---------------------------------------------------------------- expectations


@pytest.mark.parametrize("upgrade", [b"", _UPGRADES["h2c"]], ids=["plain", "h2c"])
def test_an_expectation_is_met_before_the_body_and_the_connection_goes_on(
    server: RunningServer, upgrade: bytes
) -> None:
    whole = _post(upgrade + b"Expect: 100-continue\r\n")
    head = whole[: -len(_BODY)]
    with server.connect() as sock:
        reader = Reader(sock)
        for _ in range(2):
            sock.sendall(head)
            assert reader.read()[0] == 100
            _send_in_pieces(sock, _BODY, 10)
            _assert_completion(reader.read())
        sock.sendall(whole)  # a client need not wait
        _assert_completion(reader.read_final())


@pytest.mark.parametrize("upgrade", [b"", _UPGRADES["h2c"]], ids=["plain", "h2c"])
def test_a_request_refused_before_its_body_closes_the_connection(server: RunningServer, upgrade: bytes) -> None:
    """Whether the body will still come is not known: what follows could be taken for it."""
    request = b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 100\r\n" + upgrade
    with server.connect() as sock:
        sock.sendall(request + b"\r\n")
        reader = Reader(sock)
        status, headers, _ = reader.read()
        assert (status, headers["connection"]) == (404, "close")
        assert reader.read_rest() == b""


def test_an_expectation_of_http_1_0_is_ignored(server: RunningServer) -> None:
    with server.connect() as sock:
        sock.sendall(_post(b"Expect: 100-continue\r\n", version="1.0"))
        _assert_completion(Reader(sock).read())


# ---------------------------------------------------------------- HTTP/1.0


@pytest.mark.parametrize("extra", [b"", b"Connection: keep-alive\r\n", _UPGRADES["h2c"]], ids=["plain", "kept", "h2c"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_to_http_1_0_has_no_chunks_and_ends_with_the_connection(
    server: RunningServer, is_streamed: bool, extra: bytes
) -> None:
    body = json.dumps(completion_body(stream=is_streamed)).encode()
    with server.connect() as sock:
        sock.sendall(_post(extra, body, version="1.0"))
        reader = Reader(sock)
        status, headers, answer = reader.read()
        assert reader.read_rest() == b""
    assert (status, headers.get("connection")) == (200, "close")
    assert "transfer-encoding" not in headers
    if is_streamed:
        events = answer.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert all(event.startswith(b"data: ") for event in events[:-1])
        texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]]
        assert "".join(texts) == SENTENCE
    else:
        _assert_completion((status, headers, answer))


def test_an_error_in_a_stream_to_http_1_0_is_its_last_event(server: RunningServer, sentence_ids: list[int]) -> None:
    manager = server.manager
    manager.on_submit = lambda submit: manager.send(each(streams_of(submit), sentence_ids[:1]))
    body = json.dumps(completion_body(stream=True)).encode()
    with server.connect() as sock:
        sock.sendall(_post(b"", body, version="1.0"))
        received = b""
        while b'"text"' not in received:
            received += sock.recv(65536)
        manager.send(each(streams_of(manager.submits[0]), [10**7]))
        received += b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.rpartition(b"data: ")[2].startswith(b'{"error"')


# ---------------------------------------------------------------- half-closed connections


def _half_closed(server: RunningServer, data: bytes) -> socket.socket:
    sock = server.connect()
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    return sock


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("extra", [b"", _UPGRADES["h2c"]], ids=["plain", "h2c"])
def test_a_client_that_half_closes_gets_its_answer(
    server: RunningServer, version: str, is_streamed: bool, extra: bytes, sentence_ids: list[int]
) -> None:
    """The answer may begin long after the request's end, and end long after its own beginning."""
    manager = server.manager
    manager.on_submit = lambda submit: None
    body = json.dumps(completion_body(stream=is_streamed)).encode()
    with _half_closed(server, _post(extra, body, version=version)) as sock:
        manager.wait_for(lambda: bool(manager.submits))
        _pass_time(server)
        (submit,) = manager.submits
        if is_streamed:
            manager.send(each(streams_of(submit), sentence_ids[:1]))
            _pass_time(server)
            for token in sentence_ids[1:]:
                manager.send(each(streams_of(submit), [token]))
            manager.send(end(streams_of(submit), len(sentence_ids) + 1))
        else:
            speak(manager, submit, sentence_ids)
        reader = Reader(sock)
        answer = reader.read_final()
        assert reader.read_rest() == b""
    assert manager.cancelled.isdisjoint(streams_of(submit))
    if is_streamed:
        assert answer[2].endswith(b"data: [DONE]\n\n")
    else:
        _assert_completion(answer)


def _pass_time(server: RunningServer) -> None:
    """Let the server take many turns, in which it looks for clients that are gone."""
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        assert server.request("GET", "/livez")[0] == 200


def test_all_pipelined_requests_of_a_client_that_half_closes_are_answered(server: RunningServer) -> None:
    ping = b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n"
    for half_a_request in (b"", b"GET /pi", _post()[:-5]):
        with _half_closed(server, ping + _post() + ping + _post() + half_a_request) as sock:
            reader = Reader(sock)
            assert b"pong" in reader.read_final()[2]
            _assert_completion(reader.read_final())
            assert b"pong" in reader.read_final()[2]
            _assert_completion(reader.read_final())
            assert reader.read_rest() == b""


@pytest.mark.parametrize("data", [b"", b"GET /pi", _post()[:-5], b"GET /ping HTTP/1.1\r\n"])
def test_a_client_that_half_closes_without_a_whole_request_is_let_go(server: RunningServer, data: bytes) -> None:
    with _half_closed(server, data) as sock:
        assert Reader(sock).read_rest() == b""


@pytest.mark.parametrize("resets", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("half_closes", [False, True], ids=["at-once", "after-half-closing"])
@pytest.mark.parametrize(("is_streamed", "has_begun"), [(False, False), (True, False), (True, True)])
def test_a_client_that_leaves_is_noticed_however_it_does(
    server: RunningServer, sentence_ids: list[int], is_streamed: bool, has_begun: bool, half_closes: bool, resets: bool
) -> None:
    """Although no token comes, so that the server writes nothing of its own."""
    manager = server.manager
    manager.on_submit = lambda submit: None
    sock = server.connect()
    sock.sendall(_post(b"", json.dumps(completion_body(stream=is_streamed, n=3)).encode()))
    manager.wait_for(lambda: bool(manager.submits))
    if has_begun:
        manager.send(each(streams_of(manager.submits[0]), sentence_ids[:1] * 3))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    if half_closes:
        sock.shutdown(socket.SHUT_WR)
        _pass_time(server)
        assert manager.cancelled.isdisjoint(streams_of(manager.submits[0]))
    if resets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()
    manager.wait_for(lambda: manager.cancelled == set(streams_of(manager.submits[0])))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stream_of_a_half_closed_client_holds_comments_at_most(
    server: RunningServer, version: str, sentence_ids: list[int]
) -> None:
    manager = server.manager
    manager.on_submit = lambda submit: manager.send(each(streams_of(submit), sentence_ids[:1]))
    with _half_closed(server, _post(b"", json.dumps(completion_body(stream=True)).encode(), version=version)) as sock:
        manager.wait_for(lambda: bool(manager.submits))
        _pass_time(server)
        speak(manager, manager.submits[0], sentence_ids[1:])
        _, _, events = Reader(sock).read_final()
    parts = events.split(b"\n\n")
    assert parts[-2:] == [b"data: [DONE]", b""]
    assert {part for part in parts[:-1] if not part.startswith(b"data: ")} <= {b":"}
    texts = [json.loads(part[6:])["choices"][0]["text"] for part in parts[:-2] if part != b":"]
    assert "".join(texts) == SENTENCE
