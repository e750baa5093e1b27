"""Lanes of decode rows: each lane is a set of rows that run in one step together, and lanes take turns.

A row's next step needs the token of its last one, so the stages of a pipeline can only work at once on steps of
different rows. With one lane, as without pipeline stages, every step has all rows, and nothing here is used. A row
stays in its lane until its stream ends or is preempted; steps of different lanes may be in flight together. Pure.
"""

from __future__ import annotations

import numpy as np

from toka_engine.config import EngineConfig
from toka_engine.manager.row_groups import DecodeRows
from toka_engine.manager.slots import Slots
from toka_engine.messages import Int32s

UNEVEN_SHARE = 8
"""Choices of one prompt stay in one lane, where they are a Hydragen group, unless it would then have one part in this
many more rows than the lanes have on average."""


class Lanes:
    """Two lanes or more."""

    def __init__(self, config: EngineConfig, page_size: int, num_lanes: int, num_few: int = 0) -> None:
        """`num_few`: with up to so many rows, in all, no more lanes than stages are used."""
        self.every = [DecodeRows(config, page_size) for _ in range(num_lanes)]
        self._num_stages, self._num_few = min(config.pp_size, num_lanes), num_few
        self._next = 0

    @property
    def is_short(self) -> bool:
        """Some rows of some lane have waited for a page since it was last planned."""
        return any(lane.is_short for lane in self.every)

    @property
    def num_busy(self) -> int:
        """Lanes that have rows."""
        return sum(lane.slots.size > 0 for lane in self.every)

    def mark_stale(self) -> None:
        """Note that some streams have left their slots, whichever lanes these are in."""
        for lane in self.every:
            lane.is_stale = True

    def drop_ended(self, slots: Slots) -> None:
        """Drop the rows of streams that have left, before a slot of theirs can be another stream's in another lane."""
        for lane in self.every:
            lane.drop_ended(slots)
            lane.is_short = lane.is_short and lane.slots.size > 0

    def in_turn(self) -> list[DecodeRows]:
        """Return the lanes that have rows, the one whose turn it is first; an empty one if none has any."""
        order = self.every[self._next :] + self.every[: self._next]
        return [lane for lane in order if lane.slots.size] or order[:1]

    def end_turn(self, lane: DecodeRows) -> None:
        """Note that a step of `lane` is planned."""
        self._next = (self.every.index(lane) + 1) % len(self.every)

    def add(self, choices: Int32s, slots: Slots, refs: Int32s) -> None:
        """Take in rows of one prompt: into the lane with the fewest rows, or into several if there are many."""
        sizes = np.asarray([lane.slots.size for lane in self.every])
        if sizes.sum() + choices.size <= self._num_few:
            sizes = sizes[: self._num_stages]
        by_size = np.argsort(sizes, kind="stable")
        mean = (int(sizes.sum()) + choices.size) / sizes.size
        if choices.size == 1 or sizes[by_size[0]] + choices.size <= mean * (1 + 1 / UNEVEN_SHARE):
            self.every[by_size[0]].add(choices, slots, refs)
            return
        level = int(np.ceil(mean))
        for index in by_size.tolist():
            part, choices = np.split(choices, [max(0, level - int(sizes[index]))])
            if part.size:
                self.every[index].add(part, slots, refs)
