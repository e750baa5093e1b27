"""This module tells what surely happens before what, however a launch goes: the order that barriers and waits make.

Each task keeps a clock of what it knows: of every other task, barrier and queue of products, how many of its steps are
over. An arrival leaves what the task knows, a wait takes what arrivals left (vector clocks, after Mattern 1988). What
is written must be known to whoever touches it next, and what is read to whoever writes it next: else there is some
order of events in which it goes wrong, even if it went right this time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from tests.unit.kernels.gluon_simulator.schedule import get_task

Clock = dict[Any, int]
"""Steps that are over, by who took them."""
Region = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Elements of an allocation: where they begin, their shape and strides."""


class Race(Exception):
    """Memory is touched without it being sure that what touched it before is over."""


@dataclass(eq=False)
class State:
    """A task's knowledge of itself and of others: who it is in clocks, too, with a word for what it does."""

    program: tuple[int, ...]
    grid: tuple[int, ...]
    clock: Clock = field(default_factory=dict)
    products: deque[Any] = field(default_factory=deque)
    """Those that have begun and were not waited for, oldest first."""
    copies: dict[Any, tuple[int, str]] = field(default_factory=dict)
    """The copies of the whole program, by barrier: the phase in which the latest comes, and the line that began it."""
    num_products: int = 0

    def make_partition(self) -> State:
        return State(self.program, self.grid, dict(self.clock), copies=self.copies)

    def step(self, what: str) -> int:
        """The number of the task's next step of a kind, which it knows itself."""
        self.clock[self, what] = number = self.clock.get((self, what), 0) + 1
        return number


def get_state() -> State:
    state: State = get_task().state
    return state


def learn(clock: Clock, other: Clock) -> None:
    for who, number in other.items():
        if number > clock.get(who, 0):
            clock[who] = number


@dataclass(frozen=True, slots=True)
class Touch:
    """Something read or wrote a region, or has begun to."""

    region: Region
    what: str
    line: str
    is_write: bool
    who: Any
    number: int
    """The access is over from this step on of the clock of `who`."""
    fence: tuple[Any, int] | None = None
    """For a store by threads: of whose clock, and from which step on, copies and products may follow it."""

    def __str__(self) -> str:
        return f"{self.what} in {self.line}"

    def replaces(self, other: Touch) -> bool:
        """Whether what comes after this, and must come after the other, does so if it is sure to come after this."""
        is_next = self.is_write or (self.who == other.who and not other.is_write)
        return is_next and self.region == other.region


class History:
    """Who touched a piece of shared memory last."""

    def __init__(self) -> None:
        self._touches: list[Touch] = []

    def add(self, touch: Touch, is_async: bool) -> None:
        """Raises Race, if it is not sure that all is over which this may not meet."""
        met = [other for other in self._touches if overlap(touch.region, other.region)]
        if not touch.is_write and not any(other.is_write for other in met):
            raise Race(f"{touch} reads what nothing has written")
        clock = get_state().clock
        for other in met:
            if (touch.is_write or other.is_write) and clock.get(other.who, 0) < other.number:
                raise Race(f"{touch} may come before the end of {other}")
            if is_async and other.fence is not None and clock.get(other.fence[0], 0) < other.fence[1]:
                raise Race(f"{touch} comes without a fence behind {other}")
        self._touches = [other for other in self._touches if not touch.replaces(other)]
        self._touches.append(touch)


def get_region(view: torch.Tensor) -> Region:
    return view.storage_offset(), tuple(view.shape), view.stride()


@lru_cache(maxsize=65536)
def overlap(one: Region, other: Region) -> bool:
    """Whether they share an element."""
    ends = [
        begin + 1 + sum((n - 1) * by for n, by in zip(shape, strides, strict=True))
        for begin, shape, strides in (one, other)
    ]
    if ends[0] <= other[0] or ends[1] <= one[0]:
        return False
    marks = torch.zeros(max(ends), dtype=torch.bool)
    marks.as_strided(one[1], one[2], one[0]).fill_(True)
    return bool(marks.as_strided(other[1], other[2], other[0]).any())
