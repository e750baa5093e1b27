"""Throughput of a whole engine: starts `toka`, sends it workloads, prints one JSON object.

Usage: python -m toka_engine.benchmarks.throughput MODEL_DIR [WORKLOAD ...] [key=value ...]
`--help` lists the workloads, with the keys that each takes behind a colon (chat:C=64,N=512), and the benchmark's own
keys. Any other key goes to `toka`. All five workloads run when none is named.

Each workload is sent `runs` times and every figure is the median of the runs. Every run of every workload has prompts
of its own, so that the prefix cache serves nothing but what a workload shares on purpose; `prefix_hit_tokens` tells.
Per workload: what the clients saw (tokens/s, milliseconds to the first token and between tokens: p50, p90, p99), what
the engine counted (`engine`: milliseconds per step in which the model was busy, of the worker's CPU for launching it
and of the manager's CPU), and `roofline`: the seconds that the machine's two limits allow at best (see `roofline.py`
for what that counts) and the fraction of that speed that was reached. The limits are measured first, by `machine.py`,
unless they are given; on a CPU what others run on the machine lowers them as well as the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from toka_engine.benchmarks import workloads
from toka_engine.benchmarks.client import Job, Result, drive, drive_in_processes
from toka_engine.benchmarks.engine import (
    PeakWatch,
    measure_machine,
    read_metrics,
    read_model,
    running_engine,
    wait_idle,
    wait_until_ready,
)
from toka_engine.benchmarks.figures import medians, percentiles_ms
from toka_engine.benchmarks.roofline import Limits, ModelCosts, best_seconds, count_costs, count_work
from toka_engine.benchmarks.workloads import Request, Workload, make_workload
from toka_engine.command_line import format_keys, parse_config, parse_struct
from toka_engine.config import doc
from toka_engine.errors import ConfigError, TokaError
from toka_engine.model.model_config import read_model_config
from toka_engine.output import run_command

_MAX_VOCAB_SIZE = 128_000
"""Token ids of prompts, at most: what the peers were sent."""


Count: TypeAlias = Annotated[int, Meta(ge=1)]
Rate: TypeAlias = Annotated[float, Meta(gt=0)]


class ThroughputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of the benchmark itself."""

    scale: Annotated[float, Meta(gt=0), doc("factor on every workload's number of requests")] = 1.0
    runs: Annotated[int, Meta(ge=1), doc("how often each workload is sent, with other prompts each time")] = 3
    clients: Annotated[Count | None, doc("client processes; None: one for four CPUs, at most 4")] = None
    prompt_seed: Annotated[int, Meta(ge=0), doc("of the first run's prompts; each run counts on")] = 1
    vocab: Annotated[Count | None, doc("bounds the prompts' token ids; None: the model's, at most 128,000")] = None
    bytes_per_s: Annotated[Rate | None, doc("the machine's limit; None: measured by a copy")] = None
    flops_per_s: Annotated[Rate | None, doc("the machine's limit; None: measured by a product")] = None


