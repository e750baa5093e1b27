"""The supervisor with stand-in children: every way to end, and what is left afterwards."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from toka_engine.errors import ExitCode

from tests.engine_process import EngineProcess, is_alive
from tests.marks import rest_is_slow
from tests.unit.engine.conftest import StartEngine

CHILDREN = ("server", "manager", "model")


def assert_nothing_is_left(engine: EngineProcess) -> None:
    assert set(engine.children) == set(CHILDREN)
    assert [name for name, pid in engine.children.items() if is_alive(pid)] == []


def test_the_engine_is_ready_when_all_three_children_are(start_engine: StartEngine) -> None:
    engine = start_engine()
    engine.wait_ready()
    assert set(engine.children) == set(CHILDREN)


def test_sigterm_drains_through_the_server_and_ends_with_zero(start_engine: StartEngine) -> None:
    engine = start_engine()
    engine.wait_ready()
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK
    assert "event=told what=drain" in engine.log
    assert not engine.termination_log.exists()
    assert_nothing_is_left(engine)


@pytest.mark.slow
def test_sigint_drains_like_sigterm(start_engine: StartEngine) -> None:
    engine = start_engine()
    engine.wait_ready()
    engine.signal(signal.SIGINT)
    assert engine.wait_end() == ExitCode.OK
    assert "event=told what=drain" in engine.log


def test_a_second_sigterm_ends_a_drain_that_does_not_finish(start_engine: StartEngine) -> None:
    engine = start_engine("drain_timeout_s=3600", drain="never")
    engine.wait_ready()
    engine.signal(signal.SIGTERM)
    engine.wait_for_log("event=told what=drain")
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK
    assert_nothing_is_left(engine)


def test_a_sigterm_that_comes_after_the_end_was_decided_does_not_change_the_exit_code() -> None:
    program = (
        "import os, signal; from toka_engine.signals import SignalFd\n"
        "with SignalFd(signal.SIGTERM): pass\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert run_python("-c", program).returncode == 0


def test_a_drain_that_never_finishes_is_ended_by_its_timeout(start_engine: StartEngine) -> None:
    engine = start_engine("drain_timeout_s=0", "drain_endpoint_delay_s=0", drain="never", drain_margin_s="1")
    engine.wait_ready()
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK
    assert "event=drain_timeout" in engine.log


def test_sigterm_while_loading_ends_with_zero_without_a_drain(start_engine: StartEngine) -> None:
    engine = start_engine(model="hold")
    engine.wait_for_log("event=progress process=model")
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK
    assert "event=told what=drain" not in engine.log
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("victim", CHILDREN)
@pytest.mark.parametrize("signum", rest_is_slow([signal.SIGKILL], [signal.SIGKILL, signal.SIGSEGV]))
def test_a_killed_child_ends_the_engine_and_is_named(
    start_engine: StartEngine, victim: str, signum: signal.Signals
) -> None:
    engine = start_engine()
    engine.wait_ready()
    engine.signal(signum, victim)
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert engine.last_words() == f"EngineProcessDied: {victim} was ended by {signum.name}"
    assert engine.log.rstrip().endswith(f"toka: {engine.last_words()}")
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("victim", ["manager", "model"])
def test_the_server_is_told_who_died_before_everything_ends(start_engine: StartEngine, victim: str) -> None:
    engine = start_engine()
    engine.wait_ready()
    engine.signal(signal.SIGKILL, victim)
    engine.wait_end()
    assert f"event=told what=failing process={victim}" in engine.log


@pytest.mark.parametrize("victim", rest_is_slow(["model"], CHILDREN))
def test_a_stopped_child_is_a_stall_and_is_named(start_engine: StartEngine, victim: str) -> None:
    engine = start_engine()
    engine.wait_ready()
    engine.signal(signal.SIGSTOP, victim)
    assert engine.wait_end() == ExitCode.PROCESS_STALLED
    assert engine.last_words().startswith(f"EngineProcessStalled: {victim} has not answered")
    assert_nothing_is_left(engine)


def test_a_child_that_answers_again_in_time_is_forgiven(start_engine: StartEngine) -> None:
    engine = start_engine()
    engine.wait_ready()
    engine.signal(signal.SIGSTOP, "model")
    engine.wait_for_log("event=told what=silent process=model")
    engine.signal(signal.SIGCONT, "model")
    engine.wait_for_log("event=told what=silent process=none")
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK


def test_a_stopped_supervisor_does_not_take_its_own_pause_for_a_stall(start_engine: StartEngine) -> None:
    engine = start_engine()
    engine.wait_ready()
    for pid in [engine.pid, *engine.children.values()]:
        os.kill(pid, signal.SIGSTOP)
    threading.Event().wait(4.0)  # longer than a stall: the pause itself is what is tested
    for pid in [*engine.children.values(), engine.pid]:
        os.kill(pid, signal.SIGCONT)
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK


def test_a_child_in_one_long_step_is_no_stall(start_engine: StartEngine) -> None:
    engine = start_engine(model="busy")
    engine.wait_ready()
    with pytest.raises(subprocess.TimeoutExpired):
        engine.wait_end(5.0)  # longer than a stall
    assert "event=silent" not in engine.log


def test_a_step_that_never_ends_is_a_stall(start_engine: StartEngine) -> None:
    engine = start_engine(model="busy", max_busy_s="1")
    assert engine.wait_end() == ExitCode.PROCESS_STALLED
    assert engine.last_words().startswith("EngineProcessStalled: model has been in one step for")


def test_a_childs_own_error_decides_the_code_and_the_last_words(start_engine: StartEngine) -> None:
    engine = start_engine(model="memory")
    assert engine.wait_end() == ExitCode.OUT_OF_MEMORY
    assert engine.last_words() == "OutOfMemory: model: 1 GB short"


def test_a_defect_in_a_child_is_a_death_with_its_exception_as_last_words(start_engine: StartEngine) -> None:
    engine = start_engine(manager="crash")
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert engine.last_words() == "EngineProcessDied: manager: RuntimeError: a defect"
    assert "Traceback" in engine.log


def test_the_process_that_went_first_is_blamed_not_those_that_followed(start_engine: StartEngine) -> None:
    engine = start_engine(manager="peer", server="peer")
    engine.wait_ready()
    engine.signal(signal.SIGKILL, "model")
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert "model was ended by SIGKILL" in engine.last_words()


def test_a_death_while_loading_ends_the_engine(start_engine: StartEngine) -> None:
    engine = start_engine(model="hold")
    engine.wait_for_log("event=progress process=model")
    engine.signal(signal.SIGKILL, "model")
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert "model was ended by SIGKILL" in engine.last_words()


def test_a_death_while_draining_is_an_error(start_engine: StartEngine) -> None:
    engine = start_engine(drain="never")
    engine.wait_ready()
    engine.signal(signal.SIGTERM)
    engine.wait_for_log("event=told what=drain")
    engine.signal(signal.SIGKILL, "model")
    assert engine.wait_end() == ExitCode.PROCESS_DIED


def test_children_end_with_a_killed_supervisor(start_engine: StartEngine) -> None:
    engine = start_engine()
    engine.wait_ready()
    pidfds = [os.pidfd_open(pid) for pid in engine.children.values()]
    engine.signal(signal.SIGKILL)
    engine.wait_end()
    for pidfd in pidfds:
        with os.fdopen(pidfd) as end:
            wait_readable(end.fileno())
    assert_nothing_is_left(engine)


def test_a_taken_port_is_told_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_toka(f"port={port}", "host=127.0.0.1")
    assert result.returncode == ExitCode.PORT_IN_USE
    assert f"port {port} is taken" in result.stderr
    assert "event=started" not in result.stderr


def test_two_engines_cannot_share_a_port_even_while_the_first_loads(start_engine: StartEngine) -> None:
    engine = start_engine(model="hold", server="hold")
    engine.wait_for_log("event=progress process=model")
    result = run_toka(f"port={engine.port}", "host=127.0.0.1")
    assert result.returncode == ExitCode.PORT_IN_USE


def test_nothing_holds_the_port_once_the_server_is_gone(start_engine: StartEngine) -> None:
    engine = start_engine()
    engine.wait_ready()
    engine.signal(signal.SIGKILL, "server")
    engine.wait_end()
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", engine.port))
        again.listen()


if sys.platform == "linux":  # elsewhere there are no containers whose process 1 the engine could be

    def test_orphans_are_reaped_as_process_1_of_a_container_must(start_engine: StartEngine) -> None:
        engine = start_engine(model="orphan", subreaper="1")
        engine.wait_for_log("event=orphan pid=")
        pid = int(engine.log.partition("event=orphan pid=")[2].split()[0])
        for _ in range(600):
            if not psutil.pid_exists(pid):
                return
            threading.Event().wait(0.05)  # no event tells that another process's child was reaped
        raise AssertionError("the orphan is still a zombie")


def run_toka(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "toka_engine", *arguments)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def wait_readable(fd: int) -> None:
    assert select.select([fd], [], [], 60.0)[0], "the process did not end"
