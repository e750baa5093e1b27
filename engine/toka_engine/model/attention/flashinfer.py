"""Paged attention on a GPU: our kernel for decode rows, flashinfer's for prefill and for what rows share (Hydragen).

Owns the KV cache, the block table on the device and each step's index arrays. Decode rows, prefill chunks and groups
with shared prefixes share a step. Each step is planned by `plan` (any mix), or for a CUDA graph of decode rows by
`plan_graph` (with groups, padded, at fixed addresses) or `plan_nothing`. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.errors import ConfigError
from toka_engine.model.attention.base import AttentionShape, StepLayout
from toka_engine.model.attention.paged_plan import (
    PageLists,
    QueryBatch,
    cover_rows,
    find_own_starts,
    outermost,
    plan_levels,
    plan_prefill,
    rows_of,
)
from toka_engine.model.kernels.decode_attention import OwnPart, Workspace, attend_decode
from toka_engine.model.kernels.merge import merge_state
from toka_engine.model.kernels.paged import HND, DevicePages, PagedKernels
from toka_engine.model.kernels.pages import copy_pages, flatten_table, set_table, write_tokens
from toka_engine.model.kernels.rope import rope_append
from toka_engine.model.staging import Staging

GRAPH_REQUESTS = 256
"""Requests of the shared-prefix batch in a graph: groups and the gaps between them."""


@dataclass(frozen=True, slots=True)
class _Queries:
    """A planned QueryBatch."""

    planned: Any
    q_indptr: torch.Tensor
    pages: DevicePages
    first_row: int
    num_rows: int
    rows: torch.Tensor | None


@dataclass(slots=True)
class _Plan:
    """What `forward` needs of the step."""

    slots: torch.Tensor
    positions: torch.Tensor
    num_decode: int = 0
    own_starts: torch.Tensor | None = None  # with levels: [num_decode] int32
    levels: list[_Queries] = field(default_factory=list)
    prefill: _Queries | None = None


class FlashInferAttention:
    """An attention.base.AttentionBackend. `kernels` may be replaced by a reference in tests."""

    def __init__(self, shape: AttentionShape, layout: int = HND, kernels: Any = None) -> None:
        if shape.device.type == "cuda" and shape.dtype is not torch.bfloat16:
            raise ConfigError(f"dtype={shape.dtype} is not supported on a GPU (bfloat16 is)")
        self.shape = shape
        self.use_groups = True
        self._layout = layout
        self._kernels = kernels
        self._step: _Plan | None = None
        self._tables = Staging(shape.device)
        self._inputs = Staging(shape.device)
        self._graph_inputs = Staging(shape.device)

    @property
    def has_graph_groups(self) -> bool:
        """Whether graphs can read shared prefixes once."""
        return bool(self._kernels.has_graph_queries)

    @property
    def row_slots(self) -> torch.Tensor:
        """[T] int32 on the device: the slot of each row of the step that was planned last."""
        assert self._step is not None
        return self._step.slots

    # -------------------------------------------------------------- memory

    def kv_bytes_per_token(self) -> int:
        shape = self.shape
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize

    def allocate(self, num_pages: int, page_size: int, max_seqs: int, max_pages_per_seq: int) -> None:
        """One page and one table row more than asked for: where the padding rows of graphs write."""
        shape = self.shape
        self.page_size, self.scratch_slot, self.max_pages_per_seq = page_size, max_seqs, max_pages_per_seq
        page = (shape.num_kv_heads, page_size) if self._layout == HND else (page_size, shape.num_kv_heads)
        # Zeros: a masked key has weight 0, but 0 times a NaN in memory that was never written would be NaN.
        self.cache = torch.zeros(
            (shape.num_layers, 2, num_pages + 1, *page, shape.head_dim), dtype=shape.dtype, device=shape.device
        )
        self.table = torch.zeros((max_seqs + 1, max_pages_per_seq), dtype=torch.int32, device=shape.device)
        self.table[max_seqs] = num_pages
        self.page_tokens = torch.zeros((num_pages + 1, page_size), dtype=torch.int32, device=shape.device)
        self._decode_work = Workspace.allocate(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.device)
        if self._kernels is None:
            self._kernels = PagedKernels(shape, page_size, self._layout)

    def release(self) -> None:
        """Let go of the cache, so that `allocate` may make another one."""
        self._step = None
        self.cache = self.page_tokens = self.table = torch.empty(0)

    def append_pages(self, slots: NDArray[np.int32], columns: NDArray[np.int32], pages: NDArray[np.int32]) -> None:
        """table[slots[i], columns[i]] = pages[i]."""
        if slots.size:
            (entries,) = self._tables.upload(np.concatenate((slots, columns, pages)))
            set_table(self.table, entries)

    def copy_pages(self, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        """Copy whole pages in every layer, and their token ids. No page is both source and target."""
        if source.size:
            from_pages, to_pages = self._tables.upload(source, target)
            planes, pages = 2 * self.shape.num_layers, self.cache.shape[2]
            copy_pages(self.cache.view(planes, pages, -1), from_pages, to_pages)
            copy_pages(self.page_tokens.unsqueeze(0), from_pages, to_pages)

    # -------------------------------------------------------------- planning

    def plan(self, layout: StepLayout) -> None:
        """Prepare the forward of any mix of decode rows, groups and prefill chunks."""
        page_size = self.page_size
        levels = plan_levels(layout, page_size) if self.use_groups else []
        batches = list(levels)
        if layout.prefill_slots.size:
            batches.append(plan_prefill(layout, page_size))
        # One upload for the whole step: rows, then each batch's requests.
        none = np.empty(0, np.int32)
        arrays = [*rows_of(layout), find_own_starts(layout, page_size) if levels else none]
        for batch in batches:
            arrays += [batch.q_indptr, *_arrays_of(batch.pages), none if batch.rows is None else batch.rows]
        uploaded = iter(self._inputs.upload(*arrays))
        step = _Plan(next(uploaded), next(uploaded), layout.decode_slots.size, next(uploaded))
        for index, batch in enumerate(batches):
            arrays_of_batch = [next(uploaded) for _ in range(6)]
            queries = self._plan_queries(index, batch, arrays_of_batch, is_causal=index >= len(levels))
            if index < len(levels):
                step.levels.append(queries)
            else:
                step.prefill = queries
        self._step = step

    def plan_graph(self, layout: StepLayout, num_rows: int) -> torch.Tensor | None:
        """Prepare a forward of decode rows and their groups, padded to `num_rows`; returns the padded slots.

        Everything that the forward reads has an address that depends on `num_rows` alone. Groups within groups are
        ignored. None, with nothing prepared, if there are no groups or too many.
        """
        layout = outermost(layout)
        levels = plan_levels(layout, self.page_size)
        level = cover_rows(levels[0], num_rows, GRAPH_REQUESTS) if levels else None
        if level is None:
            return None
        padding = num_rows - layout.decode_slots.size
        zeros = np.zeros(padding, np.int32)
        uploaded = self._graph_inputs.upload(
            np.concatenate((layout.decode_slots, zeros + self.scratch_slot)),
            np.concatenate((layout.decode_positions, zeros)),
            np.concatenate((find_own_starts(layout, self.page_size), zeros)),
            level.q_indptr,
            *_arrays_of(level.pages),
        )
        step = _Plan(uploaded[0], uploaded[1], num_rows, uploaded[2])
        pages = self._flatten(level.pages, uploaded[4:], self._graph_indices)
        planned = self._kernels.plan_queries(0, level, False, True)
        step.levels.append(_Queries(planned, uploaded[3], pages, 0, num_rows, None))
        self._step = step
        return uploaded[0]

    def plan_nothing(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Prepare a forward of decode rows alone, at the slots and positions [rows] int32 that these hold when it runs.

        A graph may hold the forward.
        """
        self._step = _Plan(slots, positions, slots.shape[0])

    def reserve_graphs(self, max_rows: int) -> None:
        """Allocate what `plan_graph` needs for up to `max_rows` rows."""
        self._graph_inputs = Staging(self.shape.device, capacity=3 * (max_rows + 8) + 5 * (GRAPH_REQUESTS + 8))
        self._graph_indices = torch.zeros(
            GRAPH_REQUESTS * self.max_pages_per_seq, dtype=torch.int32, device=self.shape.device
        )

    def _plan_queries(self, index: int, batch: QueryBatch, arrays: list[torch.Tensor], is_causal: bool) -> _Queries:
        return _Queries(
            planned=self._kernels.plan_queries(index, batch, is_causal),
            q_indptr=arrays[0],
            pages=self._flatten(batch.pages, arrays[1:5]),
            first_row=batch.first_row,
            num_rows=int(batch.q_indptr[-1]),
            rows=None if batch.rows is None else arrays[5],
        )

    def _flatten(self, pages: PageLists, arrays: list[torch.Tensor], out: torch.Tensor | None = None) -> DevicePages:
        slots, first_columns, kv_indptr, last_page_lens = arrays
        if out is None:
            out = torch.empty(max(1, pages.num_pages), dtype=torch.int32, device=self.shape.device)
        flatten_table(self.table, slots, first_columns, kv_indptr, out)
        return DevicePages(kv_indptr, out, last_page_lens)

    # -------------------------------------------------------------- forward

    def write_tokens(self, ids: torch.Tensor) -> None:
        """See attention.base.AttentionBackend. A graph may hold it: its addresses are those of `plan_graph`."""
        step = self._step
        assert step is not None
        write_tokens(ids, step.slots, step.positions, self.table, self.page_tokens)

    def forward(
        self,
        layer: int,
        q: torch.Tensor,  # [T, num_heads, head_dim], before RoPE; may be a strided view of a packed qkv
        k: torch.Tensor,  # [T, num_kv_heads, head_dim], before RoPE
        v: torch.Tensor,  # [T, num_kv_heads, head_dim]
        cos_sin: torch.Tensor,  # [max_positions, head_dim] fp32
    ) -> torch.Tensor:
        """See attention.base.AttentionBackend."""
        step = self._step
        assert step is not None
        cache, count = self.cache[layer], step.num_decode
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if count:
            self._attend_decode(step, q[:count], k[:count], v[:count], cos_sin, cache, out[:count])
        if step.prefill is not None:
            chunk, rotated = step.prefill, torch.empty(q[count:].shape, dtype=q.dtype, device=q.device)
            keys, values = self._by_token(cache)
            rope_append(
                q[count:], k[count:], v[count:], cos_sin, step.slots[count:], step.positions[count:], self.table,
                keys, values, rotated,
            )  # fmt: skip
            self._kernels.run_queries(
                chunk.planned, rotated, cache, chunk.q_indptr, chunk.pages, out[count:], None
            )  # fmt: skip
        return out

    def _by_token(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [pages, page_size, num_kv_heads, head_dim] of a layer's cache."""
        keys, values = cache.transpose(2, 3) if self._layout == HND else cache
        return keys, values

    def _attend_decode(
        self,
        step: _Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        part = None
        if step.levels and step.own_starts is not None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            part = OwnPart(step.own_starts, lse, torch.empty(q.shape, dtype=q.dtype, device=q.device))
        attend_decode(
            q, k, v, cos_sin, step.slots, step.positions, self.table, *self._by_token(cache), out, self._decode_work,
            self.shape.scale, part,
        )  # fmt: skip
        if part is not None:
            self._merge_levels(step.levels, part, cache, out)

    def _merge_levels(self, levels: list[_Queries], own: OwnPart, cache: torch.Tensor, out: torch.Tensor) -> None:
        """Merge what rows share into `out`, which has their own part."""
        for level in levels:
            if level.rows is None:
                q = own.rotated[level.first_row : level.first_row + level.num_rows]
            else:
                q = own.rotated.index_select(0, level.rows)
            part = torch.empty_like(q)
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            self._kernels.run_queries(level.planned, q, cache, level.q_indptr, level.pages, part, lse)
            merge_state(out, own.lse, part, lse, first_row=level.first_row, rows=level.rows)


def _arrays_of(pages: PageLists) -> tuple[NDArray[np.int32], ...]:
    return pages.slots, pages.first_columns, pages.kv_indptr, pages.last_page_lens
