"""The throughput benchmark's figures of one run, from what the clients and the engine counted."""

from __future__ import annotations

import math

from toka_engine.benchmarks.client import Result
from toka_engine.benchmarks.throughput import count_engine, summarize
from toka_engine.benchmarks.workloads import Request, Workload

WORKLOAD = Workload([Request([1] * 30, 5), Request([1] * 10, 3)], 2)
NAMES = (
    "steps", "step_busy_seconds", "model_cpu_seconds", "manager_cpu_seconds", "output_tokens", "preemptions",
    "prefix_hit_tokens", "hydragen_rows",
)  # fmt: skip


def metrics(**totals: float) -> dict[str, float]:
    return {f"toka_{name}_total": totals.get(name, 0.0) for name in NAMES}


def test_rates_are_the_runs_tokens_by_its_seconds() -> None:
    figures = summarize(WORKLOAD, Result(output_tokens=8, latencies_s=[1.0, 2.0], began_s=100.0, ended_s=102.0))
    assert (figures["requests"], figures["seconds"], figures["output_tokens"]) == (2, 2.0, 8)
    assert (figures["output_tokens_per_s"], figures["input_tokens_per_s"]) == (4.0, 20.0)
    assert figures["latency_ms"] == {"p50": 1000.0, "p90": 2000.0, "p99": 2000.0}
    assert figures["first_token_ms"] is None


def test_the_engines_figures_are_what_grew_during_the_run() -> None:
    before = metrics(steps=10, output_tokens=100, step_busy_seconds=7, model_cpu_seconds=1, manager_cpu_seconds=2)
    after = metrics(steps=14, output_tokens=118, step_busy_seconds=8, model_cpu_seconds=1.2, manager_cpu_seconds=2.02)
    counted = count_engine(before, after, seconds=2.0, peak_running=6)
    assert (counted["steps"], counted["output_tokens"], counted["output_tokens_per_step"]) == (4, 18, 4.5)
    assert (counted["busy_ms_per_step"], counted["busy_share"]) == (250.0, 0.5)
    assert (counted["worker_cpu_ms_per_step"], counted["manager_cpu_ms_per_step"]) == (50.0, 5.0)
    assert counted["peak_running"] == 6


def test_a_run_without_a_step_has_no_figures_per_step() -> None:
    counted = count_engine(metrics(), metrics(), seconds=1.0, peak_running=0)
    assert counted["steps"] == 0
    assert all(math.isnan(counted[name]) for name in counted if name.endswith("per_step"))
