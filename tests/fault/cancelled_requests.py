"""Sends 100,000 requests, of which half are left by their clients: `python -m tests.fault.cancelled_requests`.

A real engine with a tiny random model. Clients leave at any moment: right behind the request, in the queue, in the
prompt, between tokens. Prints one JSON object: what the engine still holds afterwards (sequences, pages, requests,
connections), and the growth of each process over the last half of the requests, in MiB. The exit code is 1 if anything
is held, an answer is not whole, or a process has grown by 1 MiB or more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from toka_engine.benchmarks.engine import wait_idle

from tests.e2e.tiny_model import NUM_TOKENS, make_model
from tests.engine_process import EngineProcess

MAX_GROWTH_MIB = 1.0
LONGEST_STAY_S = 0.2
SETTINGS = ("device=cpu", "served_model_name=m", "kv_cache_num_tokens=16384", "max_seqs_per_forward=64", "access_log=F")
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Client:
    """Sends one request after the other on a connection, and a new one where it has left."""

    def __init__(self, port: int, chance: random.Random, counts: Counter[str]) -> None:
        self._port = port
        self._chance = chance
        self._counts = counts
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, *, leaves: bool) -> None:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        body, is_streamed = self._make_body(leaves)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        self._writer.write(f"{head}\r\n\r\n".encode() + body)
        if not leaves:
            self._counts[await self._read_answer(is_streamed)] += 1
            return
        try:
            async with asyncio.timeout(self._chance.choice([0.0, 0.002, 0.02, LONGEST_STAY_S]) * self._chance.random()):
                await self._read_answer(is_streamed)
            self._counts["answered before the client left"] += 1
        except TimeoutError:
            self._counts["left"] += 1
        self._writer.transport.abort()
        self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _make_body(self, leaves: bool) -> tuple[bytes, bool]:
        chance = self._chance
        is_streamed = chance.random() < 0.5
        body = {
            "model": "m",
            "prompt": [chance.randrange(3, NUM_TOKENS) for _ in range(chance.choice([1, 20, 200]))],
            "max_tokens": chance.choice([100, 400]) if leaves else chance.randint(1, 8),
            "n": chance.choice([1, 1, 1, 4]),
            "ignore_eos": True,
            "stream": is_streamed,
            "priority": chance.choice([0, 0, 0, 100]),
        }
        if chance.random() < 0.2:
            body["timeout_s"] = 600.0
        return json.dumps(body).encode(), is_streamed

    async def _read_answer(self, is_streamed: bool) -> str:
        """Read to the end of the answer; return "answered", or what it was instead."""
        reader = self._reader
        assert reader is not None
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is not None:
            body = await reader.readexactly(int(length[1]))
            return "answered" if head.startswith(b"HTTP/1.1 200") else f"{head[9:12].decode()}: {body[:100]!r}"
        text = await reader.readuntil(b"0\r\n\r\n")
        is_whole = is_streamed and b"data: [DONE]" in text and b'"error"' not in text
        return "answered" if is_whole else f"a stream without its end: {text[-100:]!r}"


class Memory:
    """The resident memory of the engine's processes, by the number of requests."""

    def __init__(self, engine: EngineProcess) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in engine.children.items()}
        self._numbers: list[int] = []
        self._sizes: dict[str, list[int]] = {name: [] for name in self._processes}

    def sample(self, number: int) -> None:
        self._numbers.append(number)
        for name, process in self._processes.items():
            self._sizes[name].append(process.memory_info().rss)

    def count_files(self) -> dict[str, int]:
        return {name: process.num_fds() for name, process in self._processes.items()}

    def growth_mib(self) -> dict[str, float]:
        """Return the growth over the last half, by least squares."""
        half = len(self._numbers) // 2
        numbers = self._numbers[half:]
        span = numbers[-1] - numbers[0]
        return {
            name: round(float(np.polyfit(numbers, sizes[half:], 1)[0]) * span / 2**20, 3)
            for name, sizes in self._sizes.items()
        }

    def sizes_mib(self) -> dict[str, list[float]]:
        places = np.linspace(0, len(self._numbers) - 1, 9).astype(int).tolist()
        return {name: [round(sizes[place] / 2**20, 1) for place in places] for name, sizes in self._sizes.items()}


def wait_for_files(memory: Memory, before: dict[str, int]) -> dict[str, int]:
    """Return how many files and sockets more are open than before, once the last clients' ends have arrived."""
    for _ in range(50):
        more = {name: count - before[name] for name, count in memory.count_files().items()}
        if max(more.values()) <= 0:
            break
        time.sleep(0.1)
    return more


async def send_all(engine: EngineProcess, memory: Memory, chosen: argparse.Namespace) -> Counter[str]:
    """Send all requests, `chosen.clients` at once."""
    counts: Counter[str] = Counter()
    chance = random.Random(chosen.seed)
    numbers = iter(range(chosen.requests))
    every = max(1, chosen.requests // 400)

    async def work() -> None:
        client = Client(engine.port, random.Random(chance.random()), counts)
        for number in numbers:
            await client.send(leaves=number % 2 == 1)
            if number % every == 0:
                memory.sample(number)
            if number % (every * 40) == 0:
                print(number, dict(counts), file=sys.stderr, flush=True)
        client.close()

    await asyncio.gather(*(work() for _ in range(chosen.clients)))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        make_model(model)
        with EngineProcess(Path(folder), f"model={model}", *SETTINGS) as engine:
            engine.wait_ready()
            memory = Memory(engine)
            before, began = memory.count_files(), time.monotonic()
            counts = asyncio.run(send_all(engine, memory, chosen))
            held: dict[str, Any] = asyncio.run(wait_idle(engine.url))
            more_files = wait_for_files(memory, before)
            seconds = time.monotonic() - began
    growth = memory.growth_mib()
    figures = {
        "requests": chosen.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(counts),
        "held": held,
        "more_open_files": more_files,
        "growth_mib": growth,
        "sizes_mib": memory.sizes_mib(),
    }
    print(json.dumps(figures), flush=True)
    is_whole = set(counts) <= {"answered", "left", "answered before the client left"}
    is_flat = max(growth.values()) < MAX_GROWTH_MIB
    return 0 if is_whole and is_flat and not held and max(more_files.values()) <= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
