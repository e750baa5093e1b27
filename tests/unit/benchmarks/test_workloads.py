"""Workloads are what their text says, each run has prompts of its own, and the figures are what they claim to be."""

from __future__ import annotations

import pytest
from toka_engine.benchmarks.client import Result, merge
from toka_engine.benchmarks.figures import medians, percentiles_ms
from toka_engine.benchmarks.throughput import parse_arguments
from toka_engine.benchmarks.workloads import NAMES, WorkloadError, make_workload
from toka_engine.errors import ConfigError


def test_keys_behind_the_name_change_the_workload() -> None:
    workload = make_workload("monkeys:P=3,n=5,PL=16,OL=7,T=0.5,top_p=0.9,top_k=20,seed=0", 1.0, 1, 1000)
    assert [(len(each.prompt), each.max_tokens, each.num_choices) for each in workload.requests] == [(16, 7, 5)] * 3
    assert workload.num_shared == 12
    assert len({tuple(each.prompt[:12]) for each in workload.requests}) == 1
    assert len({tuple(each.prompt) for each in workload.requests}) == 3
    assert workload.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "seed": 0}
    assert (workload.concurrency, workload.is_streamed) == (4096, False)
    assert make_workload("chat:C=3,N=4,PL=1,OL=1", 1.0, 1, 1000).is_streamed


@pytest.mark.parametrize("name", NAMES)
def test_no_run_begins_with_tokens_of_another(name: str) -> None:
    runs = [make_workload(name, 0.01, seed, 128_000) for seed in range(3)]
    assert make_workload(name, 0.01, 0, 128_000) == runs[0]
    firsts = [{tuple(request.prompt[:4]) for request in run.requests} for run in runs]
    assert len(set.union(*firsts)) == sum(map(len, firsts))


def test_scale_shrinks_the_number_of_requests_alone() -> None:
    whole, part = make_workload("chat:N=64", 1.0, 1, 1000), make_workload("chat:N=64", 0.25, 1, 1000)
    assert (len(whole.requests), len(part.requests), len(part.requests[0].prompt)) == (64, 16, 512)
    assert len(make_workload("single", 1e-6, 1, 1000).requests) == 1


def test_small_vocabularies_are_kept_to() -> None:
    ids = [token for request in make_workload("prefill:N=2,PL=500", 1.0, 1, 40).requests for token in request.prompt]
    assert min(ids) >= 20
    assert max(ids) < 40


def test_parts_for_several_clients_are_the_whole() -> None:
    whole = make_workload("chat:N=10,C=7,PL=2,OL=1", 1.0, 1, 1000)
    parts = [whole.part(index, 3) for index in range(3)]
    assert sorted(len(part.requests) for part in parts) == [3, 3, 4]
    assert sum(part.concurrency for part in parts) == 7
    assert {tuple(r.prompt) for part in parts for r in part.requests} == {tuple(r.prompt) for r in whole.requests}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("chats", "chats"), ("chat:X=1", "X"), ("single:C=2", "C"), ("chat:N=0", "N"), ("chat:N=x", "N"),
        ("chat:N=", "N"), ("chat:T=-1", "T"), ("chat:T=nan", "T"), ("single:top_p=1.5", "top_p"),
        ("single:seed=-1", "seed"), ("single:top_k=0.5", "top_k"), ("monkeys:PL=2", "PL"),
    ],
)  # fmt: skip
def test_what_is_no_workload_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(WorkloadError, match=named):
        make_workload(text, 1.0, 1, 1000)


def test_arguments_are_told_apart() -> None:
    folder, names, config, settings = parse_arguments(
        ["models/x=y", "chat:C=8,N=2", "runs=5", "dtype=float32", "single"]
    )
    assert (str(folder), names, config.runs, settings) == (
        "models/x=y", ["chat:C=8,N=2", "single"], 5, {"dtype": "float32"}
    )  # fmt: skip
    assert parse_arguments(["folder"])[1] == list(NAMES)


@pytest.mark.parametrize(
    ("arguments", "named"), [(["m", "runs=0"], "runs"), (["m", "no_such=1"], "no_such"), (["runs=1"], "folder")]
)
def test_a_bad_key_is_named_before_anything_starts(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_arguments(arguments)


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentiles_ms([0.001 * value for value in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles_ms([0.003, 0.001, 0.002]) == {"p50": 2.0, "p90": 3.0, "p99": 3.0}
    assert percentiles_ms([0.25]) == {"p50": 250.0, "p90": 250.0, "p99": 250.0}
    assert percentiles_ms([]) is None


def test_the_median_of_runs_is_taken_figure_by_figure() -> None:
    runs = [
        {"a": 1, "b": {"p50": 9.0}, "c": None},
        {"a": 5, "b": {"p50": 7.0}, "c": None},
        {"a": 2, "b": {"p50": 8.0}, "c": None},
    ]
    assert medians(runs) == {"a": 2, "b": {"p50": 8.0}, "c": None}


def test_clients_are_merged_into_one() -> None:
    first = Result(10, [1.0], [0.1], [0.2], 1, ["x"], began_s=5.0, ended_s=8.0, cpu_share=0.2)
    second = Result(20, [2.0], [0.3], [], 2, ["y", "z"], began_s=4.0, ended_s=7.0, cpu_share=0.6)
    whole = merge([first, second])
    assert (whole.output_tokens, whole.latencies_s, whole.first_s, whole.gaps_s) == (30, [1.0, 2.0], [0.1, 0.3], [0.2])
    assert (whole.num_errors, whole.errors, whole.seconds, whole.cpu_share) == (3, ["x", "y"], 4.0, 0.6)
