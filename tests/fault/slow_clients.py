"""Slow and idle connections beside plain requests: `python -m tests.fault.slow_clients [SECONDS [KIND ...]]`.

A real server process with a scripted manager answers plain requests for one token, from a process of their own. Seconds
without slow clients (9 by default) and as many beside them take turns. Prints one JSON object: of each kind the plain
requests' p50 and p99 without and beside it, the server's memory before and after, and how many connections the server
has closed, after how long. The exit code is 0 where no plain request failed and each connection that has a limit was
closed in time.
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import sys
import tempfile
import time
from typing import Any, NamedTuple

import psutil
from toka_engine.builtin import ensure_builtin

from tests.engine_process import WAIT_S
from tests.fault.hostile_load import describe, measure, memory_mb, plain_clients
from tests.unit.server.conftest import completion_body
from tests.unit.server.harness import RunningServer, running_server, speak
from tests.unit.server.test_batches import client_of, wait_open

RECEIVE_TIMEOUT_S, SEND_TIMEOUT_S = 10.0, 10.0
SLACK_S = 3.0
NUM_TURNS = 3
_IDS = [504, 3575, 282, 4649]
_FILE_BYTES = 16 << 20
"""More than the kernel's buffers of a connection hold."""
_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


class Kind(NamedTuple):
    """A kind of slow clients: how many there are, and what each sends."""

    number: int
    first: bytes
    trickle: bytes = b""
    """Sent again and again, a second apart."""
    limit_s: float | None = None
    """The time in which the server has to close the connection; None where it may stay."""
    reads: bool = True
    """Whether the client reads what it gets."""


def list_kinds(file_id: str) -> dict[str, Kind]:
    """Return the kinds by name. `file_id`: a large file, which is read slowly."""
    body = json.dumps(completion_body(max_tokens=1)).encode()
    whole = _HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    content = f"GET /v1/files/{file_id}/content HTTP/1.1\r\nhost: x\r\nauthorization: Bearer none\r\n\r\n".encode()
    return {
        "500 slow heads": Kind(500, _HEAD, b"x-slow: y\r\n", RECEIVE_TIMEOUT_S),
        "500 slow bodies": Kind(500, _HEAD + b"content-length: 5000\r\n\r\n", b" ", RECEIVE_TIMEOUT_S),
        "1,000 silent connections": Kind(1000, b"", limit_s=RECEIVE_TIMEOUT_S),
        "10,000 idle connections": Kind(10_000, whole),
        "100 slow readers": Kind(100, content, limit_s=SEND_TIMEOUT_S, reads=False),
    }


class Clients:
    """The connections of one kind."""

    def __init__(self, server: RunningServer, kind: Kind) -> None:
        self._kind = kind
        self._server = psutil.Process(server.process.pid)
        self._began_s: dict[socket.socket, float] = {}
        self._accepted: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self.closed_after_s: list[float] = []
        for _ in range(kind.number):
            sock = socket.socket()
            if not kind.reads:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(WAIT_S)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(kind.first)
            sock.setblocking(False)
            self._began_s[sock] = time.monotonic()
            if kind.reads:
                self._selector.register(sock, selectors.EVENT_READ)

    def hold(self, until_s: float) -> None:
        """Be slow until then, or until the server has closed all."""
        next_s = time.monotonic() + 1
        while self._began_s and (left_s := until_s - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left_s, 0.25)):
                sock: Any = key.fileobj
                self._read(sock)
            if not self._kind.reads:
                time.sleep(min(left_s, 0.25))
                self._find_dropped()
            if self._kind.trickle and time.monotonic() >= next_s:
                next_s += 1
                self._trickle()

    def _trickle(self) -> None:
        for sock in tuple(self._began_s):
            try:
                sock.send(self._kind.trickle)
            except OSError:
                self._note_closed(sock)

    def _read(self, sock: socket.socket) -> None:
        try:
            if not sock.recv(65536):
                self._note_closed(sock)
        except BlockingIOError:
            return
        except OSError:
            self._note_closed(sock)

    def _find_dropped(self) -> None:
        """Look at the server's side: the end of a connection does not come through to who does not read."""
        held = {connection.raddr.port for connection in self._server.net_connections("tcp") if connection.raddr}
        for sock in tuple(self._began_s):
            if sock.getsockname()[1] in held:
                self._accepted.add(sock)
            elif sock in self._accepted:
                self._note_closed(sock)

    def _note_closed(self, sock: socket.socket) -> None:
        self.closed_after_s.append(time.monotonic() - self._began_s.pop(sock))
        if self._kind.reads:
            self._selector.unregister(sock)
        sock.close()

    def close(self) -> int:
        """Close what is open; return how many that were."""
        num_open = len(self._began_s)
        for sock in self._began_s:
            sock.close()
        self._selector.close()
        return num_open


def run(server: RunningServer, seconds: float, kind: Kind) -> tuple[dict[str, Any], bool]:
    """Measure without slow clients and beside them, in turns; return the figures and whether all was well."""
    calm, beside, closed_s = [], [], []
    num_failed = num_open = 0
    before_mb = memory_mb(server)
    with plain_clients(server.port) as plain:
        for _ in range(NUM_TURNS):
            num_failed += measure(plain)[1]  # between two turns
            time.sleep(seconds)
            calm.append(measure(plain))
            clients = Clients(server, kind)
            try:
                num_failed += measure(plain)[1]  # while they connect
                clients.hold(time.monotonic() + seconds)
                beside.append(measure(plain))
                if kind.limit_s is not None:
                    clients.hold(time.monotonic() + max(0.0, kind.limit_s + SLACK_S - seconds))
                after_mb = memory_mb(server)
            finally:
                num_open += clients.close()
            closed_s += clients.closed_after_s
        num_failed += sum(failed for _, failed in calm + beside)
    figures = {
        "plain_ms": [describe(calm), describe(beside)],
        "plain_failed": num_failed,
        "memory_mb": [before_mb, after_mb],
        "closed": len(closed_s),
        "open": num_open,
        "closed_after_s": [round(min(closed_s), 1), round(max(closed_s), 1)] if closed_s else None,
    }
    is_in_time = kind.limit_s is None or (not num_open and max(closed_s) <= kind.limit_s + SLACK_S)
    return figures, is_in_time and not num_failed


def main() -> int:
    """Run with the arguments of the command line."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 9.0
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report: dict[str, Any] = {}
    is_well = True
    settings: dict[str, Any] = {
        "access_log": False,
        "log_level": "ERROR",
        "receive_timeout_s": RECEIVE_TIMEOUT_S,
        "send_timeout_s": SEND_TIMEOUT_S,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(ensure_builtin(), data_dir=folder, **settings) as server,
    ):
        server.manager.on_submit = lambda submit: speak(server.manager, submit, _IDS)
        wait_open(server)
        file = client_of(server).files.create(file=bytes(_FILE_BYTES), purpose="user_data")
        kinds = list_kinds(file.id)
        for name in sys.argv[2:] or kinds:
            report[name], was_well = run(server, seconds, kinds[name])
            is_well &= was_well
            print(name, json.dumps(report[name]), file=sys.stderr, flush=True)
    print(json.dumps(report))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
