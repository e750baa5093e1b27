"""CPU time of the manager alone per step. Prints one JSON object.

Usage: python -m toka_engine.benchmarks.manager [--steps 500] [--runs 3] [--only NAME] [--profile NAME]

The bars: at most 4 ms per step with 4,096 slots and 0.3 ms with 64, in each workload.

The true core with a worker that answers each step at once with random tokens. CPU time (process_time) of
everything that the manager's process does per step except its system calls: planning, encoding the step,
decoding the tokens, advancing the slots and encoding the deltas. The worker's and the client's own work is
not counted.

Workloads, each for 64 and 4,096 slots:
- decode: steady state, nothing arrives or ends (many samples per prompt: 770 shared tokens, 96 own at first)
- mix: ShareGPT-like lengths (log-normal, prompts of ~220 and outputs of ~200 tokens); each end lets a
  waiting one in. At 4,096 slots the prefill of what arrives holds the running streams to about 3,700
- shared: the same behind one system prompt of 512 tokens, so that Hydragen's groups change in every step
- logprobs: as mix, and every request asks for the five likeliest tokens of each place
- short: as shared, with pages for 1,048,576 tokens only: some 2,500 streams fill them, so that each admission
  forecasts the use of pages. (64 slots never fill them: not run.)

Every run does the same work in the same order, so a step's time is the least of `--runs` runs: what other
processes on the machine add is left out.
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
from dataclasses import dataclass
from typing import Any

import numpy as np

from toka_engine.codec import Decoder, encode
from toka_engine.config import EngineConfig
from toka_engine.manager.core import Manager
from toka_engine.manager.loop import make_collections_rare
from toka_engine.manager.sizes import choose_sizes
from toka_engine.messages import Deltas, ManagerToWorker, Step, Submit, Tokens, WorkerReady, WorkerToManager
from toka_engine.output import run_command
from toka_engine.slot_parameters import Sampling

VOCABULARY = 128_256
STOP = 128_001
AMPLE_PAGES = 1 << 18
"""KV of 4 million tokens: what one H200 holds beside a 1B model."""
SHORT_PAGES = 1 << 16


def worker_ready(max_seqs: int, num_pages: int) -> WorkerReady:
    """Sizes of a 1B model on one large GPU."""
    return WorkerReady(
        vocab_size=VOCABULARY, max_positions=131_072, num_pages=num_pages, page_size=16, max_seqs=max_seqs,
        max_tokens_per_forward=8192, max_pages_per_seq=8192, device="cuda", dtype="bfloat16",
        num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
    )  # fmt: skip


class Bench:
    """Counts only the manager's own time."""

    def __init__(self, num_streams: int, num_pages: int, num_logprobs: int = -1) -> None:
        config = EngineConfig()
        self.sampling = Sampling(num_logprobs=num_logprobs)
        self.manager = Manager(config, choose_sizes(config, worker_ready(num_streams, num_pages)), time.monotonic)
        self.rng = np.random.default_rng(1)
        self.frames: deque[bytes] = deque()
        self.steps: Decoder[ManagerToWorker] = Decoder(ManagerToWorker)
        self.tokens: Decoder[WorkerToManager] = Decoder(WorkerToManager)
        self.num_ended = 0
        self.num_streams = 0
        self.spent_s = 0.0
        """Since the last step."""
        self.num_rows = 0

    def submit(self, prompt: np.ndarray[Any, Any], max_tokens: int, n: int = 1) -> None:
        stops = (STOP,)
        message = Submit(self.num_streams, n, prompt, max_tokens, self.sampling, stops, False)
        self.num_streams += n
        start = time.process_time()
        self.manager.handle(message)
        self.spent_s += time.process_time() - start

    def turn(self) -> None:
        """One step: plan what can be sent, then take the oldest step's tokens."""
        start = time.process_time()
        while step := self.manager.plan():
            self.frames.append(encode(step))
        self.spent_s += time.process_time() - start
        answer = self._run(self.frames.popleft())
        start = time.process_time()
        tokens = self.tokens.decode(answer)
        assert isinstance(tokens, Tokens)
        for message in self.manager.receive(tokens):
            encode(message)
            self.num_ended += message.ended.size if isinstance(message, Deltas) else 0
        self.spent_s += time.process_time() - start

    def measure(self, num_steps: int, between: Callable[[], None] = lambda: None) -> Measured:
        seconds = np.zeros(num_steps)
        self.num_rows, first = 0, self.num_ended
        for index in range(num_steps):
            self.spent_s = 0.0
            between()
            self.turn()
            seconds[index] = self.spent_s
        return Measured(seconds, self.num_rows, self.num_ended - first)

    def _run(self, frame: bytes) -> bytes:
        step = self.steps.decode(frame)
        assert isinstance(step, Step)
        count = step.decode_slots.size + step.fanout_slots.size
        self.num_rows += count
        ids, width = self.rng.integers(0, STOP, count, dtype=np.int32), self.sampling.num_logprobs
        if width < 1:
            return encode(Tokens(step.number, ids))
        logprobs, rows = np.zeros(count * width, np.float32), np.arange(count, dtype=np.int32)
        return encode(Tokens(step.number, ids, logprobs[:count], rows, np.repeat(ids, width), logprobs, width))


