"""Makes the index arrays of paged attention from a step's layout. Pure numpy: no device, no kernels.

Decode rows and Hydragen groups find their pages themselves; a row needs to know where its shared prefix ends. Nested
groups form levels, attended one after the other. Prefill chunks are queries over lists of pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from toka_engine.model.attention_backend import StepLayout

Int32s = NDArray[np.int32]
_GROUP_FIELDS = ("group_first_rows", "group_num_rows", "group_first_columns", "group_num_columns")


@dataclass(frozen=True, slots=True)
class PageLists:
    """n requests over pages: request i reads kv_lens[i] tokens from block_table[slots[i], first_columns[i]:]."""

    slots: Int32s  # [n]
    first_columns: Int32s  # [n]
    kv_indptr: Int32s  # [n + 1] in pages
    kv_lens: Int32s  # [n] in tokens
    last_page_lens: Int32s  # [n] 1..page_size

    @property
    def num_pages(self) -> int:
        return int(self.kv_indptr[-1])


@dataclass(frozen=True, slots=True)
class QueryBatch:
    """Prefill chunks as requests with several query rows each."""

    q_indptr: Int32s  # [n + 1]
    pages: PageLists

    @property
    def arrays(self) -> tuple[Int32s, ...]:
        """The arrays that kernels read on the device."""
        pages = self.pages
        return self.q_indptr, pages.slots, pages.first_columns, pages.kv_indptr, pages.last_page_lens


def indptr_of(counts: NDArray[np.int32]) -> Int32s:
    """Return running sums [n + 1] of counts [n], from 0."""
    result = np.zeros(counts.size + 1, np.int32)
    np.cumsum(counts, out=result[1:])
    return result


def list_pages(slots: Int32s, first_columns: Int32s, ends: Int32s, page_size: int) -> PageLists:
    """List the pages of requests that read up to token `ends` [n] of their slots, counted from position 0."""
    counts = -(-ends // page_size) - first_columns
    return PageLists(
        slots=slots,
        first_columns=first_columns,
        kv_indptr=indptr_of(counts),
        kv_lens=ends - first_columns * page_size,
        last_page_lens=((ends - 1) % page_size + 1).astype(np.int32),
    )


def find_depths(first_rows: Int32s, num_rows: Int32s) -> NDArray[np.int64]:
    """Return each group's nesting depth [g]: how many earlier groups contain its rows. Sorted by column, as in Step."""
    inside = (first_rows[:, None] >= first_rows[None, :]) & (
        (first_rows + num_rows)[:, None] <= (first_rows + num_rows)[None, :]
    )
    earlier = np.tri(first_rows.size, k=-1, dtype=bool)
    depths: NDArray[np.int64] = (inside & earlier).sum(axis=1)
    return depths


def find_levels(layout: StepLayout) -> list[NDArray[np.int64]]:
    """Return the indices of the groups at each depth, the outermost first; groups of one depth share no rows."""
    if not layout.group_first_rows.size:
        return []
    depths = find_depths(layout.group_first_rows, layout.group_num_rows)
    return [np.flatnonzero(depths == depth) for depth in range(int(depths.max()) + 1)]


def find_suffix_starts(layout: StepLayout, page_size: int) -> Int32s:
    """Return where each decode row's suffix starts, [d] in tokens: its groups cover the tokens before."""
    columns = np.zeros(layout.decode_slots.size, np.int32)
    ends = layout.group_first_columns + layout.group_num_columns
    order = np.argsort(ends, kind="stable")  # of the groups of a row, the one that ends last is written last
    counts = layout.group_num_rows[order]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    columns[np.repeat(layout.group_first_rows[order], counts) + within] = np.repeat(ends[order], counts)
    return columns * np.int32(page_size)


def outermost(layout: StepLayout) -> StepLayout:
    """Return `layout` with the groups of depth 0 only: what inner groups share is then read row by row."""
    is_outer = find_depths(layout.group_first_rows, layout.group_num_rows) == 0
    return replace(layout, **{name: getattr(layout, name)[is_outer] for name in _GROUP_FIELDS})


def plan_prefill(layout: StepLayout, page_size: int, chunks: slice = slice(None)) -> QueryBatch:
    """Make the batch of these `chunks`, each over its slot's pages up to its own end."""
    lengths = layout.prefill_lengths[chunks]
    ends = (layout.prefill_starts[chunks] + lengths).astype(np.int32)
    pages = list_pages(layout.prefill_slots[chunks], np.zeros(ends.size, np.int32), ends, page_size)
    return QueryBatch(indptr_of(lengths), pages)


def cut_chunks(layout: StepLayout, page_size: int, most_pages: int | None) -> list[slice]:
    """Cut the step's chunks into runs that read at most `most_pages` pages each; None: into one run."""
    num_chunks = layout.prefill_slots.size
    if most_pages is None:
        return [slice(0, num_chunks)] if num_chunks else []
    ends = layout.prefill_starts.astype(np.int64) + layout.prefill_lengths
    sums = np.cumsum(-(-ends // page_size))
    runs: list[slice] = []
    begin, before = 0, 0
    while begin < num_chunks:
        end = max(begin + 1, int(np.searchsorted(sums, before + most_pages, side="right")))
        runs.append(slice(begin, end))
        begin, before = end, int(sums[end - 1])
    return runs
