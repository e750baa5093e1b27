"""A server that speaks the part of the Hugging Face hub's API that a download uses, with faults on request.

Repository info, tree listing, and HEAD and GET of files with ETag, X-Repo-Commit and Range. It can cut a connection in
the middle of a body or stop there, ask for a token, answer any status, and counts the bytes that it sends.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


class HubServer:
    """Serves one repository of `files` by name. Attributes may be changed while it runs."""

    def __init__(self, name: str, files: dict[str, bytes], address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.name = name
        self.files = files
        self.token: str | None = None
        self.statuses: list[int] = []
        """The next answers of the API, before real ones."""
        self.cuts: dict[str, list[int]] = {}
        """Per file: after how many bytes of a body each of its next GETs is cut."""
        self.ranges: list[tuple[str, str]] = []
        """(file, Range header) of each GET that had one."""
        self.fetched: list[str] = []
        self.num_bytes_sent = 0
        """Bytes of files, as far as they were written to connections."""
        self.num_questions = 0
        """Requests for anything but a file."""
        self.retry_after: str | None = None
        """The header that comes with the errors of `statuses`."""
        self.holds: dict[str, int] = {}
        """Per file: after how many bytes of a body its GETs stop, until `let_go` is set."""
        self.is_holding, self.let_go = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(address, _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(is_head=True)

        def do_GET(self) -> None:
            self._answer(is_head=False)

        def _answer(self, is_head: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.num_questions += "/resolve/" not in path
            if hub.statuses:
                return self._send_error(hub.statuses.pop(0), "")
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._send_error(401, "GatedRepo" if path.count("/") > 4 else "")
            if path.startswith(f"/api/models/{hub.name}/tree/"):
                return self._send_json([_entry(name, body) for name, body in hub.files.items()])
            if path in (f"/api/models/{hub.name}", f"/api/models/{hub.name}/revision/main"):
                siblings = [{"rfilename": name} for name in hub.files]
                return self._send_json({"id": hub.name, "sha": COMMIT, "siblings": siblings})
            if path.startswith(f"/api/models/{hub.name}/revision/"):
                return self._send_error(404, "RevisionNotFound")
            prefix, _, file = path.partition(f"/{hub.name}/resolve/")
            name = file.partition("/")[2]
            if prefix or name not in hub.files:
                return self._send_error(404, "EntryNotFound" if name else "RepoNotFound")
            return self._send_file(name, is_head)

        def _send_file(self, name: str, is_head: bool) -> None:
            body = hub.files[name]
            start = 0
            if given := self.headers.get("Range"):
                start = int(given.removeprefix("bytes=").partition("-")[0])
                hub.ranges.append((name, given))
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{_entry(name, body)["etag"]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            if is_head:
                return
            hub.fetched.append(name)
            cuts = hub.cuts.get(name)
            if cuts:
                self._write(body[start : start + cuts.pop(0)])
                self.close_connection = True
            elif name in hub.holds and start < hub.holds[name]:
                self._write(body[start : hub.holds[name]])
                hub.is_holding.set()
                hub.let_go.wait()
                self._write(body[hub.holds[name] :])
            else:
                self._write(body[start:])

        def _write(self, part: bytes) -> None:
            for begin in range(0, len(part), 65536):
                try:
                    self.wfile.write(part[begin : begin + 65536])
                except OSError:  # the client was killed
                    self.close_connection = True
                    return
                with hub.lock:
                    hub.num_bytes_sent += len(part[begin : begin + 65536])

        def _send_json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send_error(self, status: int, code: str) -> None:
            self.send_response(status)
            if hub.retry_after:
                self.send_header("Retry-After", hub.retry_after)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _entry(name: str, body: bytes) -> dict[str, Any]:
    blob_id = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": blob_id, "etag": blob_id}
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(body).hexdigest()
        entry |= {"etag": digest, "lfs": {"oid": digest, "size": len(body), "pointerSize": 134}}
    return entry
