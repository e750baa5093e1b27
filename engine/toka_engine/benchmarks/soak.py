"""Minutes of random requests against one engine; ends with code 1 if a promise broke. Prints one JSON object.

Usage: python -m toka_engine.benchmarks.soak [MODEL_DIR] [minutes=5] [clients=32] [seed=0] [tie=0.5] [growth=1.0]
           [late=64] [checkers=8] [check_minutes=10] [vocab=...] [port=10320] [key=value ...]
Starts `toka` with MODEL_DIR (default: the built-in model) and the other keys; a small kv_cache_num_tokens forces
preemptions. What must hold:
- every request gets its answer, whole and with as many tokens as asked for, or a 429; no other status, no lost stream;
- afterwards nothing runs, waits or holds a page, the engine is ready, and it ends with code 0;
- the greedy answers, asked for again in peace, in an order by chance and for at most `check_minutes`, agree in 99 % of
  their tokens, and each that differs was a near tie: at most `tie` nats less likely in peace, or else a near tie of the
  reference's, transformers (`soak_reference`: in bfloat16 logits depend on the batch); the 20 worst of the latter are
  reported (`far`; a gap of null: in peace none of the five likeliest);
- no process grows by more than `growth` MiB a minute over the second half. On a CPU that takes a cache that is
  soon full: its pages take memory when they are first used;
- on a GPU, which the soak must have for itself, no memory of the device is taken after ready, but for `late` MiB:
  kernels that libraries load when they first need them, for which the engine leaves a margin.
Needs psutil.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from toka_engine.benchmarks.engine import read_metrics, read_model, running_engine, wait_idle, wait_until_ready
from toka_engine.benchmarks.soak_check import Agreement, Difference, check_greedy
from toka_engine.benchmarks.soak_traffic import Limits, Traffic
from toka_engine.command_line import parse_config
from toka_engine.output import run_command

_MIN_AGREEMENT = 0.99
_MEMORY_PERIOD_S = 1.0
_NUM_REPORTED = 20
_NUM_GAPS = 5
_NUM_SIZES = 9
"""Memory sizes of each process that are reported, from its first to its last."""
_DEFAULTS = {
    "minutes": "5",
    "clients": "32",
    "checkers": "8",
    "check_minutes": "10",
    "seed": "0",
    "tie": "0.5",
    "growth": "1.0",
    "late": "64",
}


def read_device_mib() -> int | None:
    """MiB in use of the first GPU, by any process; None where there is no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


