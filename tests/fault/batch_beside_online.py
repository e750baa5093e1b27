"""Measures requests beside a batch that never ends: `python -m tests.fault.batch_beside_online --rounds 4`.

A real engine with the built-in model takes streamed requests at half of the rate that it can answer, at random moments,
alone and beside a batch, in turns and with the same moments in both. Prints one JSON object: the gaps between tokens
and the times to the first token of both, their ratios, and the share that the batch had of what those requests left.
The exit code is 1 where the bounds do not hold.

What is left is the rate of tokens of an engine that always has a next request, less those of the streamed requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from toka_engine.benchmarks.engine import read_metrics, wait_idle
from toka_engine.benchmarks.throughput import count_engine

from tests.engine_process import EngineProcess

MODEL = "smollm2"
URL = "/v1/completions"
PROMPT_TOKENS = (32, 96)
OUTPUT_TOKENS = (24, 56)
HIGHEST_ID = 49_000
"""The prompts' token ids are below it: the built-in model has few more."""
SETTLE_S = 4.0
"""The first seconds of a phase, which are in no figure."""
STEP_FIGURES = ("busy_ms_per_step", "worker_cpu_ms_per_step", "manager_cpu_ms_per_step")
"""They say whether steps are as long as the work of the device or that of the host."""
MAX_GAP_RATIO, MAX_FIRST_RATIO, MIN_SHARE = 1.2, 1.5, 0.6


