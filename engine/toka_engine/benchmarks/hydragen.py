"""Hydragen on, off, and the same steps without attention, over rows x shared prefix x own tokens. Prints JSON lines.

Usage: python -m toka_engine.benchmarks.hydragen MODEL_DIR [--rows 8,32] [--prefix 512,2048] [--suffix 32]
           [--steps 4] [--rounds 5] [--key key=value ...] [--bytes-per-s X] [--flops-per-s X]
The first line is of the machine; a line per point follows, then one for each number of rows where nothing is shared.

A point: milliseconds of a decode step in the worker (no manager, no server), each the least of `rounds` blocks of
`steps` steps, on, off and (on a CPU) without attention in turns; names in _ms are wall time, in _cpu_ms CPU
time of the worker's thread.
The rest is made of the wall time on a GPU and of the CPU time on a CPU, where other processes disturb it less (with
num_threads=1 it is the whole step). `speed_of_no_attention` is what share of the speed without attention the step with
Hydragen has (the bar: 0.7 with 1,024 rows or more, own tokens up to 32, a prefix up to 4,096; beyond, 1.5 times
attention's own roofline). Attention's time is the difference; its roofline (`roofline.py`) reads the prefix once.

Nothing shared: the manager and the worker in one process, every row a prompt of its own, once with use_hydragen and
once without; `loss` is of the wall time of a block's steps, in the best of `rounds` blocks (the bar: 0.02), `cpu_loss`
of the least CPU time of a step, which other processes disturb less (on a GPU: the host's part); beside them the
manager's CPU time per step.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from toka_engine.benchmarks.decoding import DecodeBench, Timing, attention_skipped
from toka_engine.benchmarks.engine import measure_machine
from toka_engine.benchmarks.roofline import Limits, ModelCosts, count_costs, decode_attention_seconds
from toka_engine.benchmarks.step import add_axes, read_axes, start_worker
from toka_engine.command_line import parse_config
from toka_engine.config import EngineConfig
from toka_engine.manager.core import Manager
from toka_engine.manager.sizes import choose_sizes
from toka_engine.messages import Submit
from toka_engine.model.backend import Launched
from toka_engine.model.model_config import read_model_config
from toka_engine.model.worker import Worker
from toka_engine.output import run_command
from toka_engine.slot_parameters import Sampling

_UNSHARED_PROMPT_TOKENS = 32
_SPARE_STEPS = 8
_UNSHARED_STEPS = 8
"""Times `steps`: these are cheap, and the difference is small."""
_NEVER = Timing(float("inf"), float("inf"))
_TOKENS_PER_FORWARD = {"cpu": 128, "cuda": 8192}
"""The engine's own choice, stated here so that the size of the cache follows from it."""


