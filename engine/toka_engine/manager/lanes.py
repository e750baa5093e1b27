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

    @property
    def num_rows(self) -> int:
        """Rows of all lanes."""
        return sum(lane.slots.size for lane in self.every)

    def list_rows(self) -> Int32s:
        """Return the rows of all lanes."""
        return np.concatenate([lane.slots for lane in self.every])

    def mark_stale(self) -> None:
        """Note that some streams have left their slots, whichever lanes these are in."""
        for lane in self.every:
            lane.is_stale = True

    def drop_ended(self, slots: Slots) -> None:
        """Drop the rows of streams that have left, before a slot of theirs can be another stream's in another lane."""
        for lane in self.every:
            lane.drop_ended(slots)
            lane.is_short = lane.is_short and lane.slots.size > 0

    def gather(self, slots: Slots, refs: Int32s) -> None:
        """Put the rows of the lane whose turn it is into others, if they have become so few that fewer lanes do."""
        lane = self.every[self._next]
        if self._next >= self._num_stages and lane.slots.size and self.num_rows <= self._num_few * 3 // 4:
            self.add(lane.take_all(), slots, refs)

    @property
    def num_used(self) -> int:
        """Lanes that have turns while there are prompts: as many as stages while rows are few, else all."""
        return self._num_stages if self.num_rows < self._num_few else len(self.every)

    def in_turn(self, *, has_prompts: bool = False) -> list[DecodeRows]:
        """Return the lanes that have rows, the one whose turn it is first; an empty one if none has any.

        With `has_prompts` empty ones have turns, too: their chunks keep the stages busy while tokens of rows are on
        their way from the last stage to the first.
        """
        order = self.every[self._next :] + self.every[: self._next]
        used = self.every[: self.num_used] if has_prompts else []
        return [lane for lane in order if lane.slots.size or lane in used] or order[:1]

    def end_turn(self, lane: DecodeRows) -> None:
        """Note that a step of `lane` is planned."""
        self._next = (self.every.index(lane) + 1) % len(self.every)

    def add(self, choices: Int32s, slots: Slots, refs: Int32s, lane: DecodeRows | None = None) -> None:
        """Take in rows of one prompt: into `lane`, or the one with the fewest rows, or into several if there are many.

        `lane` is that of the step that ends their prompt: until it has its next turn their first tokens have come from
        the last stage. In another lane, whose turn is sooner, they would keep the first stage waiting.
        """
        sizes = [lane.slots.size for lane in self.every]
        if sum(sizes) + choices.size <= self._num_few:
            sizes = sizes[: self._num_stages]
        by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
        level = -(-(sum(sizes) + choices.size) // len(sizes))
        preferred = [index for index in by_size if self.every[index] is lane]
        for index in (*preferred, by_size[0]):
            if sizes[index] + choices.size <= level * (1 + 1 / UNEVEN_SHARE):
                self.every[index].add(choices, slots, refs)
                return
        for index in by_size:
            part, choices = np.split(choices, [max(0, level - sizes[index])])
            if part.size:
                self.every[index].add(part, slots, refs)
