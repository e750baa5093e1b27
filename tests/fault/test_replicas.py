"""A process of one of two real replicas killed or stopped in the middle of requests, with and without a minimum."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import pytest
from toka_engine.errors import ExitCode

from tests.engine_process import EngineProcess, is_alive
from tests.fault.test_processes import ENDED_S, Request, assert_ended, running_engine, wait_not_ready

PAIR = ("dp_size=2", "num_threads=1", "drain_endpoint_delay_s=0")


def running_of(engine: EngineProcess) -> dict[int, int]:
    """Streams that run, by replica."""
    found = re.findall(r'^toka_replica_running\{replica="(\d)"\} (\d+)', engine.read("/metrics"), re.MULTILINE)
    return {int(replica): int(count) for replica, count in found}


def start_streams(engine: EngineProcess) -> dict[int, Request]:
    """A stream in each replica, whose first token has come; by replica."""
    requests: dict[int, Request] = {}
    for _ in range(2):
        before = running_of(engine)
        request = Request(engine, stream=True)
        assert request.first_chunk.wait(60.0)
        while not (grown := [one for one, count in running_of(engine).items() if count > before.get(one, 0)]):
            threading.Event().wait(0.05)  # metrics are asked, they do not tell
        requests[grown[0]] = request
    assert set(requests) == {0, 1}
    return requests


@pytest.mark.parametrize("victim", ["model_dp1", "manager_dp0"])
def test_by_default_a_killed_process_of_any_replica_ends_the_engine(tmp_path: Path, victim: str) -> None:
    with running_engine(tmp_path, *PAIR) as engine:
        engine.wait_ready()
        requests = start_streams(engine)
        engine.signal(signal.SIGKILL, victim)
        wait_not_ready(engine)
        for request in requests.values():
            request.wait()
            assert b'"error"' in request.body.strip().rpartition(b"data:")[2]
        assert_ended(engine, ExitCode.PROCESS_DIED, victim)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_with_a_minimum_the_other_replica_goes_on(tmp_path: Path, signum: signal.Signals) -> None:
    with running_engine(tmp_path, *PAIR, "dp_min_size=1") as engine:
        engine.wait_ready()
        requests = start_streams(engine)
        lost, kept = requests[1], requests[0]
        engine.signal(signum, "model_dp1")
        assert lost.wait() == 200, "its headers had been sent"
        assert b'"error"' in lost.body.strip().rpartition(b"data:")[2]
        # The server, whose link has ended, may say so before the supervisor, which says why.
        engine.wait_for_log("logger=toka.supervisor event=replica_lost replica=1 left=1")
        assert re.search(r"model_dp1 (was ended by SIGKILL|has not answered)", engine.log)
        deadline = time.monotonic() + ENDED_S
        while any(is_alive(engine.children[name]) for name in ("manager_dp1", "model_dp1")):
            assert time.monotonic() < deadline
        while engine.get("/readyz") != 200:
            assert time.monotonic() < deadline
        assert re.search(r"^toka_replicas 1", engine.read("/metrics"), re.MULTILINE)
        assert [Request(engine, max_tokens=4).wait() for _ in range(3)] == [200, 200, 200]
        assert kept.status is None, "the other replica's stream runs"
        engine.signal(signal.SIGKILL, "model_dp0")
        assert_ended(engine, ExitCode.PROCESS_DIED, "model_dp0")
