"""CUDA graphs of decode steps with shared prefixes: the forward, one per padded batch size.

Steps without groups are whole_steps'. What changes from step to step (ids, slots, positions, where the rows' own tokens
begin, the groups' page lists, flashinfer's schedule) is written to fixed addresses before each replay; the head and the
sampler follow outside, so that the graphs share no large outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from toka_engine.model.attention.base import StepLayout
from toka_engine.model.attention.flashinfer import FlashInferAttention
from toka_engine.model.causal import CausalModel
from toka_engine.model.kernels.slots import SlotState, gather_ids

_SMALL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_STEPS = ((512, 32), (2048, 128), (1 << 30, 256))
"""(up to this size, distance)."""
_MIN_ROWS = 32
"""Fewer share too little."""


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: close together where a row of padding costs most; the last is max_rows."""
    sizes = list(_SMALL_SIZES)
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + next(step for limit, step in _STEPS if sizes[-1] < limit))
    return [size for size in sizes if size < max_rows] + [max_rows]


class GroupGraphs:
    """Captures with `capture`, then runs decode steps with groups, of up to `max_rows` rows."""

    def __init__(self, model: CausalModel, attention: FlashInferAttention, state: SlotState, max_rows: int) -> None:
        self.max_rows = max_rows
        self._model, self._attention, self._state = model, attention, state
        self._ids = torch.zeros(max_rows, dtype=torch.int32, device=state.last_token.device)
        self._sizes = np.array([size for size in graph_sizes(max_rows) if size >= _MIN_ROWS], np.int64)
        if not attention.has_graph_groups:
            self._sizes = self._sizes[:0]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        pool = self._begin()
        for size in reversed(self._sizes.tolist()):
            self._capture(size, pool)

    def measure(self) -> int:
        """Bytes of the device that `capture` will take, from two captures. Not to be run afterwards."""
        pool = self._begin()
        return measure_captures(self._sizes.tolist(), lambda size: self._capture(size, pool))

    def _begin(self) -> Any:
        self._attention.reserve_graphs(self.max_rows)
        return torch.cuda.graph_pool_handle()

    def launch(self, size: int) -> None:
        """Launch what a graph holds and what goes before each replay, one by one. Takes `reserve_graphs` before."""
        # Two rows over the first page of slot 0. All of it is overwritten before any replay.
        zero, one, none = np.zeros(1, np.int32), np.ones(1, np.int32), np.empty(0, np.int32)
        positions = np.full(2, self._attention.page_size, np.int32)
        layout = StepLayout(np.zeros(2, np.int32), positions, none, none, none, zero, one * 2, zero, one)
        padded_slots = self._attention.plan_graph(layout, size)
        assert padded_slots is not None
        gather_ids(self._state, padded_slots, self._ids, size, self._ids[:size])
        self._forward(size)

    def _capture(self, size: int, pool: Any) -> None:
        self.launch(size)  # compiles and allocates what a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            hidden = self._forward(size)
        self._graphs[size] = graph, hidden

    def _forward(self, size: int) -> torch.Tensor:
        ids = self._ids[:size]
        self._attention.write_tokens(ids)
        return self._model.forward(ids, self._attention)

    def run(self, layout: StepLayout) -> torch.Tensor | None:
        """Hidden states [d, hidden_size] of the decode rows; valid until the next run of this size.

        None, with nothing run, if there is no graph for such a step.
        """
        count = layout.decode_slots.size
        index = int(np.searchsorted(self._sizes, count))
        if index == self._sizes.size:
            return None
        size = int(self._sizes[index])
        padded_slots = self._attention.plan_graph(layout, size)
        if padded_slots is None:
            return None
        gather_ids(self._state, padded_slots, self._ids, size, self._ids[:size])
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden[:count]


def measure_captures(sizes: Sequence[int], capture: Callable[[int], None]) -> int:
    """Bytes of the device that capturing all ascending `sizes` in one pool will take, from the two largest.

    These share little with each other; all others fit into their memory.
    """
    free = [_read_free_bytes()]
    for size in sizes[:-3:-1]:
        capture(size)
        free.append(_read_free_bytes())
    if len(free) < 3:
        return free[0] - free[-1]
    return free[0] - free[1] + (free[1] - free[2]) * (len(sizes) - 1)


def _read_free_bytes() -> int:
    """Of the device, when torch has given back what it only keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
