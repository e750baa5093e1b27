"""Answers HTTP while the model's files are fetched and no other process is there to do it.

Owns: the probes' answers of a start that may take an hour, with the bytes of the download, which the operator shows;
and a 503 for everything else. It takes connections from the engine's own listening socket until the files are there;
those that come later wait in its queue for the server. Only small answers to small requests: no keys, no bodies.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from toka_engine.hub import Transfer
from toka_engine.version import __version__

_READ_TIMEOUT_S = 5.0
_POLL_S = 0.05
"""The server of the standard library looks so often whether it is to end, and the engine's start waits for that."""
_MAX_CONNECTIONS = 32
_MAX_BODY_BYTES = 1 << 20


class WaitingRoom:
    """Answers on the listening socket `fd` while it is entered; does nothing without a TCP one."""

    def __init__(self, fd: int | None) -> None:
        self._phase, self._detail = "", "looking for the model's files"
        self._transfer: Transfer | None = None
        self._server: _Server | None = None
        if fd is None:
            return
        listener = socket.socket(fileno=fd)
        if listener.family in (socket.AF_INET, socket.AF_INET6):
            self._server = _Server(listener, self)
        else:
            listener.detach()

    def __enter__(self) -> Self:
        if self._server is not None:
            serve = partial(self._server.serve_forever, _POLL_S)
            threading.Thread(target=serve, name="waiting-room", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.wait_idle()

    def note(self, phase: str, detail: str) -> None:
        """Take what the process does now."""
        self._phase, self._detail = phase, detail

    def note_transfer(self, transfer: Transfer) -> None:
        """Take how far the download is."""
        self._transfer = transfer

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and body of the answer to a request for `path`, in the server's own shapes."""
        detail = " ".join(part for part in (self._phase, self._detail) if part)
        if path == "/livez":
            return 200, {"alive": True}
        if path == "/ping":
            return 200, {"message": "pong"}
        if path == "/version":
            return 200, {"version": __version__}
        if path in ("/readyz", "/health"):
            return 503, {"ready": False, "phase": "starting", "detail": detail, **self._describe_transfer()}
        message = f"The engine takes no requests: starting: {detail}."
        error = {"message": message, "type": "server_error", "param": None, "code": "unavailable"}
        return 503, {"error": error}

    def _describe_transfer(self) -> dict[str, Any]:
        transfer = self._transfer
        if transfer is None:
            return {}
        rate = round(transfer.bytes_per_s)
        counts = {"bytes": transfer.num_bytes, "total_bytes": transfer.total_bytes, "bytes_per_second": rate}
        return {"download": counts}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, room: WaitingRoom) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.room = room
        self._places = threading.Semaphore(_MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def wait_idle(self) -> None:
        """Wait for the answers under way, all together as long as one may take: the engine's start waits for this."""
        deadline = time.monotonic() + _READ_TIMEOUT_S
        for _ in range(_MAX_CONNECTIONS):
            if not self._places.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "toka", ""
    timeout = _READ_TIMEOUT_S
    server: _Server

    def _answer(self) -> None:
        self._read_body()
        status, content = self.server.room.answer(urlsplit(self.path).path)
        body = json.dumps(content, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _answer

    def _read_body(self) -> None:
        """Take a small body off the socket: closing it with bytes unread would cut the answer off."""
        length = self.headers.get("Content-Length", "0")
        if length.isdecimal() and int(length) <= _MAX_BODY_BYTES:
            with contextlib.suppress(OSError):
                self.rfile.read(int(length))

    def log_message(self, format: str, *args: Any) -> None:
        """Probes are not worth a line each."""
