"""The throughput benchmark measures a real engine: what the clients saw, what the engine counted, the roofline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine_process import ROOT, hold_port

SETTINGS = ("device=cpu", "dtype=float32", "num_threads=1", "kv_cache_num_tokens=4096", "drain_endpoint_delay_s=0")
CHAT = "chat:N=6,C=4,PL=100,OL=9"
MONKEYS = "monkeys:P=2,n=8,PL=128,OL=5"


@pytest.fixture(scope="module")
def report(tiny: Path) -> dict[str, Any]:
    held, port = hold_port()
    with held:
        done = subprocess.run(
            [
                sys.executable, "-m", "toka_engine.benchmarks.throughput", str(tiny), CHAT, MONKEYS, "runs=2",
                "clients=2", f"port={port}", "flops_per_s=1e11", *SETTINGS,
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT / "engine"), "OMP_WAIT_POLICY": "passive"},
            capture_output=True,
            text=True,
            timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    whole: dict[str, Any] = json.loads(done.stdout)
    return whole


@pytest.mark.slow
def test_every_token_of_every_client_is_counted(report: dict[str, Any]) -> None:
    chat, monkeys = report["workloads"][CHAT], report["workloads"][MONKEYS]
    assert (chat["errors"], monkeys["errors"]) == (0, 0), (chat["first_errors"], monkeys["first_errors"])
    assert (chat["output_tokens"], monkeys["output_tokens"]) == (6 * 9, 2 * 8 * 5)
    assert chat["output_tokens_per_s"] > 0
    assert len(chat["output_tokens_per_s_of_runs"]) == 2
    for figure in ("latency_ms", "first_token_ms", "inter_token_ms"):
        assert 0 < chat[figure]["p50"] <= chat[figure]["p90"] <= chat[figure]["p99"]
    assert monkeys["first_token_ms"] is None, "it is not streamed"


@pytest.mark.slow
def test_the_engines_own_figures_are_of_the_run(report: dict[str, Any]) -> None:
    chat, monkeys = (report["workloads"][name]["engine"] for name in (CHAT, MONKEYS))
    assert chat["steps"] >= 2 * 9, "six requests, four at a time, take two rounds at least"
    assert (chat["output_tokens"], monkeys["output_tokens"]) == (6 * 9, 2 * 8 * 5)
    for counted in (chat, monkeys):
        assert 0 < counted["busy_share"] <= 1.01
        assert counted["worker_cpu_ms_per_step"] > 0
        assert counted["manager_cpu_ms_per_step"] > 0
        assert counted["preemptions"] == 0
    assert report["kv_cache_tokens"] == 4096


@pytest.mark.slow
def test_the_prefix_cache_serves_what_a_workload_shares_and_nothing_of_earlier_runs(report: dict[str, Any]) -> None:
    assert report["workloads"][CHAT]["engine"]["prefix_hit_tokens"] == 0
    # The second prompt may find the 96 tokens that both share; nothing else has been seen before.
    assert report["workloads"][MONKEYS]["engine"]["prefix_hit_tokens"] <= 96


@pytest.mark.slow
def test_limits_are_measured_where_they_are_not_given_and_bound_the_speed(report: dict[str, Any]) -> None:
    assert report["limits"]["flops_per_s"] == 1e11
    assert report["limits"]["bytes_per_s"] == report["machine"]["copy_bytes_per_s"] > 1e7
    assert (report["machine"]["device"], report["machine"]["dtype"], report["machine"]["threads"]) == (
        "cpu", "float32", 1,
    )  # fmt: skip
    for workload in report["workloads"].values():
        roofline = workload["roofline"]
        assert 0 < roofline["fraction"] < 1
        assert sum(roofline["parts_s"].values()) == pytest.approx(roofline["seconds"], abs=3e-4)
    assert report["ready_s"] > 0


def test_a_bad_workload_ends_before_an_engine_starts(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "toka_engine.benchmarks.throughput", str(tiny), "chat:X=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "engine")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'X'" in done.stderr
