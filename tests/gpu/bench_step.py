"""One decode step of a real worker, without manager and server: what the GPU and the host take.

Usage: python tests/gpu/bench_step.py MODEL_DIR [OUT_DIR [CUDAGRAPH_MAX_SIZE]] [key=value ...]
Rows x (shared prefix + own suffix) as in the design's table; random keys and values. Prints one line per case.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toka_engine.command_line import parse_config
from toka_engine.messages import Step
from toka_engine.model.worker import Worker, load_worker

# rows, shared tokens, groups, own tokens
CASES = [
    (1, 0, 0, 512),
    (64, 0, 0, 512),
    (256, 0, 0, 512),
    (512, 0, 0, 512),
    (1024, 0, 0, 512),
    (4096, 0, 0, 320),
    (4096, 768, 16, 96),
    (4096, 768, 1, 96),
    (1024, 4096, 1, 32),
    (1024, 16384, 1, 32),
]
WARM_STEPS, STEPS = 4, 20


def int32(values: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.ascontiguousarray(values, dtype=np.int32)


class Bench:
    def __init__(self, worker: Worker) -> None:
        self.worker, self.runner, self.page_size = worker, worker.runner, worker.ready.page_size
        self.number = 0

    def set_up(self, rows: int, shared: int, groups: int, own: int, temperature: float) -> dict[str, Any]:
        """Slots 0..rows-1 with their pages; returns the group fields of each step."""
        size = self.page_size
        shared_pages = shared // size
        own_pages = -(-(own + WARM_STEPS + STEPS + 2) // size)
        table = np.empty((rows, shared_pages + own_pages), np.int32)
        used = 0
        first = np.arange(groups) * rows // max(groups, 1)
        counts = np.diff(np.append(first, rows)) if groups else np.empty(0)
        for start, count in zip(first, counts, strict=True):
            table[start : start + int(count), :shared_pages] = np.arange(used, used + shared_pages)
            used += shared_pages
        order = np.random.default_rng(0).permutation(rows * own_pages) + used
        assert order.max() < self.worker.ready.num_pages, "more pages than the cache has"
        table[:, shared_pages:] = order.reshape(rows, own_pages)
        columns = table.shape[1]
        ones = np.ones(rows, np.float32)
        self.run(
            new_slots=int32(np.arange(rows)),
            new_lengths=int32(np.full(rows, shared + own)),
            new_num_sampled=int32(np.zeros(rows)),
            new_temperatures=ones * np.float32(temperature),
            new_top_ps=ones,
            new_top_ks=int32(np.zeros(rows)),
            new_min_ps=ones * 0,
            new_seeds=np.full(rows, -1, np.int64),
            new_num_logprobs=int32(np.full(rows, -1)),
            append_slots=int32(np.repeat(np.arange(rows), columns)),
            append_indices=int32(np.tile(np.arange(columns), rows)),
            append_pages=table.reshape(-1),
        )
        if not groups:
            return {}
        return {
            "group_first_rows": int32(first),
            "group_num_rows": int32(counts),
            "group_first_columns": int32(np.zeros(groups)),
            "group_num_columns": int32(np.full(groups, shared_pages)),
        }

    def run(self, **fields: Any) -> Any:
        self.number += 1
        return self.runner.finish(self.runner.launch(Step(number=self.number, **fields)))

    def time(self, rows: int, shared: int, groups: int, own: int, temperature: float = 1.0) -> dict[str, Any]:
        fields = self.set_up(rows, shared, groups, own, temperature)
        slots = int32(np.arange(rows))
        host_s, flight = [], []
        for index in range(WARM_STEPS + STEPS):
            if index == WARM_STEPS:
                while flight:
                    self.runner.finish(flight.pop(0))
                torch.cuda.synchronize()
                host_s.clear()
                began = time.perf_counter()
            self.number += 1
            flight.append(self.runner.launch(Step(number=self.number, decode_slots=slots, **fields)))
            if len(flight) == 2:
                host_s.append(self.runner.finish(flight.pop(0)).host_cpu_s)
        while flight:
            host_s.append(self.runner.finish(flight.pop(0)).host_cpu_s)
        step_s = (time.perf_counter() - began) / STEPS
        return {
            "rows": rows, "shared": shared, "groups": groups, "own": own, "step_ms": round(step_s * 1e3, 3),
            "tok_s": round(rows / step_s), "host_cpu_ms": round(float(np.median(host_s)) * 1e3, 3),
        }  # fmt: skip

    def profile(self, case: tuple[int, int, int, int]) -> str:
        rows, shared, groups, own = case
        fields = self.set_up(rows, shared, groups, own, 1.0)
        slots = int32(np.arange(rows))
        self.run(decode_slots=slots, **fields)
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(3):
                self.run(decode_slots=slots, **fields)
        table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70)
        return f"{case}, 3 steps\n{table}\n"


def main() -> None:
    settings = [word for word in sys.argv[1:] if "=" in word]
    words = [word for word in sys.argv[1:] if "=" not in word]
    folder = Path(words[0])
    out = Path(words[1]) if len(words) > 1 else None
    began = time.perf_counter()
    max_size = int(words[2]) if len(words) > 2 else 512
    fixed = ["device=cuda", "kv_cache_num_tokens=2200000", f"cudagraph_max_size={max_size}"]
    config = parse_config([*fixed, *settings])
    worker = load_worker(config, folder, lambda phase, detail: None)
    loaded = time.perf_counter()
    worker.warm_up()
    print(f"load_s={loaded - began:.1f} warm_up_s={time.perf_counter() - loaded:.1f}", flush=True)
    worker.runner.attention.cache.normal_()
    bench = Bench(worker)
    results = []
    for case in CASES:
        results.append(bench.time(*case))
        print(json.dumps(results[-1]), flush=True)
    if out is not None:
        name = f"step_{max_size}{'_compiled' if config.torch_compile else ''}"
        (out / f"{name}.json").write_text(json.dumps(results, indent=1))
        cases = ((4096, 768, 16, 96), (4096, 0, 0, 320), (1, 0, 0, 512), (1024, 4096, 1, 32))
        (out / f"profile_{name}.txt").write_text("\n".join(map(bench.profile, cases)))


if __name__ == "__main__":
    main()
