"""The engine on a CPU with the built-in model, against transformers in the same run. Prints one JSON object.

Usage: python -m toka_engine.benchmarks.cpu [port=10310]
Measures: seconds to ready, memory of each process, tokens per second of one and of 32 streams (bfloat16 both sides,
transformers.generate one prompt after the other), and n = 32 choices of a 512-token prompt against 32 requests that
share nothing. Needs psutil and transformers. Quote it from a machine that does nothing else.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil

from toka_engine.benchmarks.client import drive
from toka_engine.benchmarks.engine import running_engine, wait_until_ready
from toka_engine.benchmarks.workloads import Request, Workload
from toka_engine.builtin import ensure_builtin
from toka_engine.output import run_command

_PROMPT_TOKENS, _OUTPUT_TOKENS, _ROUNDS = 32, 64, 3
_SHARED_PROMPT_TOKENS, _SHARED_OUTPUT_TOKENS, _CHOICES = 512, 16, 32
_SETTINGS = ("drain_endpoint_delay_s=0", "log_level=WARNING", "uvicorn_log_level=warning")


def make_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids that any vocabulary of this size has."""
    source = random.Random(seed)
    return [[source.randrange(300, 49_000) for _ in range(length)] for _ in range(count)]


def measure_transformers() -> float:
    """Tokens per second of transformers.generate, one prompt after the other; the median of the prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ensure_builtin(), dtype=torch.bfloat16)
    speeds: list[float] = []
    for prompt in make_prompts(_ROUNDS + 1, _PROMPT_TOKENS, seed=1):
        ids = torch.tensor([prompt])
        began = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                min_new_tokens=_OUTPUT_TOKENS,
                max_new_tokens=_OUTPUT_TOKENS,
                pad_token_id=0,
            )
        speeds.append((output.shape[1] - _PROMPT_TOKENS) / (time.perf_counter() - began))
    return statistics.median(speeds[1:])


def measure_memory(engine: subprocess.Popen[bytes]) -> dict[str, int]:
    """Resident MB by process: supervisor, server, manager, model."""
    root = psutil.Process(engine.pid)
    names = {root.pid: "supervisor"}
    for child in root.children():
        names[child.pid] = next(
            (word.removeprefix("toka_engine.") for word in child.cmdline() if word.startswith("toka_engine.")), "other"
        )
    return {name: psutil.Process(pid).memory_info().rss // 2**20 for pid, name in names.items()}


async def measure_speed(base_url: str, requests: list[Request], concurrency: int) -> float:
    """Output tokens per second."""
    result = await drive(base_url, "smollm2", Workload(requests, concurrency))
    if result.errors:
        raise SystemExit(f"errors: {result.errors}")
    return result.output_tokens / result.seconds


def run_engine(port: str, *settings: str) -> dict[str, Any]:
    """Start the engine, measure it, end it."""
    base_url = f"http://127.0.0.1:{port}"
    with running_engine(f"port={port}", *_SETTINGS, *settings) as engine:
        ready_s = asyncio.run(wait_until_ready(base_url, engine))

        def speed(prompts: list[list[int]], max_tokens: int, num_choices: int = 1, concurrency: int = 1) -> float:
            requests = [Request(prompt, max_tokens, num_choices) for prompt in prompts]
            return asyncio.run(measure_speed(base_url, requests, concurrency))

        speed(make_prompts(1, _PROMPT_TOKENS, seed=2), 8)
        single = [speed([prompt], _OUTPUT_TOKENS) for prompt in make_prompts(_ROUNDS, _PROMPT_TOKENS, seed=1)]
        many = [
            speed(make_prompts(32, _PROMPT_TOKENS, seed), _OUTPUT_TOKENS, concurrency=32)
            for seed in range(10, 10 + _ROUNDS)
        ]
        shared = make_prompts(_ROUNDS, _SHARED_PROMPT_TOKENS, seed=3)
        together = [speed([prompt], _SHARED_OUTPUT_TOKENS, _CHOICES) for prompt in shared]
        apart = [
            speed([prompt] * _CHOICES, _SHARED_OUTPUT_TOKENS, concurrency=_CHOICES)
            for prompt in make_prompts(1, _SHARED_PROMPT_TOKENS, seed=4)
        ]
        return {
            "ready_s": round(ready_s, 2),
            "memory_mb": measure_memory(engine),
            "one_stream_tok_s": round(statistics.median(single), 1),
            "32_streams_tok_s": round(statistics.median(many), 1),
            "n32_tok_s": round(statistics.median(together), 1),
            "32_equal_requests_tok_s": round(statistics.median(apart), 1),
        }


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    port = settings.get("port", "10310")
    ensure_builtin()
    report: dict[str, Any] = {"transformers_tok_s": round(measure_transformers(), 1)}
    report["engine"] = run_engine(port)
    report["engine_without_sharing"] = run_engine(port, "use_prefix_cache=F", "use_hydragen=F")
    engine, base = report["engine"], report["transformers_tok_s"]
    report["ratios"] = {
        "one_stream": round(engine["one_stream_tok_s"] / base, 2),
        "32_streams": round(engine["32_streams_tok_s"] / base, 2),
        "sharing_at_n32": round(engine["n32_tok_s"] / report["engine_without_sharing"]["32_equal_requests_tok_s"], 2),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_command(main, __doc__)
