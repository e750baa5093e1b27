"""A running server process with a scripted manager at the other end of its link.

Only the manager is played here, by the real messages over a real socket pair; everything else is the real
process. The play runs in a thread: it answers each `Submit` by the script and keeps what it was sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from toka_engine.channel import Channel, socket_pair, wait
from toka_engine.config import EngineConfig
from toka_engine.control_messages import ChildReady, Drain, FromChild, Ping, Start
from toka_engine.errors import PeerClosedError
from toka_engine.messages import (
    FINISH_LENGTH,
    FINISH_STOP,
    Cancel,
    Deltas,
    EngineInfo,
    ServerToManager,
    Started,
    Submit,
)

from tests.engine_process import ROOT, WAIT_S, hold_port

MODEL = "smollm2"
INFO = EngineInfo(
    vocab_size=49152,
    max_request_tokens=2048,
    num_kv_tokens=65536,
    max_streams=256,
    device="cpu",
    dtype="float32",
)

Answer = Callable[["ScriptedManager", Submit], None]
"""Answers a request in the place of a manager."""


class ScriptedManager:
    """The manager's end of the link. `on_submit` decides what each request gets; by default nothing.

    A server that finds an unfinished batch sends requests before its start has ended: what answers them is given here.
    """

    def __init__(self, channel: Channel[Any], answer: Answer | None = None) -> None:
        self.submits: list[Submit] = []
        self.cancelled: set[int] = set()
        self._forgotten: set[int] = set()
        self.on_submit: Callable[[Submit], None] = partial(answer, self) if answer else lambda submit: None
        self._channel = channel
        self._changed = threading.Condition()
        self._is_stopped = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, *messages: Any) -> None:
        """Send in this order; any thread may. The manager's thread is woken to write what the socket did not take."""
        for message in messages:
            self._channel.send(message)
        self._wake()

    def forget(self) -> None:
        """Begin anew for another test: cancellations of streams that are known now may still come, and are not kept."""
        with self._changed:
            self._forgotten.update(stream for submit in self.submits for stream in streams_of(submit))
            self.submits.clear()
            self.cancelled.clear()

    def close(self) -> None:
        """End the manager, once: the server sees the end of its link."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._wake()
        self._thread.join()
        for end in (self._channel, self._wake_read, self._wake_write):
            end.close()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the server did not send what was expected"

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            self._wake_write.send(b"x")

    def _run(self) -> None:
        wake: Any = Channel(self._wake_read, ServerToManager)
        with contextlib.suppress(PeerClosedError):
            while not self._is_stopped:
                if wake in wait([self._channel, wake], None):
                    self._wake_read.recv(4096)
                for message in self._channel.receive_ready():
                    self._take(message)

    def _take(self, message: Any) -> None:
        with self._changed:
            match message:
                case Submit():
                    self.submits.append(message)
                case Cancel():
                    self.cancelled.update(set(message.streams.tolist()) - self._forgotten)
            self._changed.notify_all()
        if isinstance(message, Submit):
            self.on_submit(message)


class RunningServer:
    """The process, its control link and its managers."""

    def __init__(
        self,
        tokenizer_dir: Path,
        *,
        sends_info: bool = True,
        env: dict[str, str] | None = None,
        port: int | None = None,
        stderr: Any = None,
        answer: Answer | None = None,
        **settings: Any,
    ):
        self._held_port, free_port = hold_port()
        self.port = port or free_port
        self.url = f"http://127.0.0.1:{self.port}"
        config = EngineConfig(host="127.0.0.1", port=self.port, **settings)
        ours, theirs = socket_pair()
        links = [socket_pair() for _ in range(config.dp_size)]
        fds = [theirs.fileno(), *(end.fileno() for _, end in links)]
        self.control: Channel[Any] = Channel(ours, FromChild)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "toka_engine.server", *map(str, fds)],
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": str(ROOT / "engine"), **(env or {})},
            stderr=stderr,
        )
        for end in (theirs, *(end for _, end in links)):
            end.close()
        self.managers = [ScriptedManager(Channel(end, ServerToManager), answer) for end, _ in links]
        self.manager = self.managers[0]
        self.control.send(Start(config, str(tokenizer_dir), str(tokenizer_dir)))
        if sends_info:
            for manager in self.managers:
                manager.send(INFO)
            self.wait_control(ChildReady)

    def wait_control(self, kind: type, timeout_s: float = WAIT_S) -> Any:
        """Return the next control message of `kind`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for message in self.control.receive(deadline - time.monotonic()):
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} within {timeout_s} s")

    def ping(self) -> Any:
        from toka_engine.control_messages import Pong

        self.control.send(Ping(1))
        return self.wait_control(Pong)

    def drain(self) -> None:
        self.control.send(Drain())

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._held_port.close()
        for manager in self.managers:
            manager.close()
        self.control.close()

    # ------------------------------------------------------------ raw HTTP

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers, body."""
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """POST JSON (or raw bytes); return status and the parsed answer."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", path, raw, {"content-type": "application/json", **(headers or {})})
        return status, json.loads(answer)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what a server does by itself, of which nothing but an answer of it tells."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what was expected did not come"
        time.sleep(0.02)


@contextlib.contextmanager
def running_server(tokenizer_dir: Path, **settings: Any) -> Iterator[RunningServer]:
    server = RunningServer(tokenizer_dir, **settings)
    try:
        yield server
    finally:
        server.stop()


# ---------------------------------------------------------------- scripts


def streams_of(submit: Submit) -> list[int]:
    return list(range(submit.first_stream, submit.first_stream + submit.num_choices))


def whole(stream: int, ids: Sequence[int], reason: int = FINISH_STOP) -> Deltas:
    """The end of a stream that gets all its tokens at once."""
    return Deltas(
        ended=np.array([stream], np.int64),
        ended_reasons=np.array([reason], np.uint8),
        ended_num_tokens=np.array([len(ids) + (reason == FINISH_STOP)], np.int32),
        ended_lengths=np.array([len(ids)], np.int32),
        ended_tokens=np.array(ids, np.int32),
    )


def each(streams: Sequence[int], ids: Sequence[int]) -> Deltas:
    """One token for each of `streams`."""
    return Deltas(streams=np.array(streams, np.int64), tokens=np.array(ids, np.int32))


def end(streams: Sequence[int], num_tokens: int, reason: int = FINISH_STOP) -> Deltas:
    """The end of streams whose tokens were delivered before."""
    count = len(streams)
    return Deltas(
        ended=np.array(streams, np.int64),
        ended_reasons=np.full(count, reason, np.uint8),
        ended_num_tokens=np.full(count, num_tokens, np.int32),
        ended_lengths=np.zeros(count, np.int32),
    )


def start(submit: Submit, num_cached: int) -> Started:
    """The admission of a prompt, `num_cached` of whose tokens are in the prefix cache."""
    return Started(np.array([submit.first_stream], np.int64), np.array([num_cached], np.int32))


def speak(manager: ScriptedManager, submit: Submit, ids: Sequence[int]) -> None:
    """Answer `submit` with `ids` in every choice, as far as max_tokens allows, the way it asks for."""
    ids = list(ids)[: submit.max_tokens]
    reason = FINISH_LENGTH if len(ids) == submit.max_tokens else FINISH_STOP
    streams = streams_of(submit)
    if not submit.deliver_each:
        manager.send(*(whole(stream, ids, reason) for stream in streams))
        return
    for token in ids:
        manager.send(each(streams, [token] * len(streams)))
    manager.send(end(streams, len(ids) + (reason == FINISH_STOP), reason))