@dataclass(slots=True)
class Point:
    """One bench and the least times of a step that each way has taken."""

    bench: DecodeBench
    on: Timing = _NEVER
    off: Timing = _NEVER
    without_attention: Timing = _NEVER

    def describe(self, costs: ModelCosts, limits: Limits, device: str) -> dict[str, Any]:
        bench = self.bench
        bound_s = decode_attention_seconds(costs, bench.rows, bench.shared, bench.own, True, limits)
        ways = (self.on, self.off, self.without_attention)
        on_s, off_s, without_s = (way.host_cpu_s if device == "cpu" else way.step_s for way in ways)
        return {
            "kind": "point",
            "rows": bench.rows,
            "prefix": bench.shared,
            "suffix": bench.own,
            "on_ms": _ms(self.on.step_s),
            "off_ms": _ms(self.off.step_s),
            "without_attention_ms": _ms(self.without_attention.step_s),
            "on_cpu_ms": _ms(self.on.host_cpu_s),
            "off_cpu_ms": _ms(self.off.host_cpu_s),
            "without_attention_cpu_ms": _ms(self.without_attention.host_cpu_s),
            "speedup": round(off_s / on_s, 3),
            "speed_of_no_attention": round(without_s / on_s, 3),
            "speed_of_no_attention_off": round(without_s / off_s, 3),
            "attention_ms": _ms(on_s - without_s),
            "attention_roofline_ms": _ms(bound_s),
            "attention_by_roofline": round((on_s - without_s) / bound_s, 2),
        }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def measure_points(worker: Worker, axes: Sequence[tuple[int, int, int]], num_steps: int, rounds: int) -> list[Point]:
    """All points, round by round, so that whatever else the machine does disturbs all ways alike.

    On a GPU the rounds without attention come last, all together: before and after them all graphs are captured anew.
    """
    rounds_at_once = 1 if worker.ready.device == "cpu" else rounds
    points = [Point(DecodeBench(worker, *each, max_steps=num_steps)) for each in axes]
    for each in points:  # what comes first pays for memory and, on a GPU, for compiling
        each.bench.time(1, True)
    for _ in range(rounds // rounds_at_once):
        for each in points * rounds_at_once:
            each.off = each.off.with_least_of(each.bench.time(num_steps, False))
            each.on = each.on.with_least_of(each.bench.time(num_steps, True))
        with attention_skipped(worker):
            for each in points * rounds_at_once:
                each.without_attention = each.without_attention.with_least_of(each.bench.time(num_steps, False))
    return points


@dataclass(frozen=True, slots=True)
class Turns:
    """Mean wall time and least CPU time of a step, and mean CPU time of the manager for one.

    Not the least wall time: with several steps in flight one may be done before it is waited for.
    """

    step_s: float
    step_cpu_s: float
    manager_cpu_s: float

    def with_least_of(self, other: Turns) -> Turns:
        return Turns(
            min(self.step_s, other.step_s),
            min(self.step_cpu_s, other.step_cpu_s),
            min(self.manager_cpu_s, other.manager_cpu_s),
        )


def run_unshared(worker: Worker, config: EngineConfig, rows: int, num_steps: int) -> Turns:
    """Manager and worker in one process: `rows` prompts that share nothing, all of them decoding."""
    sizes = choose_sizes(config, worker.ready)
    manager, flight = Manager(config, sizes, time.monotonic), deque[Launched]()
    vocab_size = worker.ready.vocab_size
    length = _UNSHARED_PROMPT_TOKENS
    prompts = np.random.default_rng(1).integers(0, vocab_size, (rows, length), np.int32)
    prompts[:, 0] = np.arange(rows) % vocab_size
    max_tokens = count_unshared_tokens(rows, num_steps, sizes.max_tokens_per_forward) - length
    for row in range(rows):
        manager.handle(Submit(row, 1, prompts[row], max_tokens, Sampling(), (), False))

    def turn() -> float:
        """Plan what may be in flight, take the oldest step's tokens; returns the manager's CPU time."""
        cpu_s = time.thread_time()
        spent_s = 0.0
        while step := manager.plan():
            spent_s += time.thread_time() - cpu_s
            flight.append(worker.runner.launch(step))
            cpu_s = time.thread_time()
        spent_s += time.thread_time() - cpu_s
        if not flight:
            raise SystemExit(f"{rows} rows that share nothing do not fit the KV cache")
        tokens = worker.runner.finish(flight.popleft())
        cpu_s = time.thread_time()
        manager.receive(tokens)
        return spent_s + time.thread_time() - cpu_s

    while manager.state.rows.slots.size < rows:
        turn()
    turn()
    cpus, manager_cpu_s, began_s = [], 0.0, time.perf_counter()
    for _ in range(num_steps):
        cpu_s = time.process_time()
        manager_cpu_s += turn()
        cpus.append(time.process_time() - cpu_s)
    step_s = (time.perf_counter() - began_s) / num_steps
    while flight:  # the slots are the next one's
        worker.runner.finish(flight.popleft())
    return Turns(step_s, min(cpus), manager_cpu_s / num_steps)


def measure_unshared(worker: Worker, config: EngineConfig, rows: int, num_steps: int, rounds: int) -> dict[str, Any]:
    """Hydragen on and off in turns, where there is nothing to share."""
    ways: dict[bool, list[Turns]] = {True: [], False: []}
    for _ in range(rounds):
        for is_on, turns in ways.items():
            way = msgspec.structs.replace(config, use_hydragen=is_on)
            turns.append(run_unshared(worker, way, rows, num_steps))
    on, off = (functools.reduce(Turns.with_least_of, turns) for turns in ways.values())
    return {
        "kind": "nothing_shared",
        "rows": rows,
        "on_ms": _ms(on.step_s),
        "off_ms": _ms(off.step_s),
        "loss": round(on.step_s / off.step_s - 1, 4),
        "cpu_on_ms": _ms(on.step_cpu_s),
        "cpu_off_ms": _ms(off.step_cpu_s),
        "cpu_loss": round(on.step_cpu_s / off.step_cpu_s - 1, 4),
        "manager_cpu_on_ms": _ms(on.manager_cpu_s),
        "manager_cpu_off_ms": _ms(off.manager_cpu_s),
    }


def count_unshared_tokens(rows: int, num_steps: int, max_tokens_per_forward: int) -> int:
    """Prompt and output of each of `rows` that share nothing: enough to run on until all have come, and then
    `num_steps`. While they come, an eighth of a step or more is theirs."""
    num_ramp_steps = -(-rows * _UNSHARED_PROMPT_TOKENS * 8 // max_tokens_per_forward)
    return _UNSHARED_PROMPT_TOKENS + num_ramp_steps + num_steps + _SPARE_STEPS


def complete_config(
    config: EngineConfig, device: str, axes: Sequence[tuple[int, int, int]], num_steps: int
) -> EngineConfig:
    """`config` with a cache just large enough, unless it says how large."""
    if config.max_tokens_per_forward is None:
        config = msgspec.structs.replace(config, max_tokens_per_forward=_TOKENS_PER_FORWARD[device])
    if config.kv_cache_num_tokens is not None:
        return config
    most, size = 0, config.page_size
    for rows, prefix, suffix in axes:
        unshared = count_unshared_tokens(rows, _UNSHARED_STEPS * num_steps, config.max_tokens_per_forward or 1)
        shared_pages = prefix // size + rows * -(-(suffix + num_steps) // size)
        most = max(most, shared_pages, rows * (unshared // size + 2))
    return msgspec.structs.replace(config, kv_cache_num_tokens=(most + 1) * size)


def check_rows(worker: Worker, config: EngineConfig, all_rows: Sequence[int]) -> None:
    """Raises SystemExit, before anything is measured, if the manager would not run as many rows at once."""
    max_running = choose_sizes(config, worker.ready).max_running
    if all_rows[-1] > max_running:
        raise SystemExit(f"rows={all_rows[-1]} are more than the {max_running} that run at once")


def sweep(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines, in order."""
    axes = read_axes(arguments)
    all_rows = sorted({rows for rows, _, _ in axes})
    config = parse_config(arguments.key)
    costs_of = read_model_config(arguments.model_dir)
    machine = measure_machine(arguments.key)
    limits = Limits(
        arguments.bytes_per_s or machine["copy_bytes_per_s"], arguments.flops_per_s or machine["product_flops_per_s"]
    )
    yield {
        "kind": "machine",
        "model": arguments.model_dir.resolve().name,
        **machine,
        "bytes_per_s": limits.bytes_per_s,
        "flops_per_s": limits.flops_per_s,
        "keys": arguments.key,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
    }
    config = complete_config(config, machine["device"], axes, arguments.steps)
    worker = start_worker(config, arguments.model_dir)
    check_rows(worker, config, all_rows)
    costs = count_costs(costs_of, machine["bytes_per_number"])
    for point in measure_points(worker, axes, arguments.steps, arguments.rounds):
        yield point.describe(costs, limits, machine["device"])
    for rows in all_rows:
        yield measure_unshared(worker, config, rows, _UNSHARED_STEPS * arguments.steps, arguments.rounds)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_axes(parser, rows="8,32", prefix="512,2048", suffix="32")
    parser.add_argument("--steps", type=int, default=4, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes-per-s", type=float, help="the machine's limit; default: measured by a copy")
    parser.add_argument("--flops-per-s", type=float, help="the machine's limit; default: measured by a product")
    for line in sweep(parser.parse_args(words)):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
