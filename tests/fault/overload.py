"""Sends five times what an engine can answer, beside a batch: `python -m tests.fault.overload --seconds 300`.

A real engine with the built-in model. First clients that always have a next request show its peak; then requests come
at random moments whatever becomes of the earlier ones, each with a `timeout_s`. Prints one JSON object: the requests a
second that were answered whole, beside the peak; how long refusals took; and what the batch got meanwhile, which shows
whether requests wait behind its lines. The exit code is 1 where the bounds do not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from toka_engine.benchmarks.engine import read_metrics, wait_idle

from tests.fault.batch_beside_online import (
    OUTPUT_TOKENS,
    URL,
    count_tokens,
    make_body,
    measure_peak,
    percentile_ms,
    run,
    running_batch,
    upload,
)

MEAN_TOKENS = sum(OUTPUT_TOKENS) / 2
MIN_GOODPUT, MAX_REFUSAL_MS, MAX_BATCH_SHARE = 0.9, 100.0, 0.1


@dataclass
class Outcomes:
    """The ends of the requests, counted."""

    counts: Counter[str] = field(default_factory=Counter)
    answered_tokens: int = 0
    wasted_tokens: int = 0
    """Tokens of answers that were not whole when their time was over."""
    refusals_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)


async def ask(session: aiohttp.ClientSession, body: dict[str, Any], outcomes: Outcomes) -> None:
    """Stream one answer and note its end."""
    began, num_tokens, error = time.monotonic(), 0, ""
    async with session.post(URL, json={**body, "stream": True}) as response:
        if response.status != 200:
            answer = await response.json()
            error = f"{response.status} {answer['error']['code']}"
            if response.status == 429:
                outcomes.refusals_s.append(time.monotonic() - began)
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    error = f"in the stream: {event['error']['code']}"
                else:
                    num_tokens += 1
    outcomes.counts[error or "answered"] += 1
    if error:
        outcomes.wasted_tokens += num_tokens
    else:
        outcomes.answered_tokens += num_tokens
        outcomes.latencies_s.append(time.monotonic() - began)


async def overload(session: aiohttp.ClientSession, seconds: float, rate: float, timeout_s: float) -> Outcomes:
    chance, outcomes = random.Random(3), Outcomes()
    began, moment = time.monotonic(), 0.0
    tasks: set[asyncio.Task[None]] = set()
    while (moment := moment + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
        tasks.add(asyncio.create_task(ask(session, make_body(chance) | {"timeout_s": timeout_s}, outcomes)))
    await asyncio.gather(*tasks)
    return outcomes


async def measure(base_url: str, chosen: argparse.Namespace) -> dict[str, Any]:
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, timeout=timeout, connector=connector) as session:
        file_id = await upload(session)
        before = await measure_peak(session, base_url, chosen.calibrate, chosen.clients)
        await wait_idle(base_url)
        rate = chosen.times * before / MEAN_TOKENS
        async with running_batch(session, file_id):
            alone = await count_tokens(base_url, chosen.calibrate)
            first, began = await read_metrics(base_url), time.monotonic()
            outcomes = await overload(session, chosen.seconds, rate, chosen.timeout)
            last, seconds = await read_metrics(base_url), time.monotonic() - began
        await wait_idle(base_url)
        after = await measure_peak(session, base_url, chosen.calibrate, chosen.clients)
    everything = (last["toka_output_tokens_total"] - first["toka_output_tokens_total"]) / seconds
    answered, wasted = outcomes.answered_tokens / seconds, outcomes.wasted_tokens / seconds
    peak = (before + after) / 2 / MEAN_TOKENS
    goodput = outcomes.counts["answered"] / seconds
    figures: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "requests_a_second": round(rate, 2),
        "peak_a_second": [round(before / MEAN_TOKENS, 2), round(after / MEAN_TOKENS, 2)],
        "answered_a_second": round(goodput, 2),
        "goodput_share": round(goodput / peak, 2),
        "answered_tokens_a_second": round(answered, 1),
        "wasted_tokens_a_second": round(wasted, 1),
        "batch_tokens_a_second": round(everything - answered - wasted, 1),
        "batch_alone_tokens_a_second": round(alone, 1),
        "outcomes": dict(outcomes.counts),
        **{f"refusal_p{rank}_ms": percentile_ms(outcomes.refusals_s, rank) for rank in (50, 99, 100)},
        **{f"answered_p{rank}_ms": percentile_ms(outcomes.latencies_s, rank) for rank in (50, 99)},
        "machine_load": round(os.getloadavg()[2], 1),
    }
    figures["holds"] = (
        figures["goodput_share"] >= MIN_GOODPUT
        and figures["refusal_p99_ms"] <= MAX_REFUSAL_MS
        and figures["batch_tokens_a_second"] <= MAX_BATCH_SHARE * alone
    )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--times", type=float, default=5.0, help="requests a second, in times of the peak")
    parser.add_argument("--timeout", type=float, default=20.0, help="timeout_s of each request")
    parser.add_argument("--calibrate", type=float, default=20.0, help="seconds of each saturated phase")
    return run(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
