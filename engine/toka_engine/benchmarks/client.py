"""Sends a workload's requests and notes what comes: in this process, or in several that start at the same moment.

One asyncio client handles some 40,000 events a second: with more, the gaps that it notes are its own backlog. So a
workload may be dealt out to processes; each makes the prompts itself from the workload's text and seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

import toka_engine
from toka_engine.benchmarks.workloads import Request, Workload, make_workload
from toka_engine.output import run_command

_ERRORS_KEPT = 2


@dataclass(slots=True)
class Result:
    """Answers as clients saw them. Moments are of the machine's monotonic clock, which all processes share."""

    output_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    num_errors: int = 0
    errors: list[str] = field(default_factory=list)
    """The first few."""
    began_s: float = 0.0
    ended_s: float = 0.0
    cpu_share: float = 0.0
    """CPU time by wall time of the busiest client process: near 1, the client is what is measured."""

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    def note_error(self, error: str) -> None:
        self.num_errors += 1
        if len(self.errors) < _ERRORS_KEPT:
            self.errors.append(error)


def merge(results: Iterable[Result]) -> Result:
    """One result of all clients."""
    whole = Result(began_s=float("inf"))
    for part in results:
        whole.output_tokens += part.output_tokens
        whole.latencies_s += part.latencies_s
        whole.first_s += part.first_s
        whole.gaps_s += part.gaps_s
        whole.num_errors += part.num_errors
        whole.errors = (whole.errors + part.errors)[:_ERRORS_KEPT]
        whole.began_s = min(whole.began_s, part.began_s)
        whole.ended_s = max(whole.ended_s, part.ended_s)
        whole.cpu_share = max(whole.cpu_share, part.cpu_share)
    return whole


async def drive(base_url: str, model: str, workload: Workload) -> Result:
    """Send the requests from this process, `concurrency` at a time."""
    result, limit = Result(), asyncio.Semaphore(workload.concurrency)
    timeout, connector = aiohttp.ClientTimeout(total=1200), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, timeout=timeout, connector=connector) as session:

        async def send(request: Request) -> None:
            async with limit:
                await _send(session, model, request, workload, result)

        cpu_s, result.began_s = time.process_time(), time.monotonic()
        await asyncio.gather(*map(send, workload.requests))
        result.ended_s = time.monotonic()
        result.cpu_share = (time.process_time() - cpu_s) / result.seconds
    return result


async def _send(
    session: aiohttp.ClientSession, model: str, request: Request, workload: Workload, result: Result
) -> None:
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "n": request.num_choices,
        "ignore_eos": True,
        **workload.sampling,
    }
    if workload.is_streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                result.note_error(f"{response.status} {(await response.text())[:200]}")
                return
            if workload.is_streamed:
                usage = await _read_stream(response, began, result)
            else:
                usage = (await response.json())["usage"]
    except (aiohttp.ClientError, TimeoutError) as error:
        result.note_error(f"{type(error).__name__}: {error}")
        return
    result.latencies_s.append(time.perf_counter() - began)
    result.output_tokens += usage.get("completion_tokens", 0)
    if usage.get("completion_tokens") != request.num_output_tokens:
        result.note_error(f"completion_tokens {usage.get('completion_tokens')} of {request.num_output_tokens}")


async def _read_stream(response: aiohttp.ClientResponse, began: float, result: Result) -> dict[str, int]:
    usage: dict[str, int] = {}
    last = began
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        usage = event.get("usage") or usage
        if event.get("choices"):
            now = time.perf_counter()
            (result.first_s if last is began else result.gaps_s).append(now - last)
            last = now
    return usage


@dataclass(frozen=True, slots=True)
class Job:
    """The order to each client process: which workload, and whom to send it to."""

    base_url: str
    model: str
    workload: str
    scale: float
    seed: int
    vocab_size: int

    def make_workload(self) -> Workload:
        return make_workload(self.workload, self.scale, self.seed, self.vocab_size)


async def drive_in_processes(job: Job, num_processes: int) -> Result:
    """Deal the workload out to as many processes, start them together, and merge what they saw."""
    environment = {**os.environ, "PYTHONPATH": str(Path(toka_engine.__file__).parents[1])}
    description = json.dumps(dataclasses.asdict(job))
    pipe = asyncio.subprocess.PIPE
    processes: list[asyncio.subprocess.Process] = []
    try:
        for index in range(num_processes):
            arguments = ["-m", "toka_engine.benchmarks.client", description, str(index), str(num_processes)]
            processes.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, *arguments, stdin=pipe, stdout=pipe, env=environment
                )
            )
        results = await _start_and_read(processes)
    except BaseException:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        raise
    finally:
        for process in processes:
            await process.wait()
    return merge(results)


async def _start_and_read(processes: Sequence[asyncio.subprocess.Process]) -> list[Result]:
    """Start all clients once each has its prompts; what they print at their end."""
    ends = [(process.stdin, process.stdout) for process in processes]
    for _, out in ends:
        if out is None or await out.readline() != b"ready\n":
            raise SystemExit("a client process ended before it was ready")
    for end, _ in ends:
        if end is not None:
            end.write(b"go\n")
    answers = await asyncio.gather(*(out.read() for _, out in ends if out is not None))
    if not all(answers):
        raise SystemExit("a client process ended without a result")
    return [Result(**json.loads(answer)) for answer in answers]


def main() -> None:
    """A client process: makes its part, says ready, waits for a line, sends, prints its Result."""
    description, index, count = sys.argv[1:]
    job = Job(**json.loads(description))
    part = job.make_workload().part(int(index), int(count))
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever asked is gone
    print(json.dumps(dataclasses.asdict(asyncio.run(drive(job.base_url, job.model, part)))))


if __name__ == "__main__":
    run_command(main, __doc__)
