"""One decode step of the model: rows x shared prefix x own tokens, with and without Hydragen.

`python -m toka_engine.benchmarks.step MODEL_DIR [--rows 1,32] [--prefix 0,2048] [--suffix 64] [--key key=value ...]`
prints one JSON object. Both ways share the prefix's pages; the two are measured in turns, so that a busy machine
disturbs both alike, and the median is reported. It drives the worker's runner directly: no manager, no server.

With `--versus key=value ...` (as `torch_compile=T`) a second engine has these settings too, and decode and prefill
steps of both are measured in turns, on a CPU in CPU time: what each took least, and the median of the pairs' ratios.
`--mixed 256` adds steps that do both: rows beside a prompt of so many tokens, of which a few are run in a row, as an
engine would; there the CPU time of what launches them is told as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from toka_engine.benchmarks.decoding import Clock, DecodeBench
from toka_engine.command_line import parse_config
from toka_engine.config import EngineConfig
from toka_engine.model.worker import Worker, load_worker
from toka_engine.noise import settle_seed
from toka_engine.output import run_command


def measure(worker: Worker, rows: int, prefix: int, suffix: int, repeats: int) -> dict[str, Any]:
    """Median step times in ms, Hydragen off and (with a prefix and two rows or more) on."""
    bench = DecodeBench(worker, rows, prefix, suffix)
    ways = [False, True] if bench.shared and rows > 1 else [False]
    times: dict[bool, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            seconds = bench.time(1, way).step_s
            if repeat:
                times[way].append(seconds)
    medians = {way: statistics.median(values) * 1e3 for way, values in times.items()}
    result: dict[str, Any] = {"rows": rows, "prefix": prefix, "suffix": suffix, "plain_ms": round(medians[False], 2)}
    if True in medians:
        result["hydragen_ms"] = round(medians[True], 2)
        result["speedup"] = round(medians[False] / medians[True], 2)
    return result


_MIXED_STEPS = 8
"""Mixed steps that are run in a row."""


def compare(
    workers: tuple[Worker, Worker], rows: list[int], suffix: int, prefill: list[int], mixed: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Steps of both in ms: decode steps of `rows`, prefill steps of `prefill` tokens, steps of rows beside a prompt of
    `mixed` tokens; `ratio` is second by first.

    CPU time on a CPU; wall time on a GPU, where a CPU only waits.
    """
    clock = time.process_time if workers[0].ready.device == "cpu" else time.perf_counter

    def decode(bench: DecodeBench) -> float:
        return bench.time(1, False, clock=clock).step_s

    points: list[dict[str, Any]] = []
    for count in rows:
        benches = [DecodeBench(worker, count, 0, suffix) for worker in workers]
        points.append({"step": "decode", "rows": count, **_measure_pairs(benches, decode, repeats)})
    for count in prefill:
        benches = [DecodeBench(worker, 1, 0, count) for worker in workers]
        run = partial(DecodeBench.time_prefill, num_tokens=count, clock=clock)
        points.append({"step": "prefill", "rows": count, **_measure_pairs(benches, run, repeats)})
    points += [_compare_mixed(workers, *each, suffix, clock, repeats) for each in itertools.product(rows, mixed)]
    return points


def _compare_mixed(
    workers: tuple[Worker, Worker], rows: int, tokens: int, suffix: int, clock: Clock, repeats: int
) -> dict[str, Any]:
    """Steps of `rows` beside a prompt of `tokens`, with the host's time for each."""
    benches = [DecodeBench(worker, rows + 1, 0, max(suffix, tokens)) for worker in workers]
    hosts: dict[DecodeBench, list[float]] = {bench: [] for bench in benches}

    def mix(bench: DecodeBench) -> float:
        timing = bench.time_mixed(tokens, _MIXED_STEPS, clock)
        hosts[bench].append(timing.host_cpu_s)
        return timing.step_s

    pairs = _measure_pairs(benches, mix, repeats)
    first, second = (round(statistics.median(hosts[bench]) * 1e3, 2) for bench in benches)
    return {"step": "mixed", "rows": rows, "tokens": tokens, **pairs, "first_host_ms": first, "second_host_ms": second}


def _measure_pairs(benches: list[DecodeBench], run: Callable[[DecodeBench], float], repeats: int) -> dict[str, float]:
    """Run both in turns; the first pair does not count."""
    pairs = [tuple(map(run, benches)) for _ in range(repeats + 1)][1:]
    return {
        "first_ms": round(min(pair[0] for pair in pairs) * 1e3, 2),
        "second_ms": round(min(pair[1] for pair in pairs) * 1e3, 2),
        "ratio": round(statistics.median(later / earlier for earlier, later in pairs), 3),
    }


def add_axes(parser: argparse.ArgumentParser, rows: str, prefix: str, suffix: str) -> None:
    """The arguments that say what is measured: see `read_axes`."""
    parser.add_argument("model_dir", type=Path)
    for name, default in (("rows", rows), ("prefix", prefix), ("suffix", suffix)):
        parser.add_argument(f"--{name}", type=_counts, default=default, help=f"comma-separated counts ({default})")
    parser.add_argument("--key", action="append", default=[], help="engine setting, key=value")


def read_axes(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Every (rows, prefix, suffix)."""
    return list(itertools.product(arguments.rows, arguments.prefix, arguments.suffix))


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def start_worker(config: EngineConfig, folder: Path) -> Worker:
    """Loaded and warmed up."""
    worker = load_worker(settle_seed(config), folder, lambda phase, detail: None)
    worker.warm_up()
    return worker


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_axes(parser, rows="1,32", prefix="0,2048", suffix="64")
    parser.add_argument("--prefill", type=_counts, default="128", help="tokens of prefill steps, with --versus (128)")
    parser.add_argument("--mixed", type=_counts, default=[], help="tokens of prompts beside rows, with --versus (none)")
    parser.add_argument("--versus", action="append", default=[], help="setting of a second engine, key=value")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args(words)
    if arguments.mixed and not arguments.versus:
        parser.error("--mixed has no effect without --versus")
    worker = start_worker(parse_config(arguments.key), arguments.model_dir)
    if arguments.versus:
        other = start_worker(parse_config([*arguments.key, *arguments.versus]), arguments.model_dir)
        suffix = arguments.suffix[0]
        counts = arguments.rows, suffix, arguments.prefill, arguments.mixed
        points = compare((worker, other), *counts, arguments.repeats)
        print(json.dumps({"device": worker.ready.device, "dtype": worker.ready.dtype, "points": points}, indent=1))
        return 0
    points = [measure(worker, *axes, arguments.repeats) for axes in read_axes(arguments)]
    print(json.dumps({"device": worker.ready.device, "dtype": worker.ready.dtype, "points": points}, indent=1))
    return 0


if __name__ == "__main__":
    run_command(main)
