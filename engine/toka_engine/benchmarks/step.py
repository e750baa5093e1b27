"""One decode step of the model: rows x shared prefix x own tokens, with and without Hydragen.

`python -m toka_engine.benchmarks.step MODEL_DIR [--rows 1,32] [--prefix 0,2048] [--suffix 64] [--key key=value ...]`
prints one JSON object. Both ways share the prefix's pages; the two are measured in turns, so that a busy machine
disturbs both alike, and the median is reported. It drives the worker's runner directly: no manager, no server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toka_engine.benchmarks.decoding import DecodeBench
from toka_engine.command_line import parse_config
from toka_engine.config import EngineConfig
from toka_engine.model.worker import Worker, load_worker


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
    worker = load_worker(config, folder, lambda phase, detail: None)
    worker.warm_up()
    return worker


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_axes(parser, rows="1,32", prefix="0,2048", suffix="64")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args(words)
    worker = start_worker(parse_config(arguments.key), arguments.model_dir)
    points = [measure(worker, *axes, arguments.repeats) for axes in read_axes(arguments)]
    print(json.dumps({"device": worker.ready.device, "dtype": worker.ready.dtype, "points": points}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
