"""Paged attention on a GPU: our kernels for decode rows and shared prefixes (Hydragen), flashinfer's for prefill.

Owns the KV cache, the block table on the device and each step's index arrays. A step may mix decode rows, prefill
chunks and groups with shared prefixes. `plan` prepares any step; `bind_graph_inputs` prepares a CUDA graph of decode
rows, whose inputs are at fixed addresses. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.errors import ConfigError
from toka_engine.model.attention_backend import AttentionShape, StepLayout
from toka_engine.model.cuda.attention_plan import (
    find_levels,
    find_suffix_starts,
    outermost,
)
from toka_engine.model.cuda.chunk_attention import ChunkAttention, Chunks
from toka_engine.model.cuda.flashinfer_prefill import HND, FlashInferPrefill
from toka_engine.model.cuda.staging import Staging
from toka_engine.model.kernels.decode_attention import LaunchConfig, SuffixPart, Workspace, attend_decode
from toka_engine.model.kernels.pages import copy_pages, set_table, write_tokens
from toka_engine.model.kernels.prefix_attention import attend_prefix
from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace, pack_groups, packed_size
from toka_engine.model.kernels.rope_append import rope_append
from toka_engine.model.step_rows import find_rows

GRAPH_GROUPS = 256
"""Most groups of a step that is a CUDA graph."""
GRAPH_GROUP_WORDS = packed_size(GRAPH_GROUPS)


@dataclass(frozen=True, slots=True)
class GraphGroups:
    """Groups of decode rows for a CUDA graph, on the host."""

    suffix_starts: NDArray[np.int32]  # [d] tokens
    words: NDArray[np.int32]  # [GRAPH_GROUP_WORDS]


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """Views of one layer's KV cache, made once: a step of many launches has no time for it."""

    pages: torch.Tensor  # [2, pages, ...], in the cache's layout
    keys: torch.Tensor  # [pages, page_size, num_kv_heads, head_dim]
    values: torch.Tensor  # like keys

    @classmethod
    def of(cls, pages: torch.Tensor, layout: int) -> CacheLayer:
        """Views of `pages`, in this layout."""
        return cls(pages, *(pages.transpose(2, 3) if layout == HND else pages))


@dataclass(slots=True)
class _Plan:
    """The step's inputs to `forward`, on the device."""

    slots: torch.Tensor
    positions: torch.Tensor
    num_decode: int = 0
    suffix_starts: torch.Tensor | None = None  # with levels: [num_decode] int32
    levels: list[torch.Tensor] = field(default_factory=list)
    """Packed groups by level, the outermost first; see pack_groups."""
    prefill: list[Chunks] = field(default_factory=list)
    prompt_slots: torch.Tensor = field(init=False)
    prompt_positions: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_slots, self.prompt_positions = self.slots[self.num_decode :], self.positions[self.num_decode :]


