"""A proxy between an operator and the API server that makes requests go wrong, and may kill the operator for one.

Plain HTTP towards the operator, TLS towards the API server; watches are streamed. The answer to a write that
kills is withheld, so the operator dies not knowing whether it was made.
"""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import urllib3
import yaml

WRITES = ("POST", "PUT", "PATCH", "DELETE")
CUT, GARBAGE = "cut", "garbage"
"""The write is made, and then the connection breaks, or the answer is no JSON."""
FREEZE = "freeze"
"""The request, or the rest of the stream, is held for as long as its fault lasts, and then the connection breaks."""
HANG = "hang"
"""A stream is held for good, as by a middlebox that forgets connections."""
DELAY = "delay"
"""The request waits until its fault is over, and then goes on."""


def error_event(code: int) -> bytes:
    """A watch event that ends its watch."""
    status = {"kind": "Status", "apiVersion": "v1", "code": code, "message": "so says the proxy", "metadata": {}}
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"


@dataclass(frozen=True)
class Fault:
    """A fault that befalls the requests of which `resource` is the last word (any, if it is empty), for as long as the
    fault is among the proxy's. `action` is a status code, or CUT, FREEZE, HANG or DELAY, or an event's bytes."""

    action: int | str | bytes
    resource: str = ""
    only: str = ""
    """"watches", "writes" or, for both and reads too, nothing."""

    def concerns(self, method: str, path: str) -> bool:
        is_watch = "watch=true" in path
        is_write = method in WRITES
        kind = {"watches": is_watch, "writes": is_write}.get(self.only, True)
        return kind and self.resource in ("", path.partition("?")[0].rsplit("/", 1)[-1])


class Victim(Protocol):
    """Whoever is killed after a write: the process of an operator, for one."""

    def kill(self) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks when the operator is killed is what this proxy is for."""
        if not isinstance(sys.exception(), ConnectionError | urllib3.exceptions.HTTPError):
            super().handle_error(request, client_address)


class FaultProxy:
    """Use as a context manager; `kubeconfig` leads through it.

    `kill_after_writes`: the `victim` is killed after so many; 0: never. `fail_once`: the last word of a path
    ("services", "status") -> what its next write gets: a status code that refuses it, CUT or GARBAGE.
    """

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self._target: str = cluster["server"]
        ca_file = cluster.get("certificate-authority")
        ca_data = cluster.get("certificate-authority-data")
        if ca_file is None:
            ca = kubeconfig.with_suffix(".ca")
            ca.write_bytes(base64.b64decode(ca_data))
            ca_file = str(ca)
        self._pool = urllib3.PoolManager(ca_certs=ca_file, maxsize=128, retries=False)
        self._lock = threading.Lock()
        self.kill_after_writes = 0
        self.victim: Victim | None = None
        self.fail_once: dict[str, int | str] = {}
        self.faults: list[Fault] = []
        """The faults of the moment; a list that a test replaces."""
        self.num_waiting = 0
        """Requests that wait for a fault to be over."""
        self._server = _Server(("127.0.0.1", 0), self._make_handler())
        self.kubeconfig = kubeconfig.with_suffix(".proxy")
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self._server.server_address[1]}"}
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _must_kill(self, method: str, path: str) -> bool:
        """Counts one write; Leases do not count, or no operator would ever lead."""
        if method not in WRITES or "/leases" in path:
            return False
        with self._lock:
            if self.kill_after_writes == 0:
                return False
            self.kill_after_writes -= 1
            return self.kill_after_writes == 0

    def _find_fault(self, method: str, path: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.concerns(method, path)), None)

    def _outlast(self, fault: Fault) -> None:
        """Waits until a fault is over."""
        with self._lock:
            self.num_waiting += 1
        while fault in self.faults:
            time.sleep(0.05)
        with self._lock:
            self.num_waiting -= 1

    def _take_fault(self, method: str, path: str) -> int | str | None:
        if method not in WRITES:
            return None
        with self._lock:
            return self.fail_once.pop(path.partition("?")[0].rsplit("/", 1)[-1], None)

    def _make_handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
                fault = proxy._take_fault(self.command, self.path)
                lasting = proxy._find_fault(self.command, self.path)
                if lasting is not None and lasting.action in (FREEZE, DELAY):
                    proxy._outlast(lasting)
                    self.close_connection = lasting.action == FREEZE
                    if self.close_connection:
                        return
                    lasting = None
                if lasting is not None and lasting.action == CUT:
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self.refuse(fault)
                    return
                if lasting is not None and isinstance(lasting.action, int):
                    self.refuse(lasting.action)
                    return
                kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                answer: Any = proxy._pool.request(
                    self.command, proxy._target + self.path, body=body, headers=kept, preload_content=False
                )
                if proxy._must_kill(self.command, self.path) and proxy.victim is not None:
                    proxy.victim.kill()
                    fault = CUT
                if fault == CUT:
                    self.close_connection = True
                    return
                if fault == GARBAGE:
                    self.answer(answer.status, b"<html>")
                    return
                self.send_response(answer.status)
                for name in ("Content-Type", "Retry-After"):
                    if name in answer.headers:
                        self.send_header(name, answer.headers[name])
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for chunk in answer.stream(amt=None, decode_content=True):
                    lasting = proxy._find_fault(self.command, self.path) if "watch=true" in self.path else None
                    if lasting is not None and not self.disturb(lasting):
                        return
                    self.send_chunk(chunk)
                self.wfile.write(b"0\r\n\r\n")

            def send_chunk(self, chunk: bytes) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

            def disturb(self, fault: Fault) -> bool:
                """Does to an open stream, before its next event, what the fault says. Returns whether it goes on."""
                if fault.action == DELAY:
                    proxy._outlast(fault)
                    return True
                self.close_connection = True
                if fault.action == HANG:
                    threading.Event().wait(300)
                elif fault.action == FREEZE:
                    proxy._outlast(fault)
                elif isinstance(fault.action, bytes):
                    self.send_chunk(fault.action)
                return False

            def refuse(self, code: int) -> None:
                status = {"kind": "Status", "apiVersion": "v1", "code": code, "message": "so says the proxy"}
                self.answer(code, json.dumps(status).encode(), {"Retry-After": "1"} if code == 429 else {})

            def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def log_message(self, format: str, *args: object) -> None:
                """The operator's own log tells more."""

        return Handler
