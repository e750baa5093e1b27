"""The machine's two limits on the engine's device: bytes/s of a copy, FLOP/s of a large product. Prints one JSON.

Usage: python -m toka_engine.benchmarks.machine [key=value ...]
The keys are those of `toka`, of which device, dtype and num_threads matter. A copy counts what it reads and what it
writes. The throughput benchmark runs this in a process that has ended before the engine starts: so it holds no memory
of the device.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from toka_engine.command_line import parse_config
from toka_engine.config import EngineConfig
from toka_engine.errors import TokaError
from toka_engine.model.devices import find_device
from toka_engine.model.memory import count_threads
from toka_engine.model.sizing import choose_dtype
from toka_engine.output import run_command
from toka_engine.version import __version__

_COPY_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""On a CPU some milliseconds of work, so that on a shared one the fastest run is one that nobody interrupted."""
_MEASURE_S = 0.5


def fastest(run: Callable[[], object], synchronize: Callable[[], object], seconds: float = _MEASURE_S) -> float:
    """Seconds of the fastest of the runs that fit into `seconds` after a first one: at least one."""
    run()
    synchronize()
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def measure(config: EngineConfig) -> dict[str, Any]:
    """The limits, and what they are limits of. Raises errors of the tree."""
    device = find_device(config)
    dtype = choose_dtype(config, device)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or count_threads())
    synchronize = torch.cuda.synchronize if device.type == "cuda" else int
    source = torch.ones(_COPY_BYTES[device.type] // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy_s = fastest(lambda: target.copy_(source), synchronize)
    size = _PRODUCT_SIZE[device.type]
    left = torch.ones(size, size, dtype=dtype, device=device)
    right, out = torch.ones_like(left), torch.empty_like(left)
    product_s = fastest(lambda: torch.mm(left, right.t(), out=out), synchronize)
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else read_cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_per_number": dtype.itemsize,
        "copy_bytes_per_s": round(2 * source.numel() * dtype.itemsize / copy_s),
        "product_flops_per_s": round(2 * size**3 / product_s),
        "versions": {"toka": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def read_cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    try:
        print(json.dumps(measure(parse_config(sys.argv[1:]))))
    except TokaError as error:
        print(f"toka_engine.benchmarks.machine: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
