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

import torch
from toka_engine.benchmarks.decoding import DecodeBench
from toka_engine.command_line import parse_config
from toka_engine.model.worker import Worker, load_worker
from toka_engine.noise import settle_seed
from toka_engine.output import run_command

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
WARM_STEPS, STEPS, IN_FLIGHT = 4, 20, 2


def make_bench(worker: Worker, case: tuple[int, int, int, int]) -> DecodeBench:
    rows, shared, groups, own = case
    return DecodeBench(worker, rows, shared, own, groups, WARM_STEPS + STEPS)


def measure(worker: Worker, case: tuple[int, int, int, int]) -> dict[str, Any]:
    rows, shared, groups, own = case
    bench = make_bench(worker, case)
    bench.time(WARM_STEPS, groups > 0, IN_FLIGHT)
    timing = bench.time(STEPS, groups > 0, IN_FLIGHT)
    return {
        "rows": rows, "shared": shared, "groups": groups, "own": own, "step_ms": round(timing.step_s * 1e3, 3),
        "tok_s": round(rows / timing.step_s), "host_cpu_ms": round(timing.host_cpu_s * 1e3, 3),
    }  # fmt: skip


def profile(worker: Worker, case: tuple[int, int, int, int]) -> str:
    bench = make_bench(worker, case)
    bench.time(1, case[2] > 0)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        bench.time(3, case[2] > 0, 1)
    table = profiled.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70)
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
    worker = load_worker(settle_seed(config), folder, lambda phase, detail: None)
    loaded = time.perf_counter()
    worker.warm_up()
    print(f"load_s={loaded - began:.1f} warm_up_s={time.perf_counter() - loaded:.1f}", flush=True)
    worker.runner.attention.cache.normal_()
    results = []
    for case in CASES:
        results.append(measure(worker, case))
        print(json.dumps(results[-1]), flush=True)
    if out is not None:
        name = f"step_{max_size}{'_compiled' if config.torch_compile else ''}"
        (out / f"{name}.json").write_text(json.dumps(results, indent=1))
        cases = ((4096, 768, 16, 96), (4096, 0, 0, 320), (1, 0, 0, 512), (1024, 4096, 1, 32))
        profiles = "\n".join(profile(worker, case) for case in cases)
        (out / f"profile_{name}.txt").write_text(profiles)


if __name__ == "__main__":
    run_command(main)
