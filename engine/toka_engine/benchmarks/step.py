"""One-step model bench: seconds of a decode step for rows x shared prefix x own suffix, with and without Hydragen.

`python -m toka_engine.benchmarks.step MODEL_DIR [--rows 1,32] [--prefix 0,2048] [--suffix 64] [--key key=value ...]`
prints one JSON object. Both ways share the prefix's pages; the two are measured in turns, so that a busy machine
disturbs both alike, and the median is reported. It drives the worker's runner directly: no manager, no server.

With `--versus key=value ...` (as `torch_compile=T`) a second engine has these settings too, and decode and prefill
steps of both are measured in turns, on a CPU in CPU time: what each took least, and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from toka_engine.command_line import parse_config
from toka_engine.messages import Step
from toka_engine.model.worker import Worker, load_worker


def _ints(values: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(values, np.int32)


class StepBench:
    """Slots [0, rows) over one prefix; their own pages follow the prefix's in the cache."""

    def __init__(self, worker: Worker, rows: int, prefix_tokens: int, suffix_tokens: int) -> None:
        self._runner = worker.runner
        self._rows = rows
        size = worker.ready.page_size
        self._prefix_pages = prefix_tokens // size
        self._length = self._prefix_pages * size + suffix_tokens
        own = -(-(suffix_tokens + 64) // size)
        if self._prefix_pages + rows * own > worker.ready.num_pages or rows > worker.ready.max_seqs:
            raise SystemExit(f"rows={rows} prefix={prefix_tokens} suffix={suffix_tokens} do not fit the KV cache")
        shared = np.tile(np.arange(self._prefix_pages), (rows, 1))
        private = self._prefix_pages + np.arange(rows * own).reshape(rows, own)
        table = np.concatenate((shared, private), axis=1)
        self._append: dict[str, Any] = {
            "append_slots": _ints(np.repeat(np.arange(rows), table.shape[1])),
            "append_indices": _ints(np.tile(np.arange(table.shape[1]), rows)),
            "append_pages": _ints(table.reshape(-1)),
        }
        self.reset()

    def reset(self) -> None:
        """Put every slot back to its first length; the cache's content does not matter to the time."""
        rows = self._rows
        self._run(
            Step(
                number=0,
                new_slots=_ints(np.arange(rows)),
                new_lengths=_ints(np.full(rows, self._length)),
                new_num_sampled=_ints(np.zeros(rows)),
                new_temperatures=np.zeros(rows, np.float32),
                new_top_ps=np.ones(rows, np.float32),
                new_top_ks=_ints(np.zeros(rows)),
                new_min_ps=np.zeros(rows, np.float32),
                new_seeds=np.full(rows, -1, np.int64),
                new_num_logprobs=_ints(np.full(rows, -1)),
                **self._append,
            )
        )

    def decode(self, with_hydragen: bool) -> float:
        """Wall seconds of one decode step."""
        groups: dict[str, Any] = {}
        if with_hydragen:
            groups = {
                "group_first_rows": _ints([0]),
                "group_num_rows": _ints([self._rows]),
                "group_first_columns": _ints([0]),
                "group_num_columns": _ints([self._prefix_pages]),
            }
        return self._run(Step(number=0, decode_slots=_ints(np.arange(self._rows)), **groups))

    def prefill(self, num_tokens: int) -> float:
        """Wall seconds of a step that prefills `num_tokens` from the start of slot 0, over its first pages."""
        slot = _ints([0])
        return self._run(
            Step(
                number=0,
                prefill_slots=slot,
                prefill_starts=slot,
                prefill_lengths=_ints([num_tokens]),
                prefill_tokens=_ints(np.zeros(num_tokens)),
                fanout_slots=slot,
                fanout_chunks=slot,
            )
        )

    def _run(self, step: Step) -> float:
        began_s = time.perf_counter()
        self._runner.finish(self._runner.launch(step))
        return time.perf_counter() - began_s


def measure(worker: Worker, rows: int, prefix: int, suffix: int, repeats: int) -> dict[str, Any]:
    """Median step times in ms, Hydragen off and (with a prefix and two rows or more) on."""
    bench = StepBench(worker, rows, prefix, suffix)
    ways = [False, True] if prefix and rows > 1 else [False]
    times: dict[bool, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            seconds = bench.decode(way)
            if repeat:
                times[way].append(seconds)
        if repeat % 16 == 15:
            bench.reset()
    medians = {way: statistics.median(values) * 1e3 for way, values in times.items()}
    result: dict[str, Any] = {"rows": rows, "prefix": prefix, "suffix": suffix, "plain_ms": round(medians[False], 2)}
    if True in medians:
        result["hydragen_ms"] = round(medians[True], 2)
        result["speedup"] = round(medians[False] / medians[True], 2)
    return result


def compare(
    workers: tuple[Worker, Worker], rows: list[int], suffix: int, prefill: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Steps of both in ms: decode steps of `rows`, prefill steps of `prefill` tokens; `ratio` is second by first.

    CPU time on a CPU; wall time on a GPU, where a CPU only waits.
    """
    clock = time.process_time if workers[0].ready.device == "cpu" else time.perf_counter
    points = []
    for kind, counts in (("decode", rows), ("prefill", prefill)):
        for count in counts:
            size = (count, 0, suffix) if kind == "decode" else (1, 0, count)
            benches = [StepBench(worker, *size) for worker in workers]
            pairs: list[tuple[float, float]] = []
            for repeat in range(repeats + 1):
                times = []
                for bench in benches:
                    if repeat % 16 == 15:
                        bench.reset()
                    began_s = clock()
                    if kind == "decode":
                        bench.decode(with_hydragen=False)
                    else:
                        bench.prefill(count)
                    times.append(clock() - began_s)
                pairs.append((times[0], times[1]))
            del pairs[0]
            least = [round(min(times) * 1e3, 2) for times in zip(*pairs, strict=True)]
            ratio = statistics.median(second / first for first, second in pairs)
            points.append(
                {"step": kind, "rows": count, "first_ms": least[0], "second_ms": least[1], "ratio": round(ratio, 3)}
            )
    return points


def _start(keys: list[str], model_dir: Path) -> tuple[Worker, float]:
    """A worker that is warm, and the wall seconds that it took."""
    began_s = time.perf_counter()
    worker = load_worker(parse_config(keys), model_dir, lambda phase, detail: None)
    worker.warm_up()
    return worker, time.perf_counter() - began_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    for name, default in (("rows", "1,32"), ("prefix", "0,2048"), ("suffix", "64"), ("prefill", "128")):
        parser.add_argument(f"--{name}", default=default, help="comma-separated counts")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--key", action="append", default=[], help="engine setting, key=value")
    parser.add_argument("--versus", action="append", default=[], help="setting of a second engine, key=value")
    arguments = parser.parse_args()
    worker, start_s = _start(arguments.key, arguments.model_dir)
    axes = [
        [int(word) for word in text.split(",")]
        for text in (arguments.rows, arguments.prefix, arguments.suffix, arguments.prefill)
    ]
    if arguments.versus:
        other, other_start_s = _start([*arguments.key, *arguments.versus], arguments.model_dir)
        points = compare((worker, other), axes[0], axes[2][0], axes[3], arguments.repeats)
        starts = {"first_start_s": round(start_s, 1), "second_start_s": round(other_start_s, 1)}
        print(json.dumps({"dtype": worker.ready.dtype, **starts, "points": points}, indent=1))
        return 0
    cases = itertools.product(*axes[:3])
    points = [measure(worker, rows, prefix, suffix, arguments.repeats) for rows, prefix, suffix in cases]
    print(json.dumps({"device": worker.ready.device, "dtype": worker.ready.dtype, "points": points}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
