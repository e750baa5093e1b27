"""CUDA graphs of the decode forward, one per padded batch size: below some hundred rows launches cost more than work.

A graph holds the layers alone. What changes from step to step (ids, slots, positions, page lists, flashinfer's
schedule) is written to fixed addresses before each replay; the head and the sampler follow outside, so that the graphs
share no large outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.attention.flashinfer import FlashInferAttention
from toka_engine.model.causal import CausalModel
from toka_engine.model.kernels.slots import SlotState, gather_ids

_SMALL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_LARGE_STEP = 32


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: close together where a row of padding costs most; the last is max_rows."""
    sizes = [*_SMALL_SIZES, *range(_SMALL_SIZES[-1] + _LARGE_STEP, max_rows, _LARGE_STEP)]
    return [size for size in sizes if size < max_rows] + [max_rows]


class DecodeGraphs:
    """Captures with `capture`, then runs decode steps of up to `max_rows` rows."""

    def __init__(self, model: CausalModel, attention: FlashInferAttention, state: SlotState, max_rows: int) -> None:
        self.max_rows = max_rows
        self._model, self._attention, self._state = model, attention, state
        self._ids = torch.zeros(max_rows, dtype=torch.int32, device=state.last_token.device)
        self._sizes = np.array(graph_sizes(max_rows))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        self._attention.reserve_graphs(self.max_rows)
        pool = torch.cuda.graph_pool_handle()
        nobody = np.empty(0, np.int32)
        for size in reversed(self._sizes.tolist()):
            self._attention.plan_graph(nobody, nobody, size)
            self._model.forward(self._ids[:size], self._attention)  # compiles and allocates what a capture may not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden = self._model.forward(self._ids[:size], self._attention)
            self._graphs[size] = graph, hidden

    def run(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> torch.Tensor:
        """Hidden states [d, hidden_size] of the decode rows; valid until the next run of this size."""
        count = slots.size
        size = int(self._sizes[np.searchsorted(self._sizes, count)])
        padded_slots = self._attention.plan_graph(slots, positions, size)
        gather_ids(self._state, padded_slots, self._ids, size, self._ids[:size])
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden[:count]
