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
    """Every token up to its limit is planned; the last ones are on their way."""
    RETIRING: Final = 5
    """Ended; steps on their way may still write its pages."""


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
        self.num_logprobs = np.zeros(num_slots, np.int32)
        self.stop_ids = np.full((STOP_WIDTH, num_slots), NO_STOP, np.int32)  # by place: one contiguous pass for each
        self.num_stop_places = 0  # the most that any stream so far has used of them
        self.has_more_stops = np.zeros(num_slots, np.bool_)
        self.last_tokens = np.zeros(num_slots, np.int32)  # newest received: its page may not exist yet
        self.last_logprobs = np.zeros(num_slots, np.float32)
        self.keeps_output = np.zeros(num_slots, np.bool_)  # its output pages enter the prefix tree at the end
        self.num_in_tree = np.zeros(num_slots, np.int32)  # leading columns known to be in the prefix tree
        self.num_shared = np.zeros(num_slots, np.int32)  # leading columns with several holders when last counted
        self.streams: list[Stream | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def give_back(self, released: Int32s) -> None:
        self.states[released] = State.FREE
        for slot in released.tolist():
            self.streams[slot] = None
            self._free.append(slot)
