"""The supervisor of several replicas, with stand-in children: names, blame, and going on with those that are left."""

from __future__ import annotations

import re
import signal

import pytest
from toka_engine.errors import ExitCode

from tests.engine_process import EngineProcess, is_alive
from tests.marks import rest_is_slow
from tests.unit.engine.conftest import StartEngine

PAIR = {"server", "manager_dp0", "manager_dp1", "model_dp0", "model_dp1"}


def alive(engine: EngineProcess) -> set[str]:
    return {name for name, pid in engine.children.items() if is_alive(pid)}


def wait_lost(engine: EngineProcess, replica: int) -> str:
    """Wait until the server has been told; return the reason that it was given."""
    engine.wait_for_log(f"event=told what=replica_lost replica={replica}")
    (reason,) = re.findall(rf"what=replica_lost replica={replica} reason=['\"](.*)['\"]", engine.log)
    return str(reason)


def test_each_replica_has_a_manager_and_a_model_worker_and_noise_of_its_own(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=2", "seed=5")
    engine.wait_ready()
    assert set(engine.children) == alive(engine) == PAIR
    engine.wait_for_log("event=given process=model_dp1")
    seeds = dict(re.findall(r"event=given process=(\w+) seed=(\w+)", engine.log))
    assert seeds["server"] == seeds["manager_dp0"] == seeds["model_dp0"] == "5"
    assert seeds["manager_dp1"] == seeds["model_dp1"] != "5"


@pytest.mark.parametrize("victim", rest_is_slow(["model_dp1"], sorted(PAIR)))
def test_any_death_ends_the_engine_by_default_and_names_the_one(start_engine: StartEngine, victim: str) -> None:
    # Each manager ends when its model worker does: it must not be blamed for that.
    engine = start_engine("dp_size=2", manager_dp0="peer", manager_dp1="peer")
    engine.wait_ready()
    engine.signal(signal.SIGKILL, victim)
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert engine.last_words() == f"EngineProcessDied: {victim} was ended by SIGKILL"
    assert alive(engine) == set()


@pytest.mark.parametrize("victim", rest_is_slow(["model_dp1"], ["model_dp1", "manager_dp0"]))
def test_with_a_minimum_the_others_go_on_and_the_rest_of_the_replica_ends(
    start_engine: StartEngine, victim: str
) -> None:
    engine = start_engine("dp_size=2", "dp_min_size=1", manager_dp0="peer", manager_dp1="peer")
    engine.wait_ready()
    engine.signal(signal.SIGKILL, victim)
    lost = victim[-1]
    assert wait_lost(engine, int(lost)) == f"{victim} was ended by SIGKILL"
    assert f"event=replica_lost replica={lost} left=1 reason=EngineProcessDied" in engine.log
    survivors = {"server", *(name for name in PAIR if name.endswith(f"dp{1 - int(lost)}"))}
    while alive(engine) != survivors:
        assert survivors <= alive(engine)
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK
    assert "event=told what=failing" not in engine.log
    assert engine.log.count("event=told what=replica_lost") == 1


def test_the_process_to_blame_may_end_after_the_one_that_it_took_with_it(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=2", "dp_min_size=1", manager_dp1="peer", model_dp1="late")
    engine.wait_ready()
    engine.signal(signal.SIGUSR1, "model_dp1")
    assert wait_lost(engine, 1) == "model_dp1 was ended by SIGKILL"


def test_a_replica_is_lost_though_nobody_is_found_to_blame(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=3", "dp_min_size=2", manager_dp1="peer", model_dp1="deserter")
    engine.wait_ready()
    engine.signal(signal.SIGUSR1, "model_dp1")
    assert wait_lost(engine, 1) == "manager_dp1: a process beside it is gone (the peer closed the channel)"
    assert engine.log.count("event=replica_lost replica=1 left=2") == 1
    engine.signal(signal.SIGKILL, "manager_dp2")
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert engine.last_words() == "EngineProcessDied: manager_dp2 was ended by SIGKILL"


def test_fewer_than_the_minimum_end_the_engine(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=3", "dp_min_size=2")
    engine.wait_ready()
    engine.signal(signal.SIGKILL, "model_dp1")
    wait_lost(engine, 1)
    engine.signal(signal.SIGKILL, "manager_dp2")
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert engine.last_words() == "EngineProcessDied: manager_dp2 was ended by SIGKILL"


def test_a_replica_that_hangs_is_lost_as_one_that_died(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=2", "dp_min_size=1")
    engine.wait_ready()
    engine.signal(signal.SIGSTOP, "model_dp0")
    engine.wait_for_log("event=told what=silent process=model_dp0")
    assert wait_lost(engine, 0).startswith("model_dp0 has not answered for 3.0 s")
    engine.wait_for_log("event=told what=silent process=none")
    assert "reason=EngineProcessStalled" in engine.log
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK


def test_the_loss_of_a_replica_during_a_drain_does_not_end_it(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=2", "dp_min_size=1", drain="never")
    engine.wait_ready()
    engine.signal(signal.SIGTERM)
    engine.wait_for_log("event=told what=drain")
    engine.signal(signal.SIGKILL, "model_dp0")
    wait_lost(engine, 0)
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK


@pytest.mark.parametrize(("behaviour", "code"), [("memory", ExitCode.OUT_OF_MEMORY), ("crash", ExitCode.PROCESS_DIED)])
def test_a_replica_that_does_not_start_ends_the_engine(
    start_engine: StartEngine, behaviour: str, code: ExitCode
) -> None:
    engine = start_engine("dp_size=2", "dp_min_size=1", model_dp1=behaviour, model_dp0="hold")
    assert engine.wait_end() == code
    assert "model_dp1" in engine.last_words()


def test_the_server_is_needed_whatever_the_minimum_is(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=2", "dp_min_size=1")
    engine.wait_ready()
    engine.signal(signal.SIGKILL, "server")
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert engine.last_words() == "EngineProcessDied: server was ended by SIGKILL"
