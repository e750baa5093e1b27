"""Paged attention on a GPU: flashinfer's kernels, our RoPE-and-append, Hydragen by log-sum-exp merge.

Owns the KV cache, the block table on the device and each step's index arrays. Decode rows, prefill chunks and groups
with shared prefixes share a step. Each step is planned by `plan` (any mix) or `plan_graph` (decode rows only, padded,
at fixed addresses, for CUDA graphs). Nothing here waits for the device.
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
    list_pages,
    outermost,
    plan_decode,
    plan_prefill,
    rows_of,
)
from toka_engine.model.kernels.decode_attention import Workspace, attend_decode
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
    work: Workspace | None = None
    """Set if nothing was planned: attention finds the pages itself."""
    decode: Any = None
    decode_pages: DevicePages | None = None
    decode_q_indptr: torch.Tensor | None = None
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
        num_decode = layout.decode_slots.size
        own, levels = plan_decode(layout, page_size, self.use_groups)
        batches = list(levels)
        if layout.prefill_slots.size:
            batches.append(plan_prefill(layout, page_size))
        # One upload for the whole step: rows, then the decode rows' pages, then each batch's.
        arrays = [*rows_of(layout), np.arange(num_decode + 1, dtype=np.int32), *_arrays_of(own)]
        for batch in batches:
            arrays += [batch.q_indptr, *_arrays_of(batch.pages)]
            arrays.append(np.empty(0, np.int32) if batch.rows is None else batch.rows)
        uploaded = iter(self._inputs.upload(*arrays))
        step = _Plan(next(uploaded), next(uploaded), num_decode)
        q_indptr, own_arrays = next(uploaded), [next(uploaded) for _ in range(4)]
        if num_decode:
            step.decode_pages = self._flatten(own, own_arrays)
            step.decode_q_indptr = q_indptr
            step.decode = self._kernels.plan_decode(own, False)
        for index, batch in enumerate(batches):
            arrays_of_batch = [next(uploaded) for _ in range(6)]
            queries = self._plan_queries(index, batch, arrays_of_batch, is_causal=index >= len(levels))
            if index < len(levels):
                step.levels.append(queries)
            else:
                step.prefill = queries
        self._step = step

    def plan_graph(self, layout: StepLayout, num_rows: int, with_groups: bool) -> torch.Tensor | None:
        """Prepare a forward of decode rows alone, padded to `num_rows`; returns the padded slots on the device.

        Everything that the forward reads has an address that depends on `num_rows` and `with_groups` alone. Groups
        within groups are ignored. None, with nothing prepared, if there are too many groups.
        """
        own, levels = plan_decode(outermost(layout) if with_groups else layout, self.page_size, with_groups)
        level = None
        if with_groups:
            level = cover_rows(levels[0], num_rows, GRAPH_REQUESTS) if levels else None
            if level is None:
                return None
        padding = num_rows - layout.decode_slots.size
        slots = np.concatenate((layout.decode_slots, np.full(padding, self.scratch_slot, np.int32)))
        positions = np.concatenate((layout.decode_positions, np.zeros(padding, np.int32)))
        first_columns = np.concatenate((own.first_columns, np.zeros(padding, np.int32)))
        own = list_pages(slots, first_columns, positions + 1, self.page_size)
        q_indptr = np.arange(num_rows + 1, dtype=np.int32)
        uploaded = self._graph_inputs.upload(slots, positions, q_indptr, *_arrays_of(own))
        step = _Plan(uploaded[0], uploaded[1], num_rows, decode_q_indptr=uploaded[2])
        step.decode_pages = self._flatten(own, uploaded[3:], self._graph_indices)
        step.decode = self._kernels.plan_decode(own, True)
        if level is not None:
            arrays = self._graph_groups.upload(level.q_indptr, *_arrays_of(level.pages))
            pages = self._flatten(level.pages, arrays[1:], self._graph_group_indices)
            planned = self._kernels.plan_queries(0, level, False, True)
            step.levels.append(_Queries(planned, arrays[0], pages, 0, num_rows, None))
        self._step = step
        return uploaded[0]

    def plan_nothing(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Prepare a forward of decode rows alone, at the slots and positions [rows] int32 that these hold when it runs.

        A graph may hold the forward.
        """
        self._step = _Plan(slots, positions, slots.shape[0], work=self._decode_work)

    def reserve_graphs(self, max_rows: int) -> None:
        """Allocate what `plan_graph` needs for up to `max_rows` rows."""
        self._graph_inputs = Staging(self.shape.device, capacity=8 * (max_rows + 8))
        self._graph_indices = torch.zeros(
            max_rows * self.max_pages_per_seq, dtype=torch.int32, device=self.shape.device
        )
        self._graph_groups = Staging(self.shape.device, capacity=8 * (GRAPH_REQUESTS + 8))
        self._graph_group_indices = torch.zeros(
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
        cache = self.cache[layer]
        by_token = cache.transpose(2, 3) if self._layout == HND else cache
        if step.work is not None:
            return self._attend_decode(step, step.work, q, k, v, cos_sin, by_token)
        rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rope_append(q, k, v, cos_sin, step.slots, step.positions, self.table, by_token[0], by_token[1], rotated)
        out = torch.empty_like(rotated)
        if step.num_decode:
            self._attend_decode(step, rotated[: step.num_decode], cache, out[: step.num_decode])
        if step.prefill is not None:
            chunk = step.prefill
            self._kernels.run_queries(
                chunk.planned,
                rotated[chunk.first_row :],
                cache,
                chunk.q_indptr,
                chunk.pages,
                out[chunk.first_row :],
                None,
            )
        return out

    def _attend_decode(
        self,
        step: _Plan,
        work: Workspace,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos_sin: torch.Tensor,
        by_token: torch.Tensor,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        attend_decode(
            q, k, v, cos_sin, step.slots, step.positions, self.table, by_token[0], by_token[1], out, work,
            self.shape.scale,
        )  # fmt: skip
        return out

    def _attend_decode(self, step: _Plan, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        lse = _new_lse(q) if step.levels else None
        self._kernels.run_decode(step.decode, q, cache, step.decode_pages, step.decode_q_indptr, out, lse)
        if lse is None:
            return
        for level in step.levels:
            if level.rows is None:
                level_q = q[level.first_row : level.first_row + level.num_rows]
            else:
                level_q = q.index_select(0, level.rows)
            part, part_lse = torch.empty_like(level_q), _new_lse(level_q)
            self._kernels.run_queries(level.planned, level_q, cache, level.q_indptr, level.pages, part, part_lse)
            merge_state(out, lse, part, part_lse, first_row=level.first_row, rows=level.rows)


def _new_lse(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _arrays_of(pages: PageLists) -> tuple[NDArray[np.int32], ...]:
    return pages.slots, pages.first_columns, pages.kv_indptr, pages.last_page_lens