@dataclass(frozen=True)
class Measured:
    """Runs of one workload."""

    seconds: np.ndarray[Any, Any]  # [steps] CPU time
    num_rows: int
    num_ended: int

    def with_least_of(self, other: Measured) -> Measured:
        assert (self.num_rows, self.num_ended) == (other.num_rows, other.num_ended), "the runs differ"
        return Measured(np.minimum(self.seconds, other.seconds), self.num_rows, self.num_ended)

    def described(self) -> dict[str, float]:
        num_steps = self.seconds.size
        return {
            "cpu_ms_per_step": round(1e3 * float(self.seconds.mean()), 3),
            "cpu_ms_longest_step": round(1e3 * float(self.seconds.max()), 3),
            "rows_per_step": round(self.num_rows / num_steps, 1),
            "ends_per_step": round(self.num_ended / num_steps, 2),
        }


Run = Callable[[], Measured]


def decode(num_streams: int, num_steps: int) -> Run:
    bench = Bench(num_streams, AMPLE_PAGES)
    n = min(256, num_streams // 4)
    for _ in range(num_streams // n):
        bench.submit(bench.rng.integers(0, STOP, 770, dtype=np.int32), num_steps + 400, n)
    while bench.manager.state.rows.slots.size < num_streams:
        bench.turn()
    for _ in range(96):
        bench.turn()
    return lambda: bench.measure(num_steps)


def mix(
    num_streams: int, num_steps: int, num_shared: int = 0, num_pages: int = AMPLE_PAGES, num_logprobs: int = -1
) -> Run:
    bench = Bench(num_streams, num_pages, num_logprobs)
    shared = bench.rng.integers(0, STOP, num_shared, np.int32)

    def refill() -> None:
        while bench.num_streams - bench.num_ended < num_streams + 64:
            prompt = bench.rng.integers(0, STOP, int(np.clip(bench.rng.lognormal(4.9, 1.0), 4, 1024)), np.int32)
            bench.submit(np.concatenate((shared, prompt)), int(np.clip(bench.rng.lognormal(4.9, 0.9), 4, 1024)))

    for _ in range(600):
        refill()
        bench.turn()
    return lambda: bench.measure(num_steps, refill)


WORKLOADS: dict[str, Callable[[int, int], Run]] = {
    "decode/64": decode,
    "decode/4096": decode,
    "mix/64": mix,
    "mix/4096": mix,
    "shared/64": functools.partial(mix, num_shared=512),
    "shared/4096": functools.partial(mix, num_shared=512),
    "logprobs/64": functools.partial(mix, num_logprobs=5),
    "logprobs/4096": functools.partial(mix, num_logprobs=5),
    "short/4096": functools.partial(mix, num_shared=512, num_pages=SHORT_PAGES),
}
"""By name/slots."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", metavar="NAME", choices=WORKLOADS, help="measure one, such as mix/4096")
    parser.add_argument("--profile", metavar="NAME", choices=WORKLOADS, help="print a profile of one")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    make_collections_rare()  # as the process does
    for name, prepare in WORKLOADS.items():
        if name != (options.profile or options.only or name):
            continue
        num_streams = int(name.partition("/")[2])
        if options.profile:
            profiler = cProfile.Profile()
            measured = profiler.runcall(prepare(num_streams, options.steps))
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(35)
        else:
            runs = (prepare(num_streams, options.steps)() for _ in range(options.runs))
            measured = functools.reduce(Measured.with_least_of, runs)
        results[name] = measured.described()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    run_command(main)