class CudaAttention:
    """An AttentionBackend for NVIDIA GPUs. Tests may replace flashinfer's `kernels` by a reference.

    Its cache is of the model's dtype, or of 8-bit floats (e4m3) that stand for themselves: a checkpoint's scales are in
    the weights (see `kv_scales`).
    """

    def __init__(self, shape: AttentionShape, layout: int = HND, kernels: Any = None) -> None:
        if shape.device.type == "cuda" and shape.dtype is not torch.bfloat16:
            raise ConfigError(f"dtype={shape.dtype} is not supported on a GPU (bfloat16 is)")
        self.shape = shape
        self.use_groups = True
        self._layout = layout
        self._kernels = kernels
        self._step: _Plan | None = None
        self._chunks = ChunkAttention(shape)
        self._tables = Staging(shape.device)
        self._inputs = Staging(shape.device)

    @property
    def row_slots(self) -> torch.Tensor:
        """The slot of each row of the step that was planned last: [T] int32 on the device."""
        assert self._step is not None
        return self._step.slots

    # -------------------------------------------------------------- memory

    def allocate(self, num_pages: int, page_size: int, max_seqs: int, max_pages_per_seq: int) -> None:
        """See AttentionBackend. Adds one page and one table row, which the padding rows of graphs write to."""
        shape = self.shape
        self.page_size, self.scratch_slot, self.max_pages_per_seq = page_size, max_seqs, max_pages_per_seq
        page = (shape.num_kv_heads, page_size) if self._layout == HND else (page_size, shape.num_kv_heads)
        # Zeros: a masked key has weight 0, but 0 times a NaN in memory that was never written would be NaN.
        self.cache = torch.zeros(
            (shape.num_layers, 2, num_pages + 1, *page, shape.head_dim), dtype=shape.stored_dtype, device=shape.device
        )
        self._layers = [CacheLayer.of(pages, self._layout) for pages in self.cache]
        self.table = torch.zeros((max_seqs + 1, max_pages_per_seq), dtype=torch.int32, device=shape.device)
        self.table[max_seqs] = num_pages
        self.page_tokens = torch.zeros((num_pages + 1, page_size), dtype=torch.int32, device=shape.device)
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.device
        has_fp8 = shape.stored_dtype != shape.dtype
        self._decode_work = Workspace.allocate(*heads, LaunchConfig.of(shape.head_dim, has_fp8))
        config = PrefixLaunchConfig.choose(shape.head_dim, page_size, self._layout == HND, has_fp8)
        self._prefix_work = PrefixWorkspace.allocate(*heads, config)
        if self._kernels is None:
            self._kernels = FlashInferPrefill(shape, page_size, self._layout)
        self._chunks.allocate(page_size, (*page, shape.head_dim), max_pages_per_seq)

    def release(self) -> None:
        """Free the cache, so that `allocate` can make another one."""
        self._step = None
        self._layers = []
        self.cache = self.page_tokens = self.table = torch.empty(0)

    def append_pages(self, slots: NDArray[np.int32], columns: NDArray[np.int32], pages: NDArray[np.int32]) -> None:
        """Set table[slots[i], columns[i]] = pages[i]."""
        if slots.size:
            (entries,) = self._tables.upload(np.concatenate((slots, columns, pages)))
            set_table(self.table, entries)

    def copy_pages(self, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        """Copy whole pages in every layer, and their token ids. No page is both source and target."""
        if source.size:
            from_pages, to_pages = self._tables.upload(source, target)
            planes, pages = 2 * self.shape.num_layers, self.cache.shape[2]
            copy_pages(self.cache.view(planes, pages, -1).view(torch.int32), from_pages, to_pages)
            copy_pages(self.page_tokens.unsqueeze(0), from_pages, to_pages)

    # -------------------------------------------------------------- planning

    def plan(self, layout: StepLayout) -> None:
        """Prepare the forward of any mix of decode rows, groups and prefill chunks, with one upload for the step."""
        page_size = self.page_size
        levels = [self._pack_groups(layout, some) for some in find_levels(layout)] if self.use_groups else []
        batches = self._chunks.cut(layout)
        suffix_starts = find_suffix_starts(layout, page_size) if levels else np.empty(0, np.int32)
        arrays = [*find_rows(layout), suffix_starts, *levels, *(a for batch in batches for a in batch.arrays)]
        slots, positions, starts, *rest = self._inputs.upload(*arrays)
        step = _Plan(slots, positions, layout.decode_slots.size, starts, rest[: len(levels)])
        step.prefill = self._chunks.plan(self._kernels, batches, rest[len(levels) :], self.table)
        self._step = step

    def _pack_groups(
        self, layout: StepLayout, some: NDArray[np.int64], capacity: int | None = None
    ) -> NDArray[np.int32]:
        first_rows = layout.group_first_rows[some]
        return pack_groups(
            self._prefix_work, self.page_size, first_rows, layout.group_num_rows[some], layout.decode_slots[first_rows],
            layout.group_first_columns[some], layout.group_num_columns[some], capacity,
        )  # fmt: skip

    def pack_graph_groups(self, layout: StepLayout) -> GraphGroups | None:
        """Pack the outermost groups of decode rows for a graph; None if there are none or too many."""
        layout = outermost(layout)
        count = layout.group_first_rows.size
        if not 0 < count <= GRAPH_GROUPS:
            return None
        words = self._pack_groups(layout, np.arange(count), GRAPH_GROUPS)
        return GraphGroups(find_suffix_starts(layout, self.page_size), words)

    def bind_graph_inputs(
        self,
        slots: torch.Tensor,  # [rows] int32
        positions: torch.Tensor,  # [rows] int32
        groups: tuple[torch.Tensor, torch.Tensor]
        | None = None,  # suffix starts [rows] int32, [GRAPH_GROUP_WORDS] int32
    ) -> None:
        """Prepare a decode-only forward that reads slots and positions from these tensors when it is replayed."""
        self._step = _Plan(slots, positions, slots.shape[0])
        if groups is not None:
            self._step.suffix_starts, self._step.levels = groups[0], [groups[1]]

    # -------------------------------------------------------------- forward

    def write_tokens(self, ids: torch.Tensor) -> None:
        """See AttentionBackend."""
        step = self._step
        assert step is not None
        write_tokens(ids, step.slots, step.positions, self.table, self.page_tokens)

    def forward(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor
    ) -> torch.Tensor:
        """See AttentionBackend."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.attend(layer, q, k, v, cos_sin, out)
        return out

    def attend(
        self,
        layer: int,
        q: torch.Tensor,  # [T, num_heads, head_dim], before RoPE; may be a strided view of a packed qkv
        k: torch.Tensor,  # [T, num_kv_heads, head_dim], before RoPE
        v: torch.Tensor,  # [T, num_kv_heads, head_dim]
        cos_sin: torch.Tensor,  # [max_positions, head_dim] fp32
        out: torch.Tensor,  # [T, num_heads, head_dim], written
    ) -> None:
        """Do what `forward` does, into the caller's memory."""
        step = self._step
        assert step is not None
        cache, count = self._layers[layer], step.num_decode
        if count:
            self._attend_decode(step, q[:count], k[:count], v[:count], cos_sin, cache, out[:count])
        if step.prefill:
            q = q[count:]
            rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            rope_append(
                q, k[count:], v[count:], cos_sin, step.prompt_slots, step.prompt_positions, self.table, cache.keys,
                cache.values, rotated,
            )  # fmt: skip
            self._chunks.run(self._kernels, step.prefill, rotated, cache.pages, out[count:])

    def _attend_decode(
        self,
        step: _Plan,
        q: torch.Tensor,  # [d, num_heads, head_dim]
        k: torch.Tensor,  # [d, num_kv_heads, head_dim]
        v: torch.Tensor,  # [d, num_kv_heads, head_dim]
        cos_sin: torch.Tensor,  # [max_positions, head_dim] fp32
        cache: CacheLayer,
        out: torch.Tensor,  # [d, num_heads, head_dim], written
    ) -> None:
        part = None
        if step.levels and step.suffix_starts is not None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            part = SuffixPart(step.suffix_starts, lse, torch.empty(q.shape, dtype=q.dtype, device=q.device))
        keys, values = cache.keys, cache.values
        attend_decode(
            q, k, v, cos_sin, step.slots, step.positions, self.table, keys, values, out, self._decode_work,
            self.shape.scale, part,
        )  # fmt: skip
        if part is not None:
            for groups in step.levels:
                attend_prefix(
                    part.rotated, groups, self.table, keys, values, out, part.lse, self._prefix_work, self.shape.scale
                )  # fmt: skip
