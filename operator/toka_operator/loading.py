"""Asks engines that download their model how far they are.

Owns: the only requests that the operator makes to engines: a GET of /readyz, without a key, of pods that run and are
not ready. The API server knows no such thing, and to read a pod's log would need rights that the operator does not
have. An answer is shown, and decides nothing. Where a NetworkPolicy forbids the requests, nothing is shown.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from toka_operator.downloads import parse_download
from toka_operator.observed import Download
from toka_operator.store import Key

INTERVAL_S = 3.0
_TIMEOUT_S = 2.0
_NUM_ASKERS = 4
_MAX_ASKED = 64
"""Pods asked at a time; of more, others the next time."""
_MAX_ANSWER_BYTES = 4096
_REQUEST = b"GET /readyz HTTP/1.0\r\nHost: engine\r\n\r\n"
"""HTTP/1.0 has neither chunks nor connections that stay."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The address of an engine that loads."""

    pod: str
    address: str
    port: int


class LoadingEngines(threading.Thread):
    """Asks every few seconds while there is somebody to ask. `on_change` gets the key whose answers changed."""

    def __init__(
        self, on_change: Callable[[Key], None], is_leader: Callable[[], bool], interval_s: float = INTERVAL_S
    ) -> None:
        super().__init__(name="loading-engines", daemon=True)
        self._on_change, self._is_leader, self._interval_s = on_change, is_leader, interval_s
        self._lock = threading.Lock()
        self._engines: dict[Key, tuple[Engine, ...]] = {}
        self._downloads: dict[Key, dict[str, Download]] = {}
        self._has_work, self._stop_event = threading.Event(), threading.Event()

    def expect(self, key: Key, engines: tuple[Engine, ...]) -> Mapping[str, Download]:
        """Ask these engines of a TokaDeployment from now on, and no others; return what they said last."""
        with self._lock:
            if engines:
                self._engines[key] = engines
                self._has_work.set()
            else:
                self._engines.pop(key, None)
            names = {engine.pod for engine in engines}
            kept = {pod: said for pod, said in self._downloads.pop(key, {}).items() if pod in names}
            if kept:
                self._downloads[key] = kept
            return dict(kept)

    def stop(self) -> None:
        self._stop_event.set()
        self._has_work.set()

    def run(self) -> None:
        with ThreadPoolExecutor(_NUM_ASKERS, "ask-engine") as pool:
            while not self._stop_event.wait(self._interval_s):
                self._has_work.wait()
                if self._is_leader() and not self._stop_event.is_set():
                    self._ask_all(pool)

    def _ask_all(self, pool: ThreadPoolExecutor) -> None:
        with self._lock:
            asked = [(key, engine) for key, engines in self._engines.items() for engine in engines][:_MAX_ASKED]
            for key, _ in asked:  # those that were asked go to the end
                self._engines[key] = self._engines.pop(key)
            if not asked:
                self._has_work.clear()
        answers = pool.map(lambda item: None if self._stop_event.is_set() else ask(item[1]), asked)
        for (key, engine), said in zip(asked, answers, strict=True):
            if self._note(key, engine, said):
                self._on_change(key)

    def _note(self, key: Key, engine: Engine, said: Download | None) -> bool:
        """Take an answer; whether it is news."""
        with self._lock:
            if engine not in self._engines.get(key, ()):
                return False
            known = self._downloads.setdefault(key, {})
            if known.get(engine.pod) == said:
                return False
            if said is None:
                del known[engine.pod]
            else:
                known[engine.pod] = said
            return True


def ask(engine: Engine, timeout_s: float = _TIMEOUT_S) -> Download | None:
    """The download that an engine tells of, if it answers within `timeout_s`, all in all, and does."""
    answer = bytearray()
    deadline = time.monotonic() + timeout_s
    with (
        contextlib.suppress(OSError),
        socket.create_connection((engine.address, engine.port), timeout=timeout_s) as connection,
    ):
        connection.sendall(_REQUEST)
        while len(answer) < _MAX_ANSWER_BYTES and (left_s := deadline - time.monotonic()) > 0.0:
            connection.settimeout(left_s)
            part = connection.recv(_MAX_ANSWER_BYTES)
            if not part:
                break
            answer += part
    return parse_download(bytes(answer).partition(b"\r\n\r\n")[2])
