"""Throughput of a whole engine: starts `toka`, drives it with token-id prompts, prints one JSON object.

Usage: python -m toka_engine.benchmarks.throughput MODEL_DIR [WORKLOAD ...] [key=value ...]
Workloads (all when none is named): single, prefill, chat, monkeys, sharegpt. `port=` names the engine's port, `scale=`
shrinks the number of requests, `vocab=` bounds the prompts' token ids (default: Llama 3's); any other key goes to
`toka`. Every request ignores the end token, so the number of tokens is known; answers that have another number are
counted as errors.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_READY_TIMEOUT_S = 600.0
_FIRST_TOKEN_ID = 300
_VOCAB_SIZE = "128000"


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    max_tokens: int
    num_choices: int = 1


@dataclass(frozen=True, slots=True)
class Workload:
    requests: list[Request]
    concurrency: int
    is_streamed: bool = False


@dataclass(slots=True)
class Result:
    """What the client saw."""

    output_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def make_workload(name: str, scale: float, vocab_size: int) -> Workload:
    """The workloads of the design's tables. Lengths of sharegpt: log-normals, about 220 tokens in and 200 out."""
    source = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [source.randrange(_FIRST_TOKEN_ID, vocab_size) for _ in range(count)]

    def length(mean: float, deviation: float) -> int:
        return max(4, min(1024, int(source.lognormvariate(mean, deviation))))

    def scaled(count: int) -> int:
        return max(1, int(count * scale))

    match name:
        case "single":
            return Workload([Request(tokens(128), 256) for _ in range(3)], 1)
        case "prefill":
            return Workload([Request(tokens(2048), 1) for _ in range(scaled(512))], 4096)
        case "chat":
            return Workload([Request(tokens(512), 256) for _ in range(scaled(1024))], 256, is_streamed=True)
        case "monkeys":
            shared = tokens(768)
            return Workload([Request(shared + tokens(256), 200, 256) for _ in range(scaled(32))], 4096)
        case "sharegpt":
            count = scaled(8192)
            return Workload([Request(tokens(length(4.6, 1.2)), length(4.9, 0.9)) for _ in range(count)], 8192)
        case _:
            raise SystemExit(f"unknown workload {name}")


async def drive(base_url: str, model: str, workload: Workload) -> tuple[Result, float]:
    """Send the requests, `concurrency` at a time; returns what came and the seconds it took."""
    result, limit = Result(), asyncio.Semaphore(workload.concurrency)
    timeout, connector = aiohttp.ClientTimeout(total=1200), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, timeout=timeout, connector=connector) as session:

        async def send(request: Request) -> None:
            async with limit:
                await _send(session, model, request, workload.is_streamed, result)

        began = time.perf_counter()
        await asyncio.gather(*map(send, workload.requests))
        return result, time.perf_counter() - began


async def _send(
    session: aiohttp.ClientSession, model: str, request: Request, is_streamed: bool, result: Result
) -> None:
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "n": request.num_choices,
        "temperature": 1.0,
        "ignore_eos": True,
    }
    if is_streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            result.errors.append(f"{response.status} {(await response.text())[:200]}")
            return
        usage = await _read_stream(response, began, result) if is_streamed else (await response.json())["usage"]
    result.latencies_s.append(time.perf_counter() - began)
    result.output_tokens += usage.get("completion_tokens", 0)
    if usage.get("completion_tokens") != request.max_tokens * request.num_choices:
        result.errors.append(f"completion_tokens {usage.get('completion_tokens')}")


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


def percentiles_ms(values: list[float]) -> dict[str, float] | None:
    """p50, p90 and p99 of seconds, in milliseconds."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{q}": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)] * 1e3, 2) for q in (50, 90, 99)}


def summarize(workload: Workload, result: Result, seconds: float) -> dict[str, Any]:
    """One workload's part of the JSON."""
    input_tokens = sum(len(request.prompt) for request in workload.requests)
    return {
        "requests": len(workload.requests),
        "seconds": round(seconds, 2),
        "output_tokens_per_s": round(result.output_tokens / seconds, 1),
        "input_tokens_per_s": round(input_tokens / seconds, 1),
        "latency_ms": percentiles_ms(result.latencies_s),
        "first_token_ms": percentiles_ms(result.first_s),
        "inter_token_ms": percentiles_ms(result.gaps_s),
        "errors": len(result.errors),
        "first_errors": result.errors[:2],
    }


@contextmanager
def running_engine(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`toka` with these arguments, ended on exit."""
    engine = subprocess.Popen([sys.executable, "-m", "toka_engine", *arguments])
    try:
        yield engine
    finally:
        engine.terminate()
        try:
            engine.wait(timeout=30)
        except subprocess.TimeoutExpired:
            engine.kill()
            engine.wait()


async def wait_until_ready(base_url: str, engine: subprocess.Popen[bytes]) -> float:
    """Seconds until /readyz says so. Raises SystemExit when the engine ends first."""
    began = time.perf_counter()
    async with aiohttp.ClientSession(base_url) as session:
        while time.perf_counter() - began < _READY_TIMEOUT_S:
            if engine.poll() is not None:
                raise SystemExit(f"the engine ended with code {engine.returncode}")
            try:
                async with session.get("/readyz") as response:
                    if response.status == 200:
                        return time.perf_counter() - began
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.05)  # another process starts: there is no event to wait for
    raise SystemExit(f"the engine was not ready after {_READY_TIMEOUT_S:.0f} s")


async def measure(base_url: str, workloads: dict[str, Workload], engine: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for the engine, then run one workload after the other."""
    report: dict[str, Any] = {"ready_s": round(await wait_until_ready(base_url, engine), 2)}
    async with aiohttp.ClientSession(base_url) as session, session.get("/v1/models") as response:
        model = (await response.json())["data"][0]["id"]
    await drive(base_url, model, Workload([Request([_FIRST_TOKEN_ID] * 8, 8)], 1))
    for name, workload in workloads.items():
        report[name] = summarize(workload, *await drive(base_url, model, workload))
        print(json.dumps({name: report[name]}), file=sys.stderr, flush=True)
    return report


def main() -> None:
    folder, *rest = sys.argv[1:]
    settings = dict(argument.split("=", 1) for argument in rest if "=" in argument)
    names = [argument for argument in rest if "=" not in argument]
    names = names or ["single", "prefill", "chat", "monkeys", "sharegpt"]
    scale, port = float(settings.pop("scale", "1")), settings.setdefault("port", "10210")
    vocab_size = int(settings.pop("vocab", _VOCAB_SIZE))
    workloads = {name: make_workload(name, scale, vocab_size) for name in names}
    with running_engine(f"model={folder}", *(f"{key}={value}" for key, value in settings.items())) as engine:
        print(json.dumps(asyncio.run(measure(f"http://127.0.0.1:{port}", workloads, engine))))


if __name__ == "__main__":
    main()