class MemoryWatch:
    """Resident MiB of the engine's processes, by name, over time, and of the GPU if it has one."""

    def __init__(self, engine: subprocess.Popen[bytes], has_device: bool) -> None:
        self._device_mib = [mib for mib in [read_device_mib() if has_device else None] if mib is not None]
        root = psutil.Process(engine.pid)
        self._processes = {"supervisor": root}
        for child in root.children():
            module = next((word for word in child.cmdline() if word.startswith("toka_engine.")), "toka_engine.other")
            self._processes[module.removeprefix("toka_engine.")] = child
        self._times: list[float] = []
        self._sizes: dict[str, list[float]] = {name: [] for name in self._processes}

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            self._times.append(time.monotonic())
            for name, process in self._processes.items():
                self._sizes[name].append(process.memory_info().rss / 2**20)
            if self._device_mib:
                now_mib = await asyncio.to_thread(read_device_mib)
                assert now_mib is not None, "the program that told it at the start is there"
                self._device_mib.append(now_mib)
            await asyncio.sleep(_MEMORY_PERIOD_S)

    def growth(self) -> dict[str, float]:
        """MiB a minute over the second half, by least squares."""
        half = len(self._times) // 2
        return {name: round(60 * _slope(self._times[half:], sizes[half:]), 3) for name, sizes in self._sizes.items()}

    def device(self) -> dict[str, int]:
        """MiB of the GPU at the start and at most; empty without one."""
        return {"ready": self._device_mib[0], "most": max(self._device_mib)} if self._device_mib else {}

    def course(self) -> dict[str, list[float]]:
        """MiB at times that lie equally far apart."""
        last = len(self._times) - 1
        chosen = [last * at // (_NUM_SIZES - 1) for at in range(_NUM_SIZES)]
        return {name: [round(sizes[at], 1) for at in chosen] for name, sizes in self._sizes.items()}


def _slope(times: list[float], values: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    mean_time, mean_value = sum(times) / len(times), sum(values) / len(values)
    spread = sum((at - mean_time) ** 2 for at in times)
    return sum((at - mean_time) * (value - mean_value) for at, value in zip(times, values, strict=True)) / spread


def judge(
    traffic_broken: list[str],
    held: dict[str, float],
    agreement: Agreement,
    growth: dict[str, float],
    device_mib: dict[str, int],
    max_growth: float,
    max_late_mib: int,
) -> list[str]:
    """The promises that broke, a sentence each, but for what `judge_far` finds."""
    broken = list(traffic_broken)
    if held:
        broken.append(f"still held: {held}")
    if not agreement.num_tokens:
        broken.append("no greedy answer came to be checked")
    if agreement.share < _MIN_AGREEMENT:
        broken.append(f"{agreement.share:.2%} of the greedy tokens agree, not {_MIN_AGREEMENT:.0%}")
    broken += [f"{name} grows by {rate} MiB a minute" for name, rate in growth.items() if rate > max_growth]
    if device_mib and device_mib["most"] > device_mib["ready"] + max_late_mib:
        broken.append(f"the device held {device_mib['ready']} MiB when the engine was ready, then {device_mib['most']}")
    return broken


def judge_far(
    folder: Path, arguments: Sequence[str], far: Sequence[Difference]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the reference's verdict on differences that were no near ties in peace: their descriptions, the worst
    last, and the promises that broke.

    The engine, whose settings `arguments` are, must have ended.
    """
    if not far:
        return [], []
    from toka_engine.benchmarks.soak_reference import ask_reference  # torch: not for --help

    try:
        verdicts = ask_reference(folder, parse_config(arguments), far)
    except (OSError, ValueError, RuntimeError) as error:  # such as no memory; nothing else of the report is lost
        return [each.describe() for each in far], [f"transformers cannot judge {len(far)} greedy tokens: {error}"]
    judged = sorted(zip(far, verdicts, strict=True), key=lambda pair: (not pair[1].is_near_tie, pair[1].gap))
    described = [each.describe() | {"reference": asdict(verdict)} for each, verdict in judged]
    missed = [verdict for _, verdict in judged if not verdict.is_near_tie]
    if not missed:
        return described, []
    return described, [f"{len(missed)} greedy tokens were no near ties, the farthest by {missed[-1].gap:.3f} nats"]


async def soak(
    base_url: str, engine: subprocess.Popen[bytes], folder: Path, options: dict[str, str]
) -> tuple[dict[str, Any], Agreement]:
    """Traffic, then peace, then the check; returns the report with the promises that `judge` found broken."""
    ready_s = await wait_until_ready(base_url, engine)
    model = await read_model(base_url)
    sizes = await read_metrics(base_url)
    vocab_size = int(options.get("vocab") or json.loads((folder / "config.json").read_text())["vocab_size"])
    limits = Limits(int(sizes["toka_max_request_tokens"]), int(sizes["toka_max_streams"]), vocab_size)
    traffic = Traffic(base_url, model, limits, random.Random(int(options["seed"])))
    memory = MemoryWatch(engine, has_device=options["device"] != "cpu")
    watching = asyncio.create_task(memory.watch())
    await traffic.run(60 * float(options["minutes"]), int(options["clients"]))
    watching.cancel()
    held = await wait_idle(base_url)
    metrics = await read_metrics(base_url)
    requests = {"requests": dict(traffic.counts), "held": held, "device_mib": memory.device(), "broken": traffic.broken}
    print(json.dumps(requests), file=sys.stderr, flush=True)  # the check takes minutes
    began = time.monotonic()
    agreement = await check_greedy(
        base_url,
        model,
        traffic.greedy,
        int(options["checkers"]),
        60 * float(options["check_minutes"]),
        int(options["seed"]),
    )
    held |= await wait_idle(base_url)
    growth = memory.growth()
    report = {
        "ready_s": round(ready_s, 2),
        "limits": {"request_tokens": limits.max_request_tokens, "streams": limits.max_streams},
        "requests": dict(traffic.counts),
        "engine_output_tokens": int(metrics["toka_output_tokens_total"]),
        "preemptions": int(metrics["toka_preemptions_total"]),
        "prefix_hit_tokens": int(metrics["toka_prefix_hit_tokens_total"]),
        "hydragen_rows": int(metrics["toka_hydragen_rows_total"]),
        "greedy": {
            "answers": len(traffic.greedy),
            "checked": agreement.num_answers,
            "tokens": agreement.num_tokens,
            "agreement": round(agreement.share, 6),
            "gaps": [each.describe()["gap"] for each in agreement.far(0.0)[-_NUM_GAPS:]],
            "check_s": round(time.monotonic() - began, 1),
        },
        "memory_mib": memory.course(),
        "growth_mib_per_minute": growth,
        "device_mib": memory.device(),
        "broken": judge(
            traffic.broken,
            held,
            agreement,
            growth,
            memory.device(),
            float(options["growth"]),
            int(options["late"]),
        ),
    }
    return report, agreement


def main() -> int:
    words = [argument for argument in sys.argv[1:] if "=" not in argument]
    settings = {"port": "10320", "host": "127.0.0.1", "drain_endpoint_delay_s": "0"}
    settings |= dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    options = {name: settings.pop(name, default) for name, default in _DEFAULTS.items()}
    options["vocab"] = settings.pop("vocab", "")
    options["device"] = settings.get("device", "auto")
    folder = Path(words[0]) if words else _builtin_folder()
    arguments = [f"model={folder}", *(f"{key}={value}" for key, value in settings.items())]
    with running_engine(*arguments) as engine:
        report, agreement = asyncio.run(soak(f"http://127.0.0.1:{settings['port']}", engine, folder, options))
    candidates = agreement.far(float(options["tie"]))
    # Where too many differ, which is broken already, the reference would judge for hours.
    judged = candidates if agreement.share >= _MIN_AGREEMENT else candidates[-_NUM_REPORTED:]
    far, broken = judge_far(folder, arguments, judged)
    report["greedy"] |= {"num_far": len(candidates), "far": far[-_NUM_REPORTED:]}
    report["broken"] += broken
    report["exit_code"] = engine.returncode
    if engine.returncode:
        report["broken"].append(f"the engine ended with code {engine.returncode}")
    print(json.dumps(report, indent=1))
    return 1 if report["broken"] else 0


def _builtin_folder() -> Path:
    from toka_engine.builtin import ensure_builtin

    return ensure_builtin()


if __name__ == "__main__":
    run_command(main, __doc__)
