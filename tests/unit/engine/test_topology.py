"""Which processes an engine has: names, links, devices, and an engine of several replicas, stages and ranks."""

from __future__ import annotations

import itertools
import re
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_engine.config import EngineConfig
from toka_engine.control_messages import RankInfo
from toka_engine.errors import ExitCode
from toka_engine.topology import (
    Role,
    Topology,
    choose_topology,
    find_next,
    find_output_rank,
    find_previous,
    make_topology,
    place_ranks,
)

from tests.engine_process import is_alive
from tests.unit.engine.conftest import StartEngine

SIZES = st.integers(1, 4)


def names_of(topology: Topology) -> list[str]:
    return [process.name for process in topology.processes]


def test_an_engine_has_a_server_a_manager_and_a_model_worker_in_this_order() -> None:
    topology = choose_topology(EngineConfig())
    assert names_of(topology) == ["server", "manager", "model"]
    assert [(link.first, link.second) for link in topology.links] == [("server", "manager"), ("manager", "model")]


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        (RankInfo(tp_size=2), ["server", "manager", "model_tp0", "model_tp1"]),
        (RankInfo(pp_size=2), ["server", "manager", "model_pp0", "model_pp1"]),
        (RankInfo(dp_size=2), ["server", "manager_dp0", "manager_dp1", "model_dp0", "model_dp1"]),
    ],
)
def test_names_tell_the_parts_of_which_there_are_several(sizes: RankInfo, names: list[str]) -> None:
    assert names_of(make_topology(sizes)) == names


@given(SIZES, SIZES, SIZES)
def test_each_rank_has_a_name_a_device_and_one_manager_of_its_replica(dp: int, pp: int, tp: int) -> None:
    topology = make_topology(RankInfo(dp_size=dp, pp_size=pp, tp_size=tp))
    names = names_of(topology)
    assert len(set(names)) == len(names) == 1 + dp + dp * pp * tp
    ranks = {process.name: process.rank for process in topology.processes}
    models = [process for process in topology.processes if process.role is Role.MODEL]
    assert [process.rank.device_index for process in models] == list(range(dp * pp * tp))
    to_models = [(link.first, link.second) for link in topology.links if link.first.startswith("manager")]
    assert sorted(model for _, model in to_models) == sorted(process.name for process in models)
    assert all(ranks[manager].dp_rank == ranks[model].dp_rank for manager, model in to_models)
    assert {link.second for link in topology.links if link.first == "server"} == set(names[1 : 1 + dp])


@given(SIZES, SIZES, SIZES)
def test_ranks_of_several_stages_form_rings_of_which_the_last_leads_to_the_first(dp: int, pp: int, tp: int) -> None:
    topology = make_topology(RankInfo(dp_size=dp, pp_size=pp, tp_size=tp))
    ranks = {process.name: process.rank for process in topology.processes}
    following = {link.first: link.second for link in topology.links if link.first.startswith("model")}
    assert len(following) == (dp * pp * tp if pp > 1 else 0)
    for first, second in following.items():
        assert ranks[second] == find_next(ranks[first])
        assert ranks[first] == find_previous(ranks[second])
        assert (ranks[second].dp_rank, ranks[second].tp_rank) == (ranks[first].dp_rank, ranks[first].tp_rank)


@given(SIZES, SIZES)
def test_a_managers_links_are_its_ranks_in_order_and_one_of_them_sends_tokens(pp: int, tp: int) -> None:
    topology = make_topology(RankInfo(dp_size=2, pp_size=pp, tp_size=tp))
    ranks = {process.name: process.rank for process in topology.processes}
    linked = [ranks[link.second] for link in topology.links if link.first == "manager_dp1"]
    assert linked == list(place_ranks(ranks["manager_dp1"]))
    assert [rank.is_output_rank for rank in linked].count(True) == 1
    output = linked[find_output_rank(ranks["manager_dp1"])]
    assert output.is_output_rank
    assert (output.pp_rank, output.tp_rank) == (pp - 1, 0)


def test_all_processes_of_a_larger_topology_start_are_named_and_end(start_engine: StartEngine) -> None:
    engine = start_engine(topology="2,2,2")
    engine.wait_ready()
    parts = itertools.product(range(2), repeat=3)
    models = [f"model_dp{dp}_pp{pp}_tp{tp}" for dp, pp, tp in parts]
    assert list(engine.children) == ["server", "manager_dp0", "manager_dp1", *models]
    for name in engine.children:
        assert f"component={name} " in engine.log
    num_links = dict(re.findall(r"event=given process=(\w+) .*links=(\d+)", engine.log))
    assert num_links["server"] == "3", "two managers and the port"
    assert num_links["manager_dp1"] == "5", "the server and four ranks"
    assert num_links["model_dp1_pp0_tp1"] == "3", "its manager, and the ranks of its ring before and behind it"
    engine.signal(signal.SIGKILL, "model_dp1_pp0_tp1")
    assert engine.wait_end() == ExitCode.PROCESS_DIED
    assert engine.last_words() == "EngineProcessDied: model_dp1_pp0_tp1 was ended by SIGKILL"
    assert [name for name, pid in engine.children.items() if is_alive(pid)] == []
