"""From a step's layout to the index arrays of paged attention. Pure numpy: no device, no kernels.

Decode rows find their own pages themselves, but have to be told where what Hydragen groups share of them ends. Each
depth of nested groups is one batch of queries (the groups' rows) over shared pages; the parts are merged by log-sum-exp
afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from toka_engine.model.attention.base import StepLayout

Int32s = NDArray[np.int32]
_GROUP_FIELDS = ("group_first_rows", "group_num_rows", "group_first_columns", "group_num_columns")


@dataclass(frozen=True, slots=True)
class PageLists:
    """n requests over pages: request i reads block_table[slots[i], first_columns[i]:] of kv_lens[i] tokens."""

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
    """Requests with several query rows each: prefill chunks, or the rows of Hydragen groups."""

    q_indptr: Int32s  # [n + 1]
    pages: PageLists
    first_row: int
    """Of the step's rows."""
    rows: Int32s | None
    """[q_indptr[-1]] rows of the step, where they do not follow each other."""


def indptr_of(counts: NDArray[np.int32]) -> Int32s:
    """[n] -> [n + 1] running sums from 0."""
    result = np.zeros(counts.size + 1, np.int32)
    np.cumsum(counts, out=result[1:])
    return result


def list_pages(slots: Int32s, first_columns: Int32s, ends: Int32s, page_size: int) -> PageLists:
    """`ends` [n]: tokens of the slot up to which each request reads, counted from position 0; beyond first_columns."""
    counts = -(-ends // page_size) - first_columns
    return PageLists(
        slots=slots,
        first_columns=first_columns,
        kv_indptr=indptr_of(counts),
        kv_lens=ends - first_columns * page_size,
        last_page_lens=((ends - 1) % page_size + 1).astype(np.int32),
    )


def find_depths(first_rows: Int32s, num_rows: Int32s) -> NDArray[np.int64]:
    """Depth of each group in the nesting: how many earlier groups hold its rows. Sorted by column, as Step states."""
    inside = (first_rows[:, None] >= first_rows[None, :]) & (
        (first_rows + num_rows)[:, None] <= (first_rows + num_rows)[None, :]
    )
    earlier = np.tri(first_rows.size, k=-1, dtype=bool)
    depths: NDArray[np.int64] = (inside & earlier).sum(axis=1)
    return depths


def plan_levels(layout: StepLayout, page_size: int) -> list[QueryBatch]:
    """One batch per depth of Hydragen groups."""
    if not layout.group_first_rows.size:
        return []
    depths = find_depths(layout.group_first_rows, layout.group_num_rows)
    return [_plan_level(layout, np.flatnonzero(depths == depth), page_size) for depth in range(int(depths.max()) + 1)]


def find_own_starts(layout: StepLayout, page_size: int) -> Int32s:
    """[d]: how many of each decode row's first tokens its groups cover."""
    columns = np.zeros(layout.decode_slots.size, np.int32)
    for first, count, end in zip(
        layout.group_first_rows.tolist(),
        layout.group_num_rows.tolist(),
        (layout.group_first_columns + layout.group_num_columns).tolist(),
        strict=True,
    ):
        own = columns[first : first + count]
        np.maximum(own, end, out=own)
    return columns * np.int32(page_size)


def outermost(layout: StepLayout) -> StepLayout:
    """`layout` with the groups of depth 0 alone: what an inner group would share is then read row by row."""
    is_outer = find_depths(layout.group_first_rows, layout.group_num_rows) == 0
    return replace(layout, **{name: getattr(layout, name)[is_outer] for name in _GROUP_FIELDS})


def _plan_level(layout: StepLayout, chosen: NDArray[np.int64], page_size: int) -> QueryBatch:
    chosen = chosen[np.argsort(layout.group_first_rows[chosen], kind="stable")]
    first_rows, counts = layout.group_first_rows[chosen], layout.group_num_rows[chosen]
    columns = layout.group_first_columns[chosen]
    ends = (columns + layout.group_num_columns[chosen]) * page_size
    pages = list_pages(layout.decode_slots[first_rows], columns, ends.astype(np.int32), page_size)
    q_indptr = indptr_of(counts)
    is_contiguous = bool((first_rows[1:] == first_rows[:-1] + counts[:-1]).all())
    rows = None
    if not is_contiguous:
        rows = (np.repeat(first_rows - q_indptr[:-1], counts) + np.arange(q_indptr[-1])).astype(np.int32)
    return QueryBatch(q_indptr, pages, int(first_rows[0]), rows)


def cover_rows(level: QueryBatch, num_rows: int, num_requests: int) -> QueryBatch | None:
    """`level` as exactly `num_requests` requests over rows 0..num_rows-1, without keys where it has none.

    None if that takes more requests.
    """
    begins = level.q_indptr[:-1]
    firsts = level.first_row + begins if level.rows is None else level.rows[begins]
    ends = firsts + np.diff(level.q_indptr)
    # Each group is followed by the gap to the next one, an empty one where they touch; a gap comes first, too.
    bounds = np.concatenate((np.stack((firsts, ends), axis=1).reshape(-1), [num_rows]))
    padding = num_requests + 1 - (bounds.size + 1)
    if padding < 0:
        return None
    q_indptr = np.concatenate(([0], bounds, np.full(padding, num_rows))).astype(np.int32)
    pages = level.pages
    is_group = np.zeros(num_requests, bool)
    is_group[1 : 2 * pages.slots.size : 2] = True

    def spread(values: Int32s, empty: int) -> Int32s:
        result = np.full(num_requests, empty, np.int32)
        result[is_group] = values
        return result

    covered = PageLists(
        slots=spread(pages.slots, 0),
        first_columns=spread(pages.first_columns, 0),
        kv_indptr=indptr_of(spread(np.diff(pages.kv_indptr).astype(np.int32), 0)),
        kv_lens=spread(pages.kv_lens, 0),
        last_page_lens=spread(pages.last_page_lens, 1),
    )
    return QueryBatch(q_indptr, covered, 0, None)


def plan_prefill(layout: StepLayout, page_size: int) -> QueryBatch:
    """The chunks, each over its slot's pages up to its own end."""
    ends = (layout.prefill_starts + layout.prefill_lengths).astype(np.int32)
    pages = list_pages(layout.prefill_slots, np.zeros(ends.size, np.int32), ends, page_size)
    return QueryBatch(indptr_of(layout.prefill_lengths), pages, layout.decode_slots.size, None)


def rows_of(layout: StepLayout) -> tuple[Int32s, Int32s]:
    """Slot and position of each of the step's T rows."""
    lengths = layout.prefill_lengths
    if not lengths.size:
        return layout.decode_slots, layout.decode_positions
    within = np.arange(int(lengths.sum()), dtype=np.int32) - np.repeat(indptr_of(lengths)[:-1], lengths)
    positions = np.concatenate((layout.decode_positions, np.repeat(layout.prefill_starts, lengths) + within))
    slots = np.concatenate((layout.decode_slots, np.repeat(layout.prefill_slots, lengths)))
    return slots.astype(np.int32), positions.astype(np.int32)
