"""The manager and a worker whose steps take a known time, on a clock of their own: what streams would wait, exactly.

A machine that others use as well cannot show a difference of a few per cent; this one can.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace

import numpy as np
from toka_engine.config import EngineConfig
from toka_engine.manager.core import Manager
from toka_engine.manager.sizes import Sizes
from toka_engine.messages import Cancel, Deltas, Step, Submit, Tokens
from toka_engine.slot_parameters import Sampling

from tests.unit.manager.simulated import small_sizes

SIZES = replace(
    small_sizes(), num_pages=4000, page_size=16, num_slots=256, max_running=112, max_tokens_per_forward=128,
    max_prefill_tokens=128, max_lone_prefill_tokens=128, max_pages_per_seq=128, max_request_tokens=2048,
)  # fmt: skip
"""An engine on CPUs, as it is by default."""


@dataclass(frozen=True)
class Machine:
    """Milliseconds of a step; by default about those of the built-in model on two busy cores."""

    step_ms: float = 70.0
    row_ms: float = 4.0
    context_ms: float = 0.004
    prefill_ms: float = 1.6
    chunk_context_ms: float = 0.0
    """For each token of a chunk and each one before it."""
    least_mixed_ms: float = 0.0
    """A step with prompts takes that long, however small it is: the host of a GPU launches it kernel by kernel."""
    noise: float = 0.1
    """The spread of the logarithm of a step's time."""
    num_stages: int = 1
    """Pipeline stages, which each take an equal part of those times, one behind the other."""


CALM = Machine(step_ms=20.0, row_ms=1.2, context_ms=0.001, prefill_ms=0.5, noise=0.05)
"""The same where they do nothing else."""