@dataclass(frozen=True, slots=True)
class Bench:
    """Settings that all runs share."""

    base_url: str
    config: ThroughputConfig
    costs: ModelCosts
    limits: Limits
    vocab_size: int
    num_clients: int

    async def measure(self, names: Sequence[str], engine: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Wait for the engine, then run one workload after the other."""
        ready_s = await wait_until_ready(self.base_url, engine)
        model = await read_model(self.base_url)
        sizes = await read_metrics(self.base_url)
        warm_up = Workload([Request([workloads.first_token_id(self.vocab_size)] * 8, 8)], 1)
        await drive(self.base_url, model, warm_up)
        report: dict[str, Any] = {}
        for place, name in enumerate(names):
            first_seed = self.config.prompt_seed + place * self.config.runs
            jobs = [
                Job(self.base_url, model, name, self.config.scale, first_seed + run, self.vocab_size)
                for run in range(self.config.runs)
            ]
            report[name] = await self._run_workload(jobs, int(sizes["toka_max_streams"]))
            print(json.dumps({name: report[name]}), file=sys.stderr, flush=True)
        return {
            "ready_s": round(ready_s, 2),
            "kv_cache_tokens": int(sizes["toka_kv_tokens"]),
            "max_running": int(sizes["toka_max_streams"]),
            "workloads": report,
        }

    async def _run_workload(self, jobs: Sequence[Job], max_rows: int) -> dict[str, Any]:
        records, results = [], []
        for job in jobs:
            workload = job.make_workload()
            result, engine = await self._run(job, workload)
            work = count_work(workload.sizes(), workload.num_shared, workload.concurrency, max_rows)
            bound = best_seconds(self.costs, work, self.limits)
            records.append(
                {**summarize(workload, result), "engine": engine, "roofline": compare(workload, result, bound)}
            )
            results.append(result)
        return {
            **medians(records),
            "output_tokens_per_s_of_runs": [record["output_tokens_per_s"] for record in records],
            "errors": sum(result.num_errors for result in results),
            "first_errors": [error for result in results for error in result.errors][:2],
        }

    async def _run(self, job: Job, workload: Workload) -> tuple[Result, dict[str, float]]:
        """Send the workload once; what the clients saw, and what the engine counted meanwhile."""
        before = await self._read_settled()
        peak = PeakWatch(self.base_url)
        watching = asyncio.create_task(peak.watch())
        num_clients = min(self.num_clients, workload.concurrency, len(workload.requests))
        result = await drive_in_processes(job, num_clients)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        return result, count_engine(before, await self._read_settled(), result.seconds, peak.peak_running)

    async def _read_settled(self) -> dict[str, float]:
        """The metrics once nothing runs any more: they are complete then."""
        if held := await wait_idle(self.base_url):
            raise SystemExit(f"the engine still holds {held}")
        return await read_metrics(self.base_url)


def summarize(workload: Workload, result: Result) -> dict[str, Any]:
    """One run as the clients saw it."""
    input_tokens = sum(len(request.prompt) for request in workload.requests)
    return {
        "requests": len(workload.requests),
        "seconds": round(result.seconds, 3),
        "output_tokens": result.output_tokens,
        "output_tokens_per_s": round(result.output_tokens / result.seconds, 1),
        "input_tokens_per_s": round(input_tokens / result.seconds, 1),
        "latency_ms": percentiles_ms(result.latencies_s),
        "first_token_ms": percentiles_ms(result.first_s),
        "inter_token_ms": percentiles_ms(result.gaps_s),
        "busiest_client_cpu_share": round(result.cpu_share, 3),
    }


def count_engine(
    before: dict[str, float], after: dict[str, float], seconds: float, peak_running: int
) -> dict[str, float]:
    """One run as the engine counted it, from its metrics before and after."""

    def grown(name: str) -> float:
        return after[f"toka_{name}_total"] - before[f"toka_{name}_total"]

    steps, output_tokens = grown("steps"), grown("output_tokens")

    def ms_per_step(name: str) -> float:
        return round(1e3 * grown(name) / steps, 4) if steps else math.nan

    return {
        "steps": steps,
        "busy_ms_per_step": ms_per_step("step_busy_seconds"),
        "worker_cpu_ms_per_step": ms_per_step("model_cpu_seconds"),
        "manager_cpu_ms_per_step": ms_per_step("manager_cpu_seconds"),
        "busy_share": round(grown("step_busy_seconds") / seconds, 3),
        "output_tokens": output_tokens,
        "output_tokens_per_step": round(output_tokens / steps, 2) if steps else math.nan,
        "peak_running": peak_running,
        "preemptions": grown("preemptions"),
        "prefix_hit_tokens": grown("prefix_hit_tokens"),
        "hydragen_rows": grown("hydragen_rows"),
    }


def compare(workload: Workload, result: Result, bound: dict[str, float]) -> dict[str, Any]:
    """A run against the roofline's seconds."""
    best_s = sum(bound.values())
    output_tokens = sum(request.num_output_tokens for request in workload.requests)
    return {
        "seconds": round(best_s, 4),
        "output_tokens_per_s": round(output_tokens / best_s, 1),
        "fraction": round(best_s / result.seconds, 4),
        "parts_s": {name: round(part_s, 4) for name, part_s in bound.items()},
    }


def parse_arguments(arguments: Sequence[str]) -> tuple[Path, list[str], ThroughputConfig, dict[str, str]]:
    """Model folder, workloads, the benchmark's keys, the engine's keys. Raises ConfigError."""
    words = [word for word in arguments if not is_setting(word)]
    pairs = [word for word in arguments if is_setting(word)]
    own = {field.name for field in msgspec.structs.fields(ThroughputConfig)}
    config = parse_struct(ThroughputConfig, [pair for pair in pairs if pair.partition("=")[0] in own], "throughput")
    settings = [pair for pair in pairs if pair.partition("=")[0] not in own]
    parse_config(settings)
    if not words:
        raise ConfigError("the model's folder is missing")
    return Path(words[0]), words[1:] or list(workloads.NAMES), config, dict(pair.split("=", 1) for pair in settings)


def is_setting(word: str) -> bool:
    """key=value, as opposed to a folder or a workload, whose keys stand behind a colon."""
    return word.partition("=")[0].isidentifier() and "=" in word


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """The whole benchmark; returns its report. Raises errors of the tree."""
    folder, names, config, settings = parse_arguments(arguments)
    model_config = read_model_config(folder)
    vocab_size = config.vocab or min(model_config.vocab_size, _MAX_VOCAB_SIZE)
    for name in names:
        make_workload(name, 1e-9, 0, vocab_size)  # a bad one is refused before anything starts
    port = settings.setdefault("port", "10210")
    given = [f"{key}={value}" for key, value in settings.items()]
    machine = measure_machine(given)
    limits = Limits(
        config.bytes_per_s or machine["copy_bytes_per_s"], config.flops_per_s or machine["product_flops_per_s"]
    )
    num_clients = config.clients or max(1, min(4, (os.cpu_count() or 1) // 4))
    costs = count_costs(model_config, machine["bytes_per_number"])
    bench = Bench(f"http://127.0.0.1:{port}", config, costs, limits, vocab_size, num_clients)
    with running_engine(f"model={folder}", *given) as engine:
        report = asyncio.run(bench.measure(names, engine))
    return {
        "model": folder.resolve().name,
        "settings": settings,
        "machine": {**machine, "cpus": os.cpu_count()},
        "limits": asdict(limits),
        "runs": config.runs,
        "scale": config.scale,
        "client_processes": num_clients,
        **report,
    }


def main() -> int:
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(f"{__doc__}\n{workloads.__doc__}\nKeys:\n{format_keys(ThroughputConfig)}")
        return 0
    try:
        print(json.dumps(run(sys.argv[1:])))
    except TokaError as error:
        print(f"toka_engine.benchmarks.throughput: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    run_command(main)
