"""The decode rows of a step in order, and the groups of them that share a prefix (Hydragen).

Rows keep their place from step to step; groups are recomputed only when members came, or so many left that a group is no
longer worth it. Pure.

Source: Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toka_engine.config import EngineConfig
from toka_engine.manager.slots import Slots, State
from toka_engine.messages import Int32s

_NONE: Int32s = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Groups:
    """As the group_* fields of messages.Step."""

    first_rows: Int32s
    num_rows: Int32s
    first_columns: Int32s
    num_columns: Int32s

    def keep(self, is_kept: NDArray[np.bool_]) -> Groups:
        """Return the groups over the rows that remain when only `is_kept` rows stay."""
        if self.first_rows.size == 0:
            return self
        before = np.concatenate((np.zeros(1, np.int32), np.cumsum(is_kept, dtype=np.int32)))
        first_rows = before[self.first_rows]
        num_rows = before[self.first_rows + self.num_rows] - first_rows
        return Groups(first_rows, num_rows, self.first_columns, self.num_columns)


NO_GROUPS = Groups(_NONE, _NONE, _NONE, _NONE)


class DecodeRows:
    """Owns the order of decode rows."""

    def __init__(self, config: EngineConfig, page_size: int) -> None:
        self._config = config
        self._page_size = page_size
        self.slots: Int32s = _NONE
        self.groups = NO_GROUPS
        self.is_stale = False
        """Some rows' streams have ended."""

    def refresh(self, slots: Slots, refs: Int32s) -> None:
        """Drop the rows that no longer decode."""
        if self.is_stale:
            self.keep(slots.states[self.slots] == State.DECODE)
            self.is_stale = False

    def add(self, slots: Int32s) -> None:
        self.slots = np.concatenate((self.slots, slots))

    def keep(self, is_kept: NDArray[np.bool_]) -> None:
        self.slots = self.slots[is_kept]
        self.groups = self.groups.keep(is_kept)
