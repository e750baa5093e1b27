"""The supervisor of several ranks, with stand-in children: who is named when nothing moves, also while they start."""

from __future__ import annotations

import re
import signal

import pytest
from toka_engine.errors import ExitCode

from tests.marks import rest_is_slow
from tests.unit.engine.conftest import StartEngine

TP2 = {"topology": "1,1,2"}
QUICK = {"beats": "4"}


def test_a_rank_that_lags_is_named_and_so_is_the_one_that_waits(start_engine: StartEngine) -> None:
    engine = start_engine(model_tp0="ahead", **TP2, **QUICK)
    assert engine.wait_end() == ExitCode.PROCESS_STALLED
    words = "model_tp1 has not begun step 1; model_tp0 waits for it"
    assert engine.last_words() == f"EngineProcessStalled: {words}"
    assert "event=told what=failing process=model_tp1" in engine.log


def test_ranks_that_took_different_branches_are_both_named(start_engine: StartEngine) -> None:
    engine = start_engine(model_tp0="done", model_tp1="in_step", **TP2, **QUICK)
    assert engine.wait_end() == ExitCode.PROCESS_STALLED
    assert "model_tp1 is in step 1, which model_tp0 has ended" in engine.last_words()


def test_a_step_that_no_gpu_ends_is_a_stall(start_engine: StartEngine) -> None:
    engine = start_engine(model_tp0="in_step", model_tp1="in_step", device="cuda", **TP2, **QUICK)
    assert engine.wait_end() == ExitCode.PROCESS_STALLED
    assert "are in step 1, and none ends it" in engine.last_words()


def test_ranks_of_different_replicas_are_not_compared(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=2", model_dp0_tp0="done", model_dp0_tp1="done", topology="2,1,2", **QUICK)
    engine.wait_ready()
    for _ in range(3):
        engine.wait_for_log("event=told what=rank dp=1 tp=1 steps=0 memory=True")
    engine.wait_for_log("event=told what=rank dp=0 tp=1 steps=1 memory=True")
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK


def test_a_replica_whose_rank_lags_is_lost_and_the_others_go_on(start_engine: StartEngine) -> None:
    engine = start_engine("dp_size=2", "dp_min_size=1", model_dp1_tp1="ahead", topology="2,1,2", **QUICK)
    engine.wait_for_log("event=told what=replica_lost replica=1")
    assert "reason='model_dp1_tp0 has not begun step 1; model_dp1_tp1 waits for it'" in engine.log
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK


@pytest.mark.parametrize("victim", rest_is_slow(["model_tp1"], ["server", "manager", "model_tp1"]))
def test_a_process_that_is_stopped_while_the_engine_starts_is_named(start_engine: StartEngine, victim: str) -> None:
    engine = start_engine(model_tp0="hold", model_tp1="hold", **TP2)
    engine.wait_for_log(f"event=progress process={victim}")
    engine.signal(signal.SIGSTOP, victim)
    assert engine.wait_end(20.0) == ExitCode.PROCESS_STALLED
    assert engine.last_words() == f"EngineProcessStalled: {victim} was stopped while the engine started"


def test_a_process_that_answers_no_more_while_the_engine_starts_is_named(start_engine: StartEngine) -> None:
    engine = start_engine(model="deaf", beats="16")
    engine.wait_for_log("event=deaf")
    assert engine.wait_end(20.0) == ExitCode.PROCESS_STALLED
    assert re.fullmatch(r"EngineProcessStalled: model has not answered for \d+ s", engine.last_words())


@pytest.mark.slow
def test_a_process_that_computes_has_more_time_to_answer_than_one_that_is_locked_up(start_engine: StartEngine) -> None:
    engine = start_engine(model="hog", starved_beats="20")
    assert engine.wait_end(60.0) == ExitCode.PROCESS_STALLED
    assert engine.last_words() == "EngineProcessStalled: model has not answered for 5.0 s"
    assert "event=told what=silent process=model" in engine.log


def test_a_silence_that_only_a_start_may_have_is_forgotten_when_all_are_ready(start_engine: StartEngine) -> None:
    engine = start_engine(model="slow")
    engine.wait_ready()
    engine.signal(signal.SIGTERM)
    assert engine.wait_end() == ExitCode.OK
