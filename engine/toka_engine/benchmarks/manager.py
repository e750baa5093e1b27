"""CPU time of the manager alone per step: `python -m toka_engine.benchmarks.manager [--profile NAME]`; prints one JSON.

The true core with a worker that answers each step at once with random tokens. CPU time (process_time) of
everything that the manager's process does per step except its system calls: planning, encoding the step,
decoding the tokens, advancing the slots and encoding the deltas. The worker's and the client's own work is
not counted.

Workloads, each for 64 and 4,096 running streams:
- decode: steady state, nothing arrives or ends (many samples per prompt: 770 shared tokens, 96 own at first)
- mix: ShareGPT-like lengths (log-normal, prompts of ~220 and outputs of ~200 tokens); each end lets a
  waiting one in
- shared: the same behind one system prompt of 512 tokens, so that Hydragen's groups change in every step
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import json
import pstats
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from toka_engine.codec import Decoder, encode
from toka_engine.config import EngineConfig
from toka_engine.manager.core import Manager
from toka_engine.manager.loop import make_collections_rare
from toka_engine.manager.sizes import choose_sizes
from toka_engine.messages import (
    ManagerToWorker,
    Sampling,
    Step,
    Submit,
    Tokens,
    WorkerReady,
    WorkerToManager,
)

VOCABULARY = 128_256
STOP = 128_001


def worker_ready(max_seqs: int, num_pages: int) -> WorkerReady:
    """Sizes of a 1B model on one large GPU."""
    return WorkerReady(
        vocab_size=VOCABULARY, max_positions=131_072, num_pages=num_pages, page_size=16, max_seqs=max_seqs,
        max_tokens_per_forward=8192, max_pages_per_seq=8192, device="cuda", dtype="bfloat16",
        num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
    )  # fmt: skip


class Bench:
    """Counts only the manager's own time."""

    def __init__(self, num_streams: int, num_pages: int = 1 << 17) -> None:
        config = EngineConfig()
        self.manager = Manager(config, choose_sizes(config, worker_ready(num_streams, num_pages)))
        self.rng = np.random.default_rng(1)
        self.frames: deque[bytes] = deque()
        self.steps: Decoder[ManagerToWorker] = Decoder(ManagerToWorker)
        self.tokens: Decoder[WorkerToManager] = Decoder(WorkerToManager)
        self.num_ended = 0
        self.num_streams = 0
        self.cpu_s = 0.0
        self.most_s = 0.0
        self.num_rows = 0
        self.num_steps = 0

    def submit(self, prompt: np.ndarray[Any, Any], max_tokens: int, n: int = 1) -> None:
        stops = (STOP,)
        message = Submit(self.num_streams, n, prompt, max_tokens, Sampling(), stops, False)
        self.num_streams += n
        start = time.process_time()
        self.manager.handle(message)
        self.cpu_s += time.process_time() - start

    def turn(self) -> None:
        """One step: plan what can be sent, then take the oldest step's tokens."""
        start = time.process_time()
        while step := self.manager.plan():
            self.frames.append(encode(step))
        spent = time.process_time() - start
        answer = self._run(self.frames.popleft())
        start = time.process_time()
        tokens = self.tokens.decode(answer)
        assert isinstance(tokens, Tokens)
        for deltas in self.manager.receive(tokens):
            encode(deltas)
            self.num_ended += deltas.ended.size
        spent += time.process_time() - start
        self.cpu_s += spent
        self.most_s = max(self.most_s, spent)
        self.num_steps += 1

    def measure(self, num_steps: int, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        self.cpu_s = self.most_s = self.num_rows = self.num_steps = 0
        for _ in range(num_steps):
            between()
            self.turn()
        return {
            "cpu_ms_per_step": round(1e3 * self.cpu_s / num_steps, 3),
            "cpu_ms_longest_step": round(1e3 * self.most_s, 3),
            "rows_per_step": round(self.num_rows / num_steps, 1),
        }

    def _run(self, frame: bytes) -> bytes:
        step = self.steps.decode(frame)
        assert isinstance(step, Step)
        count = step.decode_slots.size + step.fanout_slots.size
        self.num_rows += count
        return encode(Tokens(step.number, self.rng.integers(0, STOP, count, dtype=np.int32)))


def decode(num_streams: int, num_steps: int) -> tuple[Bench, Callable[[], dict[str, float]]]:
    bench = Bench(num_streams, 1 << 18)
    n = min(256, num_streams // 4)
    for _ in range(num_streams // n):
        bench.submit(bench.rng.integers(0, STOP, 770, dtype=np.int32), num_steps + 400, n)
    while bench.manager.state.rows.slots.size < num_streams:
        bench.turn()
    for _ in range(96):
        bench.turn()
    return bench, lambda: bench.measure(num_steps)


def mix(num_streams: int, num_steps: int, num_shared: int = 0) -> tuple[Bench, Callable[[], dict[str, float]]]:
    bench = Bench(num_streams, 1 << 16)
    shared = bench.rng.integers(0, STOP, num_shared, np.int32)

    def refill() -> None:
        while bench.num_streams - bench.num_ended < num_streams + 64:
            prompt = bench.rng.integers(0, STOP, int(np.clip(bench.rng.lognormal(4.9, 1.0), 4, 1024)), np.int32)
            bench.submit(np.concatenate((shared, prompt)), int(np.clip(bench.rng.lognormal(4.9, 0.9), 4, 1024)))

    for _ in range(600):
        refill()
        bench.turn()
    return bench, lambda: bench.measure(num_steps, refill)


WORKLOADS: dict[str, Callable[[int, int], tuple[Bench, Callable[[], dict[str, float]]]]] = {
    "decode": decode,
    "mix": mix,
    "shared": functools.partial(mix, num_shared=512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--profile", metavar="WORKLOAD/STREAMS", help="print a profile of one, such as mix/4096")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    make_collections_rare()  # as the process does
    for name, prepare in WORKLOADS.items():
        for num_streams in (64, 4096):
            label = f"{name}/{num_streams}"
            if options.profile not in (None, label):
                continue
            _, run = prepare(num_streams, options.steps)
            if options.profile:
                profiler = cProfile.Profile()
                results[label] = profiler.runcall(run)
                pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(35)
            else:
                results[label] = run()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
