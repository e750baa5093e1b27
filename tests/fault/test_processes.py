"""Each process of the real engine killed, crashed and stopped, at each moment: what clients and the operator see.

The promises (issue: not ready within 1 s, ended within 5 s) are tested with limits four times as wide.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from toka_engine.builtin import ensure_builtin
from toka_engine.errors import ExitCode

from tests.engine_process import EngineProcess, is_alive

CHILDREN = ("server", "manager", "model")
FAULTS = {
    "killed": (signal.SIGKILL, ExitCode.PROCESS_DIED),
    "crashed": (signal.SIGSEGV, ExitCode.PROCESS_DIED),
    "stopped": (signal.SIGSTOP, ExitCode.PROCESS_STALLED),
}
NOT_READY_S = 4.0
ENDED_S = 20.0
LONG_PROMPT = "The lighthouse keeper climbs the stairs once more. " * 400


@contextmanager
def running_engine(folder: Path, *arguments: str) -> Iterator[EngineProcess]:
    model = ensure_builtin()
    settings = ("device=cpu", "served_model_name=m", "kv_cache_num_tokens=(16 * 1024)", *arguments)
    with EngineProcess(folder, f"model={model}", *settings) as engine:
        yield engine


class Request:
    """A completion asked in a thread; `wait` gives its status, or 0 where the connection ended without one."""

    def __init__(
        self, engine: EngineProcess, prompt: str = "Once upon a time", stream: bool = False, max_tokens: int = 3000
    ) -> None:
        self.status: int | None = None
        self.body = b""
        self.first_chunk = threading.Event()
        fields = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
        self._body = json.dumps(fields)
        self._connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=120)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            headers = {"Content-Type": "application/json"}
            self._connection.request("POST", "/v1/completions", self._body, headers)
            response = self._connection.getresponse()
            for line in response:
                self.body += line
                self.first_chunk.set()
            self.status = response.status
        except (OSError, http.client.HTTPException):
            self.status = 0
        finally:
            self._connection.close()

    def wait(self) -> int:
        self._thread.join(ENDED_S)
        assert self.status is not None, "the request was never answered"
        return self.status


def wait_running(engine: EngineProcess) -> None:
    """Wait until the engine works on a request."""
    for _ in range(2400):
        if re.search(r"^toka_running [1-9]", engine.read("/metrics"), re.M):  # all of them may have begun
            return
        threading.Event().wait(0.05)  # metrics are asked, they do not tell
    raise AssertionError("nothing runs")


def wait_not_ready(engine: EngineProcess) -> None:
    deadline = time.monotonic() + NOT_READY_S
    while time.monotonic() < deadline:
        if engine.get("/readyz", timeout_s=1.0) != 200:
            return
        threading.Event().wait(0.02)
    raise AssertionError("still ready")


def assert_ended(engine: EngineProcess, code: ExitCode, victim: str) -> None:
    assert engine.wait_end(ENDED_S) == code
    assert victim in engine.last_words()
    assert [name for name, pid in engine.children.items() if is_alive(pid)] == []
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", engine.port))
        again.listen()


@pytest.mark.parametrize("victim", CHILDREN)
@pytest.mark.parametrize("fault", FAULTS)
def test_idle(tmp_path: Path, fault: str, victim: str) -> None:
    signum, code = FAULTS[fault]
    with running_engine(tmp_path) as engine:
        engine.wait_ready()
        assert engine.get("/readyz") == 200
        engine.signal(signum, victim)
        wait_not_ready(engine)
        assert_ended(engine, code, victim)


@pytest.mark.parametrize("victim", CHILDREN)
@pytest.mark.parametrize("fault", FAULTS)
def test_while_loading(tmp_path: Path, fault: str, victim: str) -> None:
    signum, code = FAULTS[fault]
    with running_engine(tmp_path) as engine:
        engine.wait_for_log("process=model phase=load")
        engine.signal(signum, victim)
        assert_ended(engine, code, victim)


@pytest.mark.parametrize("victim", CHILDREN)
@pytest.mark.parametrize("fault", FAULTS)
def test_during_prefill_a_waiting_request_gets_503(tmp_path: Path, fault: str, victim: str) -> None:
    signum, code = FAULTS[fault]
    with running_engine(tmp_path) as engine:
        engine.wait_ready()
        requests = [Request(engine, LONG_PROMPT), Request(engine)]
        wait_running(engine)
        engine.signal(signum, victim)
        wait_not_ready(engine)
        expected = 0 if victim == "server" else 503
        assert [request.wait() for request in requests] == [expected, expected]
        assert_ended(engine, code, victim)


@pytest.mark.parametrize("victim", CHILDREN)
@pytest.mark.parametrize("fault", FAULTS)
def test_during_decode_a_stream_ends_with_an_error(tmp_path: Path, fault: str, victim: str) -> None:
    signum, code = FAULTS[fault]
    with running_engine(tmp_path) as engine:
        engine.wait_ready()
        request = Request(engine, stream=True)
        assert request.first_chunk.wait(60.0)
        engine.signal(signum, victim)
        wait_not_ready(engine)
        request.wait()
        assert b"[DONE]" not in request.body
        if victim != "server":
            assert b'"error"' in request.body.strip().rpartition(b"data:")[2]
        assert_ended(engine, code, victim)


@pytest.mark.parametrize("victim", CHILDREN)
@pytest.mark.parametrize("fault", FAULTS)
def test_during_a_drain(tmp_path: Path, fault: str, victim: str) -> None:
    signum, code = FAULTS[fault]
    with running_engine(tmp_path, "drain_endpoint_delay_s=60") as engine:
        engine.wait_ready()
        request = Request(engine)
        wait_running(engine)
        engine.signal(signal.SIGTERM)
        wait_not_ready(engine)
        engine.signal(signum, victim)
        assert request.wait() == (0 if victim == "server" else 503)
        assert_ended(engine, code, victim)


def test_a_drain_takes_requests_for_a_while_and_finishes_streams(tmp_path: Path) -> None:
    with running_engine(tmp_path, "drain_endpoint_delay_s=3") as engine:
        engine.wait_ready()
        request = Request(engine, stream=True, max_tokens=200)
        assert request.first_chunk.wait(60.0)
        engine.signal(signal.SIGTERM)
        wait_not_ready(engine)
        connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
        body = json.dumps({"model": "m", "prompt": "Hi", "max_tokens": 1})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        assert (response.getheader("Connection") or "").lower() == "close"
        connection.close()
        assert engine.wait_end() == ExitCode.OK
        assert request.wait() == 200
        assert b"[DONE]" in request.body


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        engine.wait_ready()
        request = Request(engine, stream=True)
        assert request.first_chunk.wait(60.0)
        engine.signal(signal.SIGTERM)
        engine.wait_for_log("event=drain")
        engine.signal(signal.SIGTERM)
        assert engine.wait_end(ENDED_S) == ExitCode.OK
        assert b"[DONE]" not in request.body


def test_sigterm_while_loading_ends_with_zero(tmp_path: Path) -> None:
    with running_engine(tmp_path) as engine:
        engine.wait_for_log("process=model phase=load")
        engine.signal(signal.SIGTERM)
        assert engine.wait_end(ENDED_S) == ExitCode.OK
        assert [name for name, pid in engine.children.items() if is_alive(pid)] == []
