"""CUDA graphs of the decode forward, one per padded batch size: below some hundred rows launches cost more than work.

A graph holds the layers, and the note of the rows' tokens in the pages. What changes from step to step (ids, slots,
positions, page lists, flashinfer's schedule) is written to fixed addresses before each replay; the head and the sampler
follow outside, so that the graphs share no large outputs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from toka_engine.model.attention.base import StepLayout
from toka_engine.model.attention.flashinfer import FlashInferAttention
from toka_engine.model.causal import CausalModel
from toka_engine.model.kernels.slots import SlotState, gather_ids

_SMALL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_STEPS = ((512, 32), (2048, 128), (1 << 30, 256))
"""(up to this size, distance)."""
_MIN_ROWS_WITH_GROUPS = 32
_MEASURED_GRAPHS = 4
_ONE_GROUP = {"group_first_rows": 0, "group_num_rows": 2, "group_first_columns": 0, "group_num_columns": 1}


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: close together where a row of padding costs most; the last is max_rows."""
    sizes = list(_SMALL_SIZES)
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + next(step for limit, step in _STEPS if sizes[-1] < limit))
    return [size for size in sizes if size < max_rows] + [max_rows]


def _rows_of(count: int) -> StepLayout:
    """`count` decode rows of slot 0 at position 0, for a capture: all of them are overwritten before any replay."""
    zeros, none = np.zeros(count, np.int32), np.empty(0, np.int32)
    return StepLayout(zeros, zeros, none, none, none, none, none, none, none)


class DecodeGraphs:
    """Captures with `capture`, then runs decode steps of up to `max_rows` rows."""

    def __init__(
        self,
        model: CausalModel,
        attention: FlashInferAttention,
        state: SlotState,
        max_rows: int,
        max_rows_elsewhere: int = 0,
    ) -> None:
        """Steps of up to `max_rows_elsewhere` rows come here only if they have groups."""
        self.max_rows, self._max_rows_elsewhere = max_rows, max_rows_elsewhere
        self._model, self._attention, self._state = model, attention, state
        self._ids = torch.zeros(max_rows, dtype=torch.int32, device=state.last_token.device)
        self._sizes = np.array(graph_sizes(max_rows))
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        self._begin()
        for size, with_groups in self._kinds():
            self._capture(size, with_groups)

    def measure(self) -> int:
        """Bytes of the device that `capture` will take, from the first few captures. Not to be run afterwards."""
        kinds = self._kinds()
        free = [read_free_bytes()]
        self._begin()
        for index, (size, with_groups) in enumerate(kinds[:_MEASURED_GRAPHS]):
            self._capture(size, with_groups)
            if index % 2:  # the two largest share little, all others fit into their memory
                free.append(read_free_bytes())
        if len(free) < 3:
            return free[0] - read_free_bytes()
        per_graph = (free[1] - free[2]) / 2
        return free[0] - free[1] + int(per_graph * (len(kinds) - 2))

    def _begin(self) -> None:
        self._attention.reserve_graphs(self.max_rows)
        self._pool = torch.cuda.graph_pool_handle()

    def _kinds(self) -> list[tuple[int, bool]]:
        """(size, with groups) of each graph, the largest first."""
        kinds = [(size, False) for size in self._sizes.tolist() if size > self._max_rows_elsewhere]
        if self._attention.has_graph_groups:
            kinds += [(size, True) for size in self._sizes.tolist() if size >= _MIN_ROWS_WITH_GROUPS]
        return sorted(kinds, reverse=True)

    def launch(self, size: int, with_groups: bool) -> None:
        """Launch what a graph holds and what goes before each replay, one by one. Takes `reserve_graphs` before."""
        layout = _rows_of(0)
        if with_groups:  # two rows over the first page of slot 0
            layout = replace(
                _rows_of(2),
                decode_positions=np.full(2, self._attention.page_size, np.int32),
                **{name: np.array([value], np.int32) for name, value in _ONE_GROUP.items()},
            )
        padded_slots = self._attention.plan_graph(layout, size, with_groups)
        assert padded_slots is not None
        gather_ids(self._state, padded_slots, self._ids, size, self._ids[:size])
        self._forward(size)

    def _capture(self, size: int, with_groups: bool) -> None:
        self.launch(size, with_groups)  # compiles and allocates what a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._forward(size)
        self._graphs[size, with_groups] = graph, hidden

    def _forward(self, size: int) -> torch.Tensor:
        ids = self._ids[:size]
        self._attention.write_tokens(ids)
        return self._model.forward(ids, self._attention)

    def run(self, layout: StepLayout, with_groups: bool) -> torch.Tensor | None:
        """Hidden states [d, hidden_size] of the decode rows; valid until the next run of this size.

        None, with nothing run, if there is no graph for such a step.
        """
        count = layout.decode_slots.size
        size = int(self._sizes[np.searchsorted(self._sizes, count)])
        if (size, with_groups) not in self._graphs:
            return None
        padded_slots = self._attention.plan_graph(layout, size, with_groups)
        if padded_slots is None:
            return None
        gather_ids(self._state, padded_slots, self._ids, size, self._ids[:size])
        graph, hidden = self._graphs[size, with_groups]
        graph.replay()
        return hidden[:count]


def read_free_bytes() -> int:
    """Of the device, when torch has given back what it only keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
