"""Rows that follow a grammar, in steps that run ahead: when matchers see tokens, and where their masks are filled.

A mask depends on the token of the step before. The forward of its own step is in the stream by then; while it runs, the
host waits for that token, shows it to the matcher and fills the mask. Only the launch of the sampler is held back, and
only in steps with such rows. Masks are filled in pinned memory by the grammar library's threads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.in_flight import RING_SIZE
from toka_engine.model.sample_plan import SamplePlan
from toka_engine.model.slot_grammars import SlotGrammars


class MaskStaging:
    """A ring of pinned masks [max_masks, num_words]: none is written while a copy of it may be queued."""

    def __init__(self, max_masks: int, num_words: int, stream: torch.cuda.Stream) -> None:
        """`stream`: the one in which the copies are enqueued."""
        shape = (max_masks, num_words)
        self._pinned = [torch.zeros(shape, dtype=torch.int32, pin_memory=True).numpy() for _ in range(RING_SIZE)]
        self._events = [torch.cuda.Event() for _ in range(RING_SIZE)]
        self._stream = stream
        self._turn = 0

    def begin(self, count: int) -> NDArray[np.int32]:
        """Return host memory [count, num_words] to be filled and copied before `end`."""
        self._turn = (self._turn + 1) % RING_SIZE
        self._events[self._turn].synchronize()
        words: NDArray[np.int32] = self._pinned[self._turn][:count]
        return words

    def end(self) -> None:
        """Note that every copy of what `begin` returned is enqueued."""
        self._events[self._turn].record(self._stream)


class GrammarRows:
    """Brings the matchers of `grammars` and the steps in flight together."""

    def __init__(self, grammars: SlotGrammars, staging: MaskStaging) -> None:
        self._grammars, self._staging = grammars, staging
        self._unseen: deque[tuple[int, SamplePlan, torch.cuda.Event, torch.Tensor]] = deque()
        """Steps whose tokens the matchers have not seen: number, plan, when they are on the host, and where."""

    def fill_masks(self, plan: SamplePlan) -> SamplePlan:
        """Return the plan, whose step is the next one to be sampled, with masks; waits for the steps before."""
        count = plan.grammatical.size
        if not count:
            return plan
        while self._unseen:
            self._see_next()
        masks = self._staging.begin(count)
        self._grammars.fill(plan.slots[plan.grammatical], masks)
        return replace(plan, masks=masks)

    def note_sampled(self, number: int, plan: SamplePlan, done: torch.cuda.Event, ids: torch.Tensor) -> None:
        """Note that step `number` is launched, and that its ids [R] are in pinned memory once `done` has come."""
        if plan.grammatical.size:
            self._staging.end()
            self._unseen.append((number, plan, done, ids))

    def finish(self, number: int, plan: SamplePlan, ids: NDArray[np.int32]) -> None:
        """Mark in the ids [R] of step `number`, which are on the host, where a matcher has failed."""
        if self._unseen and self._unseen[0][0] == number:
            self._see_next()
        if plan.grammatical.size:
            rows = plan.grammatical
            ids[rows] = self._grammars.mark_failed(plan.slots[rows], ids[rows])

    def _see_next(self) -> None:
        _, plan, done, ids = self._unseen.popleft()
        done.synchronize()
        rows = plan.grammatical
        self._grammars.consume(plan.slots[rows], ids.numpy()[rows])
