"""Engines without a seed draw from noise of their own; all processes of one engine draw from the same."""

from __future__ import annotations

import re

from toka_engine.config import EngineConfig
from toka_engine.noise import for_replica, settle_seed

from tests.unit.engine.conftest import StartEngine

_GIVEN = re.compile(r"event=given process=(\w+) seed=(\w+)")


def seeds_of_an_engine(start_engine: StartEngine, *arguments: str) -> set[str]:
    """Return the one seed that its processes were given, and the one that the log states."""
    engine = start_engine(*arguments)
    engine.wait_ready()
    engine.wait_for_log("event=given process=server")
    found = dict(_GIVEN.findall(engine.log))
    assert set(found) == {"server", "manager", "model"}
    assert f"event=seed value={found['model']} " in engine.log
    return {*found.values()}


def test_every_start_without_a_seed_has_one_of_its_own_that_its_processes_share(start_engine: StartEngine) -> None:
    starts = [seeds_of_an_engine(start_engine) for _ in range(3)]
    assert [len(seeds) for seeds in starts] == [1, 1, 1]
    assert len(set.union(*starts)) == 3


def test_a_seed_that_is_given_is_used_as_it_is(start_engine: StartEngine) -> None:
    assert seeds_of_an_engine(start_engine, "seed=0") == {"0"}
    assert seeds_of_an_engine(start_engine, f"seed={2**63 - 1}") == {str(2**63 - 1)}


def test_replicas_of_one_engine_differ_and_the_ranks_of_each_share(start_engine: StartEngine) -> None:
    engine = start_engine("seed=7", topology="2,1,2")
    engine.wait_ready()
    found = dict(_GIVEN.findall(engine.log))
    first, second = ({found[f"model_dp{dp}_tp{tp}"] for tp in range(2)} | {found[f"manager_dp{dp}"]} for dp in range(2))
    assert first == {"7"}
    assert len(second) == 1
    assert second != first
    assert second == {str(for_replica(EngineConfig(seed=7), 1).seed)}, "a given seed repeats every replica's noise"


def test_entropy_fills_all_bits_of_a_seed() -> None:
    seeds = [settle_seed(EngineConfig()).seed for _ in range(200)]
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert len({*seeds}) == 200
    for bit in range(63):
        assert {seed >> bit & 1 for seed in seeds if seed is not None} == {0, 1}
