"""Asks engines by HTTP, again and again, for what the API server does not know of them.

Owns: the thread, whom it asks, and the bounds of an answer: a GET without a key, up to a size and a time. To read a
pod's log would need rights that the operator does not have. `loading` and `measuring` say what is asked.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from toka_operator.store import Key

T = TypeVar("T")
_TIMEOUT_S = 2.0
_NUM_ASKERS = 4
_MAX_ASKED = 64
"""Pods asked at a time; of more, others the next time."""
_PART_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Engine:
    """The address of an engine. `pod`: the name by which its answers are known."""

    pod: str
    address: str
    port: int


class Asker(threading.Thread, Generic[T]):
    """Asks every few seconds while there is somebody to ask. `on_change` gets the key whose answers changed."""

    def __init__(
        self,
        name: str,
        ask: Callable[[Engine], T | None],
        on_change: Callable[[Key], None],
        is_leader: Callable[[], bool],
        interval_s: float,
    ) -> None:
        """`ask` returns None where an engine does not tell."""
        super().__init__(name=name, daemon=True)
        self._ask, self._on_change, self._is_leader, self._interval_s = ask, on_change, is_leader, interval_s
        self._lock = threading.Lock()
        self._engines: dict[Key, tuple[Engine, ...]] = {}
        self._answers: dict[Key, dict[str, T]] = {}
        self._has_work, self._stop_event = threading.Event(), threading.Event()

    def expect(self, key: Key, engines: tuple[Engine, ...]) -> Mapping[str, T]:
        """Ask these engines of a TokaDeployment from now on, and no others; return what they said last."""
        with self._lock:
            if engines:
                self._engines[key] = engines
                self._has_work.set()
            else:
                self._engines.pop(key, None)
            names = {engine.pod for engine in engines}
            kept = {pod: said for pod, said in self._answers.pop(key, {}).items() if pod in names}
            if kept:
                self._answers[key] = kept
            return dict(kept)

    def recall(self, key: Key) -> Mapping[str, T]:
        """Return what the engines of a TokaDeployment said last."""
        with self._lock:
            return dict(self._answers.get(key, {}))

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
        answers = pool.map(lambda item: None if self._stop_event.is_set() else self._ask(item[1]), asked)
        for (key, engine), said in zip(asked, answers, strict=True):
            if self._note(key, engine, said):
                self._on_change(key)

    def _note(self, key: Key, engine: Engine, said: T | None) -> bool:
        """Take an answer; whether it is news."""
        with self._lock:
            if engine not in self._engines.get(key, ()):
                return False
            known = self._answers.setdefault(key, {})
            if known.get(engine.pod) == said:
                return False
            if said is None:
                del known[engine.pod]
            else:
                known[engine.pod] = said
            return True


def fetch(engine: Engine, path: str, max_bytes: int, timeout_s: float = _TIMEOUT_S) -> bytes:
    """The body of an engine's answer, as far as it came within `timeout_s`, all in all, and within `max_bytes`."""
    request = f"GET {path} HTTP/1.0\r\nHost: engine\r\n\r\n"  # 1.0 has neither chunks nor connections that stay
    answer = bytearray()
    deadline = time.monotonic() + timeout_s
    with (
        contextlib.suppress(OSError),
        socket.create_connection((engine.address, engine.port), timeout=timeout_s) as connection,
    ):
        connection.sendall(request.encode())
        while len(answer) < max_bytes and (left_s := deadline - time.monotonic()) > 0.0:
            connection.settimeout(left_s)
            part = connection.recv(min(_PART_BYTES, max_bytes))
            if not part:
                break
            answer += part
    return bytes(answer).partition(b"\r\n\r\n")[2]
