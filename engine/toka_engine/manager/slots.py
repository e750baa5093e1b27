"""The state of running streams, as numpy arrays by slot. No policy: who runs is decided elsewhere.

A slot's `generation` changes when its stream ends, is cancelled or preempted; rows of steps still on their
way carry the generation that they were planned for, so that their tokens can be told from the next owner's. A
slot is given back only when every step that names it has come back (see `lifecycle`).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from toka_engine.manager.arrays import resident_zeros
from toka_engine.manager.requests import Stream
from toka_engine.messages import Int32s

STOP_WIDTH = 8
"""Stop tokens per slot that are compared in vectorised passes; streams with more pay for a look-up of their
own."""
NO_STOP = -2
"""Fills unused places of `stop_ids`; -1 is the workers' mark of a failed row."""

_PADDING = 17


class State:
    """Plain integers, because they are compared with arrays in every step."""

    FREE: Final = 0
    PREFILL: Final = 1
    """Leads a prefill."""
    RESERVED: Final = 2
    """Waits for a leader's prompt, to be sampled from its last row."""
    DECODE: Final = 3
    FULL: Final = 4
    """Every token up to its limit is planned; the last ones are in flight."""
    RETIRING: Final = 5
    """Ended; steps in flight may still write its pages."""


class Slots:
    """Arrays [num_slots] unless stated. "Planned" counts include steps whose tokens are not back yet."""

    def __init__(self, num_slots: int, max_pages_per_seq: int) -> None:
        # Pages by column. Rows a power of two apart would compete for the same few cache lines.
        self.table = resident_zeros((num_slots, max_pages_per_seq + _PADDING), np.int32)[:, :max_pages_per_seq]
        self.num_pages = np.zeros(num_slots, np.int32)  # columns in use
        self.lengths = np.zeros(num_slots, np.int32)  # tokens whose KV is written, planned
        self.prompt_lengths = np.zeros(num_slots, np.int32)  # of the request, without kept output
        self.num_planned = np.zeros(num_slots, np.int32)  # output tokens, planned
        self.num_received = np.zeros(num_slots, np.int32)  # output tokens that came back
        self.limits = np.zeros(num_slots, np.int32)  # max_tokens
        self.states = np.zeros(num_slots, np.uint8)  # State
        self.generations = np.zeros(num_slots, np.int64)
        self.last_steps = np.zeros(num_slots, np.int64)  # last step that names the slot
        self.orders = np.zeros(num_slots, np.int64)  # arrival; higher is newer
        self.stream_ids = np.zeros(num_slots, np.int64)
        self.delivers_each = np.zeros(num_slots, np.bool_)
        self.is_streamed = np.zeros(num_slots, np.bool_)
        self.delivers_stop = np.zeros(num_slots, np.bool_)
        self.num_logprobs = np.zeros(num_slots, np.int32)
        self.stop_ids = np.full((STOP_WIDTH, num_slots), NO_STOP, np.int32)  # by place: one contiguous pass for each
        self.num_stop_places = 0  # the most that any stream so far has used of them
        self.has_more_stops = np.zeros(num_slots, np.bool_)
        self.last_tokens = np.zeros(num_slots, np.int32)  # newest received: its page may not exist yet
        self.last_logprobs = np.zeros(num_slots, np.float32)
        self.keeps_output = np.zeros(num_slots, np.bool_)  # its output pages enter the prefix tree at the end
        self.num_in_tree = np.zeros(num_slots, np.int32)  # leading columns known to be in the prefix tree
        self.has_grammar = np.zeros(num_slots, np.bool_)
        self.num_shared = np.zeros(num_slots, np.int32)  # leading columns with several holders when last counted
        self.streams: list[Stream | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._num_running = 0
        self._retiring: list[tuple[int, int]] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_running(self) -> int:
        """Slots that a stream owns."""
        return self._num_running

    @property
    def has_retiring(self) -> bool:
        """Some slots without a stream wait for steps in flight that name them."""
        return bool(self._retiring)

    @property
    def retiring(self) -> tuple[tuple[int, int], ...]:
        """(last step, slot) of those."""
        return tuple(self._retiring)

    def take(self) -> int:
        """Return a free slot, which a stream owns from now on."""
        self._num_running += 1
        return self._free.pop()

    def retire(self, ended: Int32s, completed_step: int) -> Int32s:
        """Take `ended` from their streams; return those that no step after `completed_step` names."""
        self.generations[ended] += 1
        self.states[ended] = State.RETIRING
        self._num_running -= ended.size
        last_steps = self.last_steps[ended]
        is_done = last_steps <= completed_step
        self._retiring += zip(last_steps[~is_done].tolist(), ended[~is_done].tolist(), strict=True)
        return ended[is_done]

    def take_retired(self, completed_step: int) -> Int32s:
        """Return the slots whose last step is back by now; they wait no longer."""
        if not self._retiring:
            return _NO_SLOTS
        ready = [slot for step, slot in self._retiring if step <= completed_step]
        self._retiring = [entry for entry in self._retiring if entry[0] > completed_step]
        return np.asarray(ready, np.int32)

    def give_back(self, released: Int32s) -> None:
        """Free slots that no step in flight names."""
        self.states[released] = State.FREE
        for slot in released.tolist():
            self.streams[slot] = None
            self._free.append(slot)


_NO_SLOTS: Int32s = np.empty(0, np.int32)
