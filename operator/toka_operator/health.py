"""The operator's own HTTP port: /livez, /readyz and /metrics.

Owns: the answers' form, not their content. It takes no input and changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest


class HealthServer:
    """Answers in threads of its own.

    `describe_trouble` returns "" unless a restart would help; `describe_readiness` whether the replica is ready, and
    what it lacks.
    """

    def __init__(
        self,
        port: int,
        describe_trouble: Callable[[], str],
        describe_readiness: Callable[[], tuple[bool, str]],
        measure: Callable[[], None],
    ) -> None:
        def answer(path: str) -> tuple[int, bytes, str]:
            if path == "/livez":
                trouble = describe_trouble()
                return (503 if trouble else 200), (trouble or "ok").encode(), "text/plain"
            if path == "/readyz":
                is_ready, text = describe_readiness()
                return (200 if is_ready else 503), text.encode(), "text/plain"
            if path == "/metrics":
                measure()
                return 200, generate_latest(), CONTENT_TYPE_LATEST
            return 404, b"not found", "text/plain"

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                status, body, content_type = answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes are not news."""

        self._server = ThreadingHTTPServer(("0.0.0.0", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
