"""Attention of a step's prefill chunks: their pages on the device, and the cache that flashinfer's kernels read.

These read the model's dtype. Of a cache of 8-bit floats the pages of a step's chunks are widened, layer by layer, into
memory that all layers share: a page is widened once for all rows of its chunk, whose products with it take far longer.
A step whose chunks read more pages than that memory holds is attended in several runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toka_engine.model.attention_backend import AttentionShape, StepLayout
from toka_engine.model.cuda.attention_plan import QueryBatch, cut_chunks, plan_prefill
from toka_engine.model.cuda.flashinfer_prefill import DevicePages
from toka_engine.model.kernels.pages import flatten_table, widen_pages

_LEAST_WIDE_TOKENS = 1 << 15
"""Fewest tokens that are widened at once; otherwise those of the longest sequence."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """A run of chunks, planned and on the device."""

    batch: QueryBatch
    rows: slice
    """Those of its chunks, of all prefill rows."""
    planned: Any
    """The kernels' schedule; None where there are several runs, which share its memory."""
    q_indptr: torch.Tensor  # [n + 1] int32
    pages: DevicePages


class ChunkAttention:
    """Plans and runs the attention of prefill chunks over paged keys and values."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape, self._page_size = shape, 0
        self._wide: torch.Tensor | None = None
        """[2, pages, ...] in the model's dtype; None: the cache is."""

    def allocate(self, page_size: int, page: tuple[int, ...], max_pages_per_seq: int) -> None:
        """Allocate memory for the widened pages of the longest sequence, if the cache is of 8-bit floats.

        `page` is the shape of one page. Memory that suffices is kept.
        """
        self._page_size, shape = page_size, self._shape
        if shape.stored_dtype == shape.dtype:
            return
        num_pages = max(max_pages_per_seq, -(-_LEAST_WIDE_TOKENS // page_size))
        if self._wide is None or self._wide.shape[1] < num_pages or self._wide.shape[2:] != page:
            self._wide = None  # given back before more is taken
            self._wide = torch.zeros((2, num_pages, *page), dtype=shape.dtype, device=shape.device)
            self._numbers = torch.arange(num_pages, dtype=torch.int32, device=shape.device)

    def cut(self, layout: StepLayout) -> list[QueryBatch]:
        """Return the step's chunks in as few runs as there is memory for."""
        most_pages = None if self._wide is None else self._wide.shape[1]
        return [
            plan_prefill(layout, self._page_size, chunks) for chunks in cut_chunks(layout, self._page_size, most_pages)
        ]

    def plan(
        self, kernels: Any, batches: Sequence[QueryBatch], arrays: list[torch.Tensor], table: torch.Tensor
    ) -> list[Chunks]:
        """Plan the runs of a step for `kernels` (a FlashInferPrefill).

        `arrays` are those of all `batches` on the device, `table` is the block table.
        """
        runs: list[Chunks] = []
        first_row = 0
        for index, batch in enumerate(batches):
            count = len(batch.arrays)
            q_indptr, slots, first_columns, kv_indptr, last_page_lens = arrays[index * count : (index + 1) * count]
            indices = torch.empty(max(1, batch.pages.num_pages), dtype=torch.int32, device=self._shape.device)
            flatten_table(table, slots, first_columns, kv_indptr, indices)
            pages = DevicePages(kv_indptr, indices, last_page_lens)
            rows = slice(first_row, first_row + int(batch.q_indptr[-1]))
            planned = kernels.plan_queries(batch) if len(batches) == 1 else None
            runs.append(Chunks(batch, rows, planned, q_indptr, pages))
            first_row = rows.stop
        return runs

    def run(
        self,
        kernels: Any,
        runs: Sequence[Chunks],
        q: torch.Tensor,  # [prefill rows, num_heads, head_dim], rotated
        cache: torch.Tensor,  # [2, pages, ...] of one layer, with the chunks' own keys and values
        out: torch.Tensor,  # [prefill rows, num_heads, head_dim], written
    ) -> None:
        """Attend with a causal mask."""
        for chunks in runs:
            planned = kernels.plan_queries(chunks.batch) if len(runs) > 1 else chunks.planned
            read, pages = self._widen(cache, chunks.pages)
            kernels.run_queries(planned, q[chunks.rows], read, chunks.q_indptr, pages, out[chunks.rows])

    def _widen(self, cache: torch.Tensor, pages: DevicePages) -> tuple[torch.Tensor, DevicePages]:
        """Return a cache in the model's dtype, and where the pages are in it."""
        if self._wide is None:
            return cache, pages
        indices = pages.kv_indices
        widen_pages(cache.flatten(2), indices, self._wide.flatten(2))
        return self._wide, DevicePages(pages.kv_indptr, self._numbers[: indices.shape[0]], pages.last_page_lens)
