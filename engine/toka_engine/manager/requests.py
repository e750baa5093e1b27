"""Python objects of requests: made at submission, admission and preemption, never touched by a decode step.

Also the seed of each choice. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toka_engine.manager.grammars import KnownGrammar
from toka_engine.manager.top_logprobs import Tops
from toka_engine.messages import Floats, Int32s, LogitEdits
from toka_engine.slot_parameters import Sampling

CHOICE_BITS = 20
PRIORITY_SHIFT = 55
"""A stream's order is its request's priority shifted by this, plus the arrival number shifted by `CHOICE_BITS`, plus
its choice. That leaves 35 bits for arrivals, which is 34 billion requests."""
FIRST_BACKGROUND_ORDER = 1 << PRIORITY_SHIFT
"""The orders of background streams begin here."""

_MASK = (1 << 64) - 1


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of choice `choice` of a request with `seed`: in [0, 2**63), or -1 for none.

    The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)
    over the choice-th point of the sequence that starts at `seed`.
    """
    if seed < 0:
        return -1
    mixed = (seed + (choice + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) >> 1


@dataclass(slots=True, eq=False)
class Scoring:
    """The progress of a prompt's logprobs. Pages beyond are not taken from the prefix tree: they hold keys and
    values, no logprobs.
    """

    num_tops: int
    num_planned: int = 0
    """The prompt's tokens whose rows are in a step already."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One `Submit`, with the number of its arrival."""

    first_stream: int
    num_choices: int
    first_choice: int
    prompt_length: int
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    deliver_each: bool
    arrival: int
    is_streamed: bool = False
    edits: LogitEdits | None = None
    delivers_stop: bool = False
    scoring: Scoring | None = None
    grammar: KnownGrammar | None = None
    priority: int = 0
    submitted_s: float = 0.0
    """The time of its arrival, by the manager's clock."""

    @property
    def is_background(self) -> bool:
        """Others come first, also where it runs already."""
        return self.priority > 0

    @property
    def order(self) -> int:
        """The first choice's place among all streams: by priority, then by arrival."""
        return (self.priority << PRIORITY_SHIFT) + (self.arrival << CHOICE_BITS)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Logprobs of the output tokens that a stream had before it was preempted."""

    logprobs: Floats
    tops: Tops | None = None
    """None: it did not ask for any, or has them delivered token by token."""


@dataclass(slots=True, eq=False)
class Waiting:
    """Choices of one request that wait to be admitted; they share `tokens` to prefill."""

    request: Request
    choices: dict[int, None]
    """An ordered set."""
    tokens: Int32s
    """The prompt, and after preemption the output so far."""
    kept: Kept | None = None
    num_skipped: int = 0
    """Times that later ones were admitted before this one."""
    prefill: Prefill | None = None
    """Prefills these tokens for other choices of this entry: the rest waits for it."""

    @property
    def num_kept(self) -> int:
        return int(self.tokens.size) - self.request.prompt_length


@dataclass(slots=True, eq=False)
class Stream:
    """The stream that owns a slot."""

    request: Request
    choice: int
    kept: Kept | None = None
    num_kept: int = 0
    prefill: Prefill | None = None
    """The prefill that this stream waits for."""

    @property
    def id(self) -> int:
        return self.request.first_stream + self.choice

    @property
    def seed(self) -> int:
        return choice_seed(self.request.sampling.seed, self.request.first_choice + self.choice)


@dataclass(slots=True, eq=False)
class Prefill:
    """A prefill under way: `slot` leads, `siblings` are sampled from its last row. tokens[:position] are
    planned."""

    request: Request
    slot: int
    tokens: Int32s
    position: int
    siblings: list[int]
    rest: Waiting | None
    """Choices of the same entry that still wait."""
    pending_key: tuple[int, bytes] | None = None
    """Key of the next full page that this prefill will put into the prefix tree."""
    is_leader_wanted: bool = True
    """False: the leader's stream was cancelled, and the slot goes on only for its siblings."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingCopy:
    """The part-filled last page of a prompt, to be copied to siblings in the next step."""

    source: int
    """Held by one reference of its own."""
    targets: Int32s
    slots: Int32s
    generations: np.ndarray[tuple[int], np.dtype[np.int64]]
