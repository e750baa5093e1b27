"""The manager's state in one object, and what every part needs of it: taking pages, building the next step.

No policy and no I/O. `scheduler`, `admission`, `receiving` and `lifecycle` are functions and small classes
over it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toka_engine.config import EngineConfig
from toka_engine.manager.deadlines import StartRate
from toka_engine.manager.durations import StreamTimes
from toka_engine.manager.grammars import Grammars
from toka_engine.manager.lanes import Lanes
from toka_engine.manager.pages import Pages
from toka_engine.manager.prefix_tree import Key
from toka_engine.manager.prompt_turns import PromptTurns
from toka_engine.manager.queue import Queue
from toka_engine.manager.requests import PendingCopy, Prefill, Request, Waiting
from toka_engine.manager.row_groups import DecodeRows
from toka_engine.manager.sizes import Sizes
from toka_engine.manager.slots import Slots
from toka_engine.manager.step_time import OnlineSteps, StepSize, StepTimes
from toka_engine.manager.stopping import StopPredictor
from toka_engine.messages import Floats, Int32s, Int64s


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A chunk of a prompt whose logprobs a step computes: of tokens [start, start + count)."""

    request: Request
    chunk: int
    """Index into the step's chunks."""
    start: int
    count: int
    next_token: int
    """The prompt's token after the chunk; -1: there is none."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step sent, whose tokens are not back. Rows in the order in which they are sampled."""

    number: int
    slots: Int32s
    num_decoded: int
    """The first so many of them had tokens before."""
    generations: Int64s
    scored: list[ScoredChunk]
    size: StepSize | None
    """None: how long it takes is not noted."""


@dataclass(slots=True)
class Counters:
    """Totals for `Stats`; they only grow."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    hydragen_rows: int = 0
    step_wall_s: float = 0.0
    model_cpu_s: float = 0.0


class ManagerState:
    """Live state. One per process."""

    def __init__(self, config: EngineConfig, sizes: Sizes, clock: Callable[[], float]) -> None:
        self.config = config
        self.sizes = sizes
        self.clock = clock
        self.queue = Queue(clock)
        self.start_rate = StartRate()
        self.times = StreamTimes(sizes.num_slots)
        self.pages = Pages(config, sizes)
        self.slots = Slots(sizes.num_slots, sizes.max_pages_per_seq)
        self.lanes = (
            Lanes(config, sizes.page_size, sizes.num_lanes, sizes.num_few_rows) if sizes.num_lanes > 1 else None
        )
        self.rows = self.lanes.every[0] if self.lanes else DecodeRows(config, sizes.page_size)  # of the next step
        self.predictor = StopPredictor(config.track_early_stopping)
        self.prefills: list[Prefill] = []  # in order of admission
        self.pending_pages: dict[Key, Prefill] = {}  # next page that a prefill will put into the prefix tree
        self.copies: list[PendingCopy] = []
        self.where: dict[int, int | Waiting] = {}  # stream -> its slot or its queue entry
        self.in_flight: deque[InFlight] = deque()
        self.next_step = 1
        self.completed_step = 0
        self.next_admission = 0  # step before which nothing is admitted beside running streams
        self.misfit: Waiting | None = None  # the entry for which there was no room in the last step
        self.has_background = False  # a background request has ever come
        self.has_deadlines = False  # a request with a deadline has ever come
        self.has_target = False  # a streamed request has ever come, and there is a target for the gaps of such
        self.promoted: Request | None = None  # the background request that goes first, because it has waited long
        self.step_times = StepTimes()
        self.online_steps = OnlineSteps()
        self.prompt_turns = PromptTurns()
        self.refused_s = float("-inf")  # when an online request was refused last
        self.last_tokens_s = float("-inf")  # when a step came back last
        self.started: list[tuple[int, int]] = []  # (a stream, cached tokens) of prompts admitted, for `Started`
        self.counters = Counters()
        self.grammars = Grammars()

    def leave(self, stream: int, request: Request) -> None:
        """Note that `stream` of `request` is no longer wanted or has ended."""
        self.where.pop(stream, None)
        if request.grammar is not None:
            self.grammars.release(request.grammar)

    @property
    def is_short(self) -> bool:
        """Some decode rows wait for pages: nothing is admitted meanwhile."""
        return self.rows.is_short if self.lanes is None else self.lanes.is_short

    def mark_rows_stale(self) -> None:
        """Note that some streams have left their slots."""
        self.rows.is_stale = True
        if self.lanes is not None:
            self.lanes.mark_stale()

    def enqueue(self, entry: Waiting, *, at_front: bool) -> None:
        """Let the choices of `entry` wait."""
        self.queue.add(entry, at_front=at_front)
        self.has_background = self.has_background or entry.request.is_background
        for choice in entry.choices:
            self.where[entry.request.first_stream + choice] = entry


class StepBuilder:
    """Collects the parts of step `number`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.after = 0
        self.new_slots: list[int] = []
        self.new_lengths: list[int] = []
        self.appends: list[tuple[Int32s, Int32s, Int32s]] = []  # slots, columns, pages
        self.copy_from: list[Int32s] = []
        self.copy_to: list[Int32s] = []
        self.chunk_slots: list[int] = []
        self.chunk_starts: list[int] = []
        self.chunk_tokens: list[Int32s] = []
        self.fanout_slots: list[Int32s] = []
        self.fanout_chunks: list[Int32s] = []
        self.scored: list[ScoredChunk] = []
        self.grammar_outputs: list[Int32s] = []


EMPTY32: Int32s = np.empty(0, np.int32)
EMPTYF: Floats = np.empty(0, np.float32)