@dataclass
class Times:
    """Seconds that streams of one kind have waited, their tokens, and how they ended."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_ended: int = 0
    num_refused: int = 0
    num_expired: int = 0

    def gap_ms(self, rank: int) -> float:
        return float(np.percentile(self.gaps_s, rank)) * 1e3

    def first_ms(self, rank: int) -> float:
        return float(np.percentile(self.first_s, rank)) * 1e3


@dataclass(frozen=True)
class Shape:
    """Sizes of requests: the least and the most of each."""

    prompt: tuple[int, int] = (32, 96)
    output: tuple[int, int] = (24, 56)
    is_streamed: bool = False


class TimedEngine:
    """Runs a manager against a `Machine`. Online requests come at random moments; the batch always has a next line.

    With `line_priority=0` the lines are clients that send their next request when the last one has ended.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        rate: float,
        num_lines: int,
        seed: int = 1,
        shape: Shape | None = None,
        timeout_s: float = 0.0,
        line_shape: Shape | None = None,
        line_priority: int = 100,
        sizes: Sizes = SIZES,
        config: EngineConfig | None = None,
    ) -> None:
        """`rate`: online requests a second, each with `timeout_s`; `num_lines`: lines of the batch that wait or run at
        once.
        """
        self.now = 0.0
        self.manager = Manager(config or EngineConfig(), sizes, lambda: self.now)
        self.times: dict[bool, Times] = defaultdict(Times)  # by whether it is background
        self._machine = machine
        self._shape = shape or Shape()
        self._line_shape = line_shape or self._shape
        self._line_priority = line_priority
        self._chance = random.Random(seed)
        self._noise = random.Random(seed + 1)
        self._rate = rate
        self._timeout_s = timeout_s
        self._deadlines: deque[tuple[float, int]] = deque()
        self._num_lines = num_lines
        self._num_streams = 0
        self._last: dict[int, tuple[float, bool, bool]] = {}  # stream: its last moment, is background, has had a token
        self._ends: deque[tuple[float, float, Step]] = deque()
        self._free_at = [0.0] * machine.num_stages
        self._ended_at: dict[int, float] = {}
        """The moments at which the last steps have left the last stage."""
        self._lengths = np.zeros(sizes.num_slots, np.int64)

    def run(self, seconds: float, settle_s: float = 20.0) -> None:
        """Run for so long, after `settle_s` that count for nothing."""
        arrivals: list[float] = []
        moment = 0.0
        while self._rate and (moment := moment + self._chance.expovariate(self._rate)) < seconds + settle_s:
            heapq.heappush(arrivals, moment)
        for _ in range(self._num_lines):
            self._submit(is_background=True)
        has_settled = False
        while self.now < seconds + settle_s:
            self._send_steps()
            end_s = self._ends[0][0] if self._ends else float("inf")
            next_s = arrivals[0] if arrivals else seconds + settle_s
            self.now = min(end_s, next_s)
            self._expire()
            if not has_settled and self.now >= settle_s:
                has_settled = True
                self.times.clear()
            if end_s <= next_s:
                self._return_step()
            elif arrivals:
                heapq.heappop(arrivals)
                self._submit(is_background=False)
            else:
                return

    def _submit(self, *, is_background: bool) -> None:
        chance, shape = self._chance, self._line_shape if is_background else self._shape
        source = self._noise if is_background else chance  # online requests are the same with and without a batch
        prompt = np.asarray([source.randrange(1, 40_000) for _ in range(source.randint(*shape.prompt))], np.int32)
        stream = self._num_streams
        self._num_streams += 1
        max_tokens = source.randint(*shape.output)
        submit = Submit(
            stream, 1, prompt, max_tokens, Sampling(), (), deliver_each=True,
            is_streamed=shape.is_streamed, priority=self._line_priority * is_background,
            timeout_s=0.0 if is_background else self._timeout_s,
        )  # fmt: skip
        if self.manager.handle(submit):
            assert not is_background
            self.times[False].num_refused += 1
            return
        self._last[stream] = self.now, is_background, False
        if submit.timeout_s:
            self._deadlines.append((self.now + submit.timeout_s, stream))

    def _expire(self) -> None:
        """Cancel the streams whose time is over, as the server does."""
        while self._deadlines and self._deadlines[0][0] <= self.now:
            stream = self._deadlines.popleft()[1]
            if self._last.pop(stream, None):
                self.times[False].num_expired += 1
                self.manager.handle(Cancel(np.asarray([stream], np.int64)))

    def _send_steps(self) -> None:
        while step := self.manager.plan():
            machine = self._machine
            self._lengths[step.decode_slots] += 1
            context, chunk_context = int(self._lengths[step.decode_slots].sum()), 0
            for slot, start, length in zip(
                step.prefill_slots.tolist(), step.prefill_starts.tolist(), step.prefill_lengths.tolist(), strict=True
            ):
                self._lengths[slot] = start + length
                chunk_context += length * (start + length // 2)
            milliseconds = (
                machine.step_ms
                + machine.row_ms * step.decode_slots.size
                + machine.context_ms * context
                + machine.prefill_ms * int(step.prefill_lengths.sum())
                + machine.chunk_context_ms * chunk_context
            )
            if step.prefill_slots.size:
                milliseconds = max(milliseconds, machine.least_mixed_ms)
            wall_s = milliseconds * 1e-3 * self._noise.lognormvariate(0.0, machine.noise)
            self._ends.append(self._pass_stages(step, wall_s / machine.num_stages))

    def _pass_stages(self, step: Step, stage_s: float) -> tuple[float, float, Step]:
        """Return when the last stage is done with `step`, and the seconds since that stage knew of it."""
        moment_s = max(self.now, self._ended_at.get(step.after, 0.0))  # the first stage waits for tokens
        for stage, free_at in enumerate(self._free_at):
            moment_s = self._free_at[stage] = max(moment_s, free_at) + stage_s
        self._ended_at[step.number] = moment_s
        self._ended_at.pop(step.number - 64, None)
        return moment_s, moment_s - self.now, step

    def _return_step(self) -> None:
        _, wall_s, step = self._ends.popleft()
        num_sampled = step.decode_slots.size + step.fanout_slots.size
        tokens = Tokens(step.number, np.full(num_sampled, 7, np.int32), np.empty(0, np.float32), step_wall_s=wall_s)
        for message in self.manager.receive(tokens):
            assert isinstance(message, Deltas)
            self._take(message)

    def _take(self, deltas: Deltas) -> None:
        for stream in deltas.streams.tolist():
            last_s, is_background, has_token = self._last[stream]
            times = self.times[is_background]
            (times.gaps_s if has_token else times.first_s).append(self.now - last_s)
            times.num_tokens += 1
            self._last[stream] = self.now, is_background, True
        for stream in deltas.ended.tolist():
            is_background = self._last.pop(stream)[1]
            self.times[is_background].num_ended += 1
            if is_background:
                self._submit(is_background=True)
