"""The waiting room gives the listening socket on without losing a connection, and without keeping the start waiting."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from toka_engine import waiting_room
from toka_engine.waiting_room import WaitingRoom

LIMIT_S = 60.0
"""It only ends a hang."""
REQUEST = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connect(listener: socket.socket, data: bytes) -> socket.socket:
    connection = socket.create_connection(listener.getsockname(), LIMIT_S)
    connection.sendall(data)
    return connection


def read_status(connection: socket.socket) -> bytes:
    """Return the status of the whole answer, behind which the connection ends."""
    with connection, connection.makefile("rb") as answer:
        return answer.read().split(b" ", 2)[1]


def test_a_request_under_way_is_answered_and_later_ones_are_the_servers(listener: socket.socket) -> None:
    room = WaitingRoom(listener.dup().detach())
    room.__enter__()
    slow = connect(listener, REQUEST[:10])
    assert read_status(connect(listener, REQUEST)) == b"503"  # it was behind the slow one in the queue
    leaving = threading.Thread(target=room.__exit__, args=(None, None, None))
    leaving.start()
    slow.sendall(REQUEST[10:])
    assert read_status(slow) == b"503"
    leaving.join(LIMIT_S)
    later = connect(listener, REQUEST)
    with listener.accept()[0] as server_end:
        assert server_end.recv(1000) == REQUEST
        server_end.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    assert read_status(later) == b"200"


def test_the_start_waits_for_all_slow_clients_together_as_long_as_for_one(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    class SlowClients:
        """Places of which one becomes free every four seconds."""

        def acquire(self, timeout: float) -> bool:
            nonlocal now
            now += min(timeout, 4.0)
            return timeout >= 4.0

    monkeypatch.setattr(waiting_room, "time", SimpleNamespace(monotonic=lambda: now))
    server = waiting_room._Server(listener.dup(), WaitingRoom(None))
    monkeypatch.setattr(server, "_places", SlowClients())
    server.wait_idle()
    server.server_close()
    assert now == 5.0