@dataclass
class Seen:
    """The streams of one kind of phase, as the client saw them."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    engine_counts: list[dict[str, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        means = {name: float(np.mean([counts[name] for counts in self.engine_counts])) for name in STEP_FIGURES}
        return {
            "requests": len(self.first_s),
            **{name: round(value, 2) for name, value in means.items()},
            **{f"gap_p{rank}_ms": percentile_ms(self.gaps_s, rank) for rank in (50, 99)},
            **{f"first_p{rank}_ms": percentile_ms(self.first_s, rank) for rank in (50, 99)},
        }


def percentile_ms(seconds: list[float], rank: int) -> float:
    return round(float(np.percentile(seconds, rank)) * 1e3, 1) if seconds else float("nan")


def make_body(chance: random.Random) -> dict[str, Any]:
    prompt = [chance.randrange(300, HIGHEST_ID) for _ in range(chance.randint(*PROMPT_TOKENS))]
    return {"model": MODEL, "prompt": prompt, "max_tokens": chance.randint(*OUTPUT_TOKENS), "ignore_eos": True}


async def ask(session: aiohttp.ClientSession, body: dict[str, Any], seen: Seen) -> None:
    """Stream one answer and note when its tokens came."""
    last, is_first = time.monotonic(), True
    async with session.post(URL, json={**body, "stream": True}) as response:
        if response.status != 200:
            raise AssertionError(await response.text())
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.monotonic()
            (seen.first_s if is_first else seen.gaps_s).append(now - last)
            last, is_first = now, False
            seen.num_tokens += 1


async def count_tokens(base_url: str, seconds: float) -> float:
    """Return the output tokens a second, all together, over the next `seconds`."""
    return (await count_steps(base_url, seconds))["output_tokens_per_s"]


async def count_steps(base_url: str, seconds: float) -> dict[str, float]:
    """Return what the engine does over the next `seconds`: `count_engine` and the output tokens a second."""
    before, began = await read_metrics(base_url), time.monotonic()
    await asyncio.sleep(seconds)
    after, took = await read_metrics(base_url), time.monotonic() - began
    counts = count_engine(before, after, took, peak_running=0)
    return {**counts, "output_tokens_per_s": counts["output_tokens"] / took}


async def measure_peak(session: aiohttp.ClientSession, base_url: str, seconds: float, num_clients: int) -> float:
    """Return the output tokens a second while there is always a next request."""
    chance = random.Random(1)

    async def keep_asking() -> None:
        while True:
            await ask(session, make_body(chance), Seen())

    clients = [asyncio.create_task(keep_asking()) for _ in range(num_clients)]
    await asyncio.sleep(SETTLE_S)
    rate = await count_tokens(base_url, seconds)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return rate


@contextlib.asynccontextmanager
async def running_batch(session: aiohttp.ClientSession, file_id: str) -> AsyncIterator[None]:
    """Run a batch, which is cancelled on exit."""
    body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
    async with session.post("/v1/batches", json=body) as response:
        batch = await response.json()
    while batch["status"] == "validating":
        await asyncio.sleep(0.1)
        async with session.get(f"/v1/batches/{batch['id']}") as response:
            batch = await response.json()
    if batch["status"] != "in_progress":
        raise AssertionError(batch)
    try:
        yield
    finally:
        async with session.post(f"/v1/batches/{batch['id']}/cancel") as response:
            await response.read()


async def upload(session: aiohttp.ClientSession, num_lines: int) -> str:
    chance = random.Random(2)
    lines = (
        {"custom_id": str(number), "method": "POST", "url": URL, "body": make_body(chance)}
        for number in range(num_lines)
    )
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    while True:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", data, filename="lines.jsonl")
        async with session.post("/v1/files", data=form) as response:
            if response.status == 200:
                return str((await response.json())["id"])
            if response.status != 503:
                raise AssertionError(await response.text())
        await asyncio.sleep(0.1)  # the folder opens beside the start


async def run_phase(
    session: aiohttp.ClientSession, base_url: str, seconds: float, rate: float, seed: int, seen: Seen
) -> None:
    """Send requests at random moments for so long, `rate` a second, and wait for their answers."""
    chance = random.Random(seed)
    unused = Seen()
    began = time.monotonic()
    counting = asyncio.create_task(_count_others(base_url, SETTLE_S, seconds - SETTLE_S, seen))
    tasks = []
    moment = 0.0
    while (moment := moment + chance.expovariate(rate)) < seconds:
        body = make_body(chance)
        await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
        tasks.append(asyncio.create_task(ask(session, body, unused if moment < SETTLE_S else seen)))
    await asyncio.gather(counting, *tasks)


async def _count_others(base_url: str, delay_s: float, seconds: float, seen: Seen) -> None:
    await asyncio.sleep(delay_s)
    seen.engine_counts.append(await count_steps(base_url, seconds))


async def measure(base_url: str, chosen: argparse.Namespace) -> dict[str, Any]:
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    alone, beside = Seen(), Seen()
    mean_tokens = sum(OUTPUT_TOKENS) / 2
    async with aiohttp.ClientSession(base_url, timeout=timeout, connector=connector) as session:
        file_id = await upload(session, chosen.lines)
        peaks = []
        for number in range(chosen.rounds):
            peaks.append(await measure_peak(session, base_url, chosen.calibrate, chosen.clients))
            rate = chosen.load * peaks[-1] / mean_tokens
            await wait_idle(base_url)
            await run_phase(session, base_url, chosen.seconds, rate, number, alone)
            async with running_batch(session, file_id):
                await run_phase(session, base_url, chosen.seconds, rate, number, beside)
            await wait_idle(base_url)
            print(number, alone.figures(), beside.figures(), file=sys.stderr, flush=True)
    return judge(alone, beside, peaks, chosen.load)


def judge(alone: Seen, beside: Seen, peaks: list[float], load: float) -> dict[str, Any]:
    """Return the figures; the requests of both kinds of phases were the same, and so are their tokens."""
    online, both = (
        float(np.mean([each["output_tokens_per_s"] for each in seen.engine_counts])) for seen in (alone, beside)
    )
    batch = both - online
    left = float(np.mean(peaks)) * (1 - load)
    first, second = alone.figures(), beside.figures()
    figures = {
        "load": load,
        "peak_tokens_a_second": [round(peak, 1) for peak in peaks],
        "online_tokens_a_second": round(online, 1),
        "alone": first,
        "beside": second,
        "gap_p50_ratio": round(second["gap_p50_ms"] / first["gap_p50_ms"], 2),
        "gap_p99_ratio": round(second["gap_p99_ms"] / first["gap_p99_ms"], 2),
        "first_p99_ratio": round(second["first_p99_ms"] / first["first_p99_ms"], 2),
        "batch_tokens_a_second": round(batch, 1),
        "batch_share_of_left": round(batch / left, 2),
        "machine_load": round(os.getloadavg()[2], 1),
    }
    figures["holds"] = (
        figures["gap_p99_ratio"] <= MAX_GAP_RATIO
        and figures["first_p99_ratio"] <= MAX_FIRST_RATIO
        and figures["batch_share_of_left"] >= MIN_SHARE
    )
    return figures


def run(
    parser: argparse.ArgumentParser,
    measure_engine: Callable[[str, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]],
) -> int:
    """Measure an engine that keeps batches; print the figures, and return the exit code."""
    more = "clients that ask without a pause, for the peak: on two cores more than 64 make nothing faster"
    parser.add_argument("--clients", type=int, default=64, help=more)
    parser.add_argument("--lines", type=int, default=20_000, help="of the batch, which must not end within a phase")
    parser.add_argument("--model", default="builtin://smollm2", help="with a vocabulary of 49,000 tokens or more")
    parser.add_argument("settings", nargs="*", help="further settings of the engine, key=value")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fixed = (f"model={chosen.model}", f"served_model_name={MODEL}", f"data_dir={folder}/data", "access_log=F")
        settings = (*fixed, *chosen.settings)
        with EngineProcess(Path(folder), *settings) as engine:
            engine.wait_ready()
            figures = asyncio.run(measure_engine(engine.url, chosen))
    print(json.dumps(figures), flush=True)
    return 0 if figures["holds"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each phase")
    parser.add_argument("--calibrate", type=float, default=10.0, help="seconds of each saturated phase")
    parser.add_argument("--load", type=float, default=0.5, help="part of the rate that the engine can answer")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
