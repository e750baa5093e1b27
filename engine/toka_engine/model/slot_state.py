"""A slot's parameters on the host: one array by slot for each column of the table in `slot_parameters`.

A step's layout, and which rows ask for special sampling, are known from it without asking the device. On a CPU there is
no other state: the sampler reads the same memory as tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Step
from toka_engine.model.barred_words import BarredWords
from toka_engine.model.logit_edits import TokenEdits
from toka_engine.slot_parameters import FILTER, PENALTY, SLOT_COLUMNS


class HostSlots:
    """Arrays [max_seqs] by column name."""

    def __init__(self, max_seqs: int) -> None:
        self.max_seqs = max_seqs
        self._columns = {each.name: np.full(max_seqs, each.default, each.dtype) for each in SLOT_COLUMNS}
        self._tensors = {name: torch.from_numpy(array) for name, array in self._columns.items()}
        self.is_filtered: NDArray[np.bool_] = np.zeros(max_seqs, np.bool_)
        self.has_penalties: NDArray[np.bool_] = np.zeros(max_seqs, np.bool_)
        self.edits: dict[int, TokenEdits] = {}
        """By slot, of those that have been set up with edits."""
        self.edited_until: NDArray[np.int32] = np.zeros(max_seqs, np.int32)
        """Logits of a slot are edited while it has sampled fewer tokens; 0: never."""
        self.words = BarredWords(max_seqs)
        self.last_tokens = torch.zeros(max_seqs, dtype=torch.int32)
        """The last sampled token, 0 where a row's logits were not finite. On a GPU `DeviceSlots` has it."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The column `name` [max_seqs]."""
        return self._columns[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Return the column `name` [max_seqs]; the same memory."""
        return self._tensors[name]

    def set_up(self, step: Step) -> None:
        """Take over the new slots of `step`."""
        new = step.new
        if not len(new):
            return
        slots = new.slots
        for column in SLOT_COLUMNS:
            self._columns[column.name][slots] = new.columns.get(column.name, column.default)
        self.is_filtered[slots] = new.asks_for(FILTER) & (self["temperature"][slots] > 0.0)
        self.has_penalties[slots] = new.asks_for(PENALTY)
        if self.edits or step.edits:
            self._set_up_edits(step)
        if self.words or step.edits:
            self.words.set_up(step)

    def _set_up_edits(self, step: Step) -> None:
        self.edited_until[step.new.slots] = 0
        for slot in step.new.slots.tolist():
            self.edits.pop(slot, None)
        for each in step.edits:
            edits = TokenEdits(each.edits)
            self.edited_until[each.slots] = edits.until
            self.edits.update(dict.fromkeys(each.slots.tolist(), edits))

    def advance(self, step: Step) -> None:
        """Count what the forward of `step` wrote and what it sampled. The sampler writes the last tokens."""
        lengths, num_sampled = self["length"], self["num_sampled"]
        lengths[step.decode_slots] += 1
        num_sampled[step.decode_slots] += 1
        if step.prefill_slots.size:
            lengths[step.prefill_slots] += step.prefill_lengths
            lengths[step.fanout_slots] = lengths[step.prefill_slots[step.fanout_chunks]]
            num_sampled[step.fanout_slots] += 1
