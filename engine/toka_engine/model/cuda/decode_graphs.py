"""CUDA graphs for decode-only steps, so that launch overhead never exceeds GPU time.

The host uploads one packet, and attention reads the block table itself. A step replays two graphs of its padded size:
the forward (one for rows without groups, one for rows with shared prefixes), and the LM head with a sampler for rows
that ask for no more than temperature, whose last kernel writes the tokens to host memory. Where a row asks for more, or
there are so many rows that their logits are large and the host has time, head and sampler are launched kernel by
kernel after the first graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.causal import CausalModel
from toka_engine.model.cuda.attention import GRAPH_GROUP_WORDS, CudaAttention, GraphGroups
from toka_engine.model.cuda.foreign_memory import alias
from toka_engine.model.cuda.graph_sizes import graph_sizes, measure_captures
from toka_engine.model.cuda.sampler import Sampler
from toka_engine.model.kernels.device_slots import DeviceSlots
from toka_engine.model.kernels.packets import Packets

_MIN_GROUPED_ROWS = 32
"""A graph size to which steps of fewer rows with groups are padded."""


class DecodeGraphs:
    """CUDA graphs of decode steps of up to `max_rows` rows, captured by `capture`."""

    max_sampled_rows = 512
    """Rows up to which graphs hold memory for logits: 256 MB for a vocabulary of 128 k."""

    def __init__(
        self,
        model: CausalModel,
        attention: CudaAttention,
        state: DeviceSlots,
        sampler: Sampler,
        max_rows: int,
    ) -> None:
        """`attention` and `sampler` share `state`; the memory of `attention` may not be replaced afterwards."""
        self.max_rows = max_rows
        self._model, self._attention, self._state, self._sampler = model, attention, state, sampler
        self.packets = Packets(max_rows, GRAPH_GROUP_WORDS, attention.scratch_slot, attention.shape.device)
        self._sizes = np.array(graph_sizes(max_rows))
        self._forwards: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        """Graph and its hidden states, by size and whether there are groups. These keep no memory alive: the next
        forward may write there."""
        self._samplers: dict[int, torch.cuda.CUDAGraph] = {}
        self._last_size = 0

    @property
    def has_groups(self) -> bool:
        """Whether there are graphs for rows in groups."""
        return self.max_rows >= _MIN_GROUPED_ROWS

    # -------------------------------------------------------------- capturing

    def capture(self) -> None:
        """Capture every size, the largest first, so that the others fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes.tolist()):
            self._capture(size, pool)

    def measure(self) -> int:
        """Return the device bytes that `capture` will take, from a few captures. Their graphs must not be replayed."""
        pool, sizes = torch.cuda.graph_pool_handle(), self._sizes.tolist()
        sampled = [size for size in sizes if size <= self.max_sampled_rows]
        rest = sizes[len(sampled) :]
        return sum(measure_captures(some, lambda size: self._capture(size, pool)) for some in (rest, sampled))

    def launch(self, size: int) -> None:
        """Launch the kernels of the graphs of `size` without a graph, for rows of the padding slot."""
        for has_groups in self._kinds(size):
            if self.packets.slots.device.type != "meta":
                none, no_groups = np.empty(0, np.int32), np.zeros(GRAPH_GROUP_WORDS, np.int32)
                self.packets.write(size, none, none, (none, none, none), np.zeros(4, np.int32), none, no_groups)
            hidden = self._forward(size, has_groups)
        if size <= self.max_sampled_rows:
            self._sample(size, hidden)

    @staticmethod
    def _kinds(size: int) -> tuple[bool, ...]:
        """Return, for each forward graph of this size, whether it has groups."""
        return (False, True) if size >= _MIN_GROUPED_ROWS else (False,)

    def _capture(self, size: int, pool: Any) -> None:
        self.launch(size)  # compiles and allocates what a capture may not
        torch.cuda.synchronize()
        hidden: torch.Tensor | None = None
        for has_groups in self._kinds(size):
            forward = torch.cuda.CUDAGraph()
            with torch.cuda.graph(forward, pool=pool):
                found = self._forward(size, has_groups)
                hidden = found if hidden is None else hidden.copy_(found)  # the sampler's graph reads one address
            self._forwards[size, has_groups] = forward, alias(hidden)
        if size <= self.max_sampled_rows and hidden is not None:
            self._samplers[size] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._samplers[size], pool=pool):
                self._sample(size, hidden)

    def _forward(self, size: int, has_groups: bool) -> torch.Tensor:
        packets, attention = self.packets, self._attention
        packets.unpack(size, self._state, attention.table, attention.page_tokens, has_groups)
        groups = (packets.starts[:size], packets.groups) if has_groups else None
        attention.bind_graph_inputs(packets.slots[:size], packets.positions[:size], groups)
        return self._model.forward(packets.ids[:size], attention)

    def _sample(self, size: int, hidden: torch.Tensor) -> None:
        packets = self.packets
        logits = self._model.logits(hidden)
        self._sampler.sample_plain(logits, packets.slots[:size], packets.random, packets.sampled_ids[:size])
        packets.write_results(size)

    # -------------------------------------------------------------- running

    def forward(
        self,
        slots: NDArray[np.int32],  # [rows], 1 <= rows <= max_rows
        positions: NDArray[np.int32],  # [rows]
        appends: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],  # [at most max_rows] each
        groups: GraphGroups | None = None,  # None unless `has_groups`
    ) -> tuple[torch.Tensor, int]:
        """Return hidden states [rows, hidden_size], valid until the next forward, and the ring index."""
        size, starts, words = self._pad(slots.size), None, None
        if groups is not None:
            size, starts, words = max(size, _MIN_GROUPED_ROWS), groups.suffix_starts, groups.words
        self._last_size, random = size, self._sampler.next_random()
        ring_index = self.packets.write(size, slots, positions, appends, random, starts, words)
        graph, hidden = self._forwards[size, groups is not None]
        graph.replay()
        return hidden[: slots.size], ring_index

    def sample(self) -> bool:
        """Sample from the last forward's hidden states and write the tokens. False: it had too many rows."""
        graph = self._samplers.get(self._last_size)
        if graph is None:
            return False
        graph.replay()
        return True

    def pad_sampled(self, num_rows: int) -> int:
        """Return how many rows, at least `num_rows`, have a head whose kernels the capture has loaded."""
        return self._pad(num_rows) if num_rows <= min(self.max_rows, self.max_sampled_rows) else num_rows

    def _pad(self, num_rows: int) -> int:
        return int(self._sizes[np.searchsorted(self._sizes, num_rows)])
