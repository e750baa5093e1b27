"""Groups a step's query rows into spans, and spans into padded buckets. numpy only.

A *span* is some consecutive rows of one slot that attend to the pages from `first_column` on. Padding costs work and
a bucket costs a few kernel calls; buckets are formed so that neither dominates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.attention_backend import AttentionShape, StepLayout

_BUCKET_COST_TOKENS = 512
"""Cost of one more bucket's kernel calls, in (query row, key) pairs of padding."""
_MAX_BUCKET_BYTES = 2 << 20
"""Bytes of keys and values gathered at once, so that they are read again from the CPU core's cache."""


@dataclass(frozen=True, slots=True)
class Spans:
    """All spans of a step, [num_spans] arrays."""

    slots: NDArray[np.int64]
    first_rows: NDArray[np.int64]  # of the step's T rows
    q_lens: NDArray[np.int64]
    first_columns: NDArray[np.int64]
    num_pages: NDArray[np.int64]
    starts: NDArray[np.int64]
    """Positions of the first query rows, counted from the first key of each span."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Spans computed together, padded to the same number of query rows and pages."""

    num_spans: int
    pages: torch.Tensor  # [num_spans * max_pages] int64
    mask: torch.Tensor  # [num_spans, 1, max_q * group, max_pages * page_size], 0 or -inf, the model's dtype
    q_rows: torch.Tensor  # [num_spans * max_q] int64 rows of the step; padding repeats a span's last row
    valid: torch.Tensor | None  # [n] int64: entries of q_rows that are no padding; None: all
    out_rows: torch.Tensor  # [n] int64 rows of the step
    covers_all_in_order: bool
    """Whether q_rows is 0, 1, 2, ... over the whole step, so that nothing needs to be gathered or scattered."""


def spans_of(layout: StepLayout, page_size: int) -> Spans:
    """Make one span per decode row, over its suffix, and one per chunk."""
    num_decode = layout.decode_slots.size
    lengths = layout.prefill_lengths.astype(np.int64)
    first_columns = np.zeros(num_decode + lengths.size, np.int64)
    for first, count, column, columns in zip(
        layout.group_first_rows,
        layout.group_num_rows,
        layout.group_first_columns,
        layout.group_num_columns,
        strict=True,
    ):
        first_columns[first : first + count] = column + columns  # sorted by level: the innermost stays
    begins = np.concatenate((layout.decode_positions, layout.prefill_starts)).astype(np.int64)
    q_lens = np.concatenate((np.ones(num_decode, np.int64), lengths))
    ends = begins + q_lens
    return Spans(
        slots=np.concatenate((layout.decode_slots, layout.prefill_slots)).astype(np.int64),
        first_rows=np.cumsum(q_lens) - q_lens,
        q_lens=q_lens,
        first_columns=first_columns,
        num_pages=-(-ends // page_size) - first_columns,
        starts=begins - first_columns * page_size,
    )


def make_buckets(spans: Spans, table: NDArray[np.int32], page_size: int, shape: AttentionShape) -> list[Bucket]:
    """Split the spans into buckets of similar q_len and number of pages."""
    order = np.lexsort((spans.first_rows, spans.num_pages, spans.q_lens))
    bytes_per_page = 2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize * page_size
    max_pages = max(1, _MAX_BUCKET_BYTES // bytes_per_page)
    cuts = _cut(spans.q_lens[order], spans.num_pages[order], page_size, max_pages)
    num_rows = int(spans.q_lens.sum())
    return [
        _make_bucket(np.sort(order[begin:end]), spans, table, page_size, shape, num_rows)
        for begin, end in itertools.pairwise(cuts)
    ]


def _cut(q_lens: NDArray[np.int64], num_pages: NDArray[np.int64], page_size: int, max_pages: int) -> list[int]:
    """Return the boundaries of buckets in the sorted spans; walks the distinct sizes, not the spans."""
    count = q_lens.size
    if not count:
        return [0]
    changes = np.flatnonzero((np.diff(q_lens) != 0) | (np.diff(num_pages) != 0)) + 1
    edges = [0, *changes.tolist(), count]
    cuts, begin, waste = [0], 0, 0
    for index in range(1, len(edges) - 1):
        at, end = edges[index], edges[index + 1]
        before = at - begin
        grown_q = before * int(q_lens[at] * num_pages[at] - q_lens[at - 1] * num_pages[at - 1])
        waste += grown_q * page_size
        too_many = (end - begin) * int(num_pages[at]) > max_pages
        if (
            waste > _BUCKET_COST_TOKENS
            or q_lens[at] > 2 * q_lens[begin]
            or num_pages[at] < num_pages[at - 1]
            or too_many
        ):
            cuts.append(at)
            begin, waste = at, 0
    cuts.append(count)
    return _split_large(cuts, num_pages, max_pages)


def _split_large(cuts: list[int], num_pages: NDArray[np.int64], max_pages: int) -> list[int]:
    """Split buckets of equal spans that gather more than `max_pages` pages."""
    result = [0]
    for begin, end in itertools.pairwise(cuts):
        size = max(1, max_pages // int(num_pages[end - 1]))
        result.extend(range(begin + size, end, size))
        result.append(end)
    return result


def _make_bucket(
    chosen: NDArray[np.int64],
    spans: Spans,
    table: NDArray[np.int32],
    page_size: int,
    shape: AttentionShape,
    num_rows: int,
) -> Bucket:
    q_lens, num_pages = spans.q_lens[chosen], spans.num_pages[chosen]
    max_q, max_pages = int(q_lens.max()), int(num_pages.max())
    # Padding repeats a page or row of the same span, never another sequence's.
    page_index = np.minimum(np.arange(max_pages), num_pages[:, None] - 1) + spans.first_columns[chosen][:, None]
    pages = table[spans.slots[chosen][:, None], page_index].astype(np.int64)
    within = np.minimum(np.arange(max_q), q_lens[:, None] - 1)
    q_rows = (spans.first_rows[chosen][:, None] + within).reshape(-1)
    last_keys = spans.starts[chosen][:, None] + within  # [spans, max_q]
    is_hidden = np.arange(max_pages * page_size)[None, None, :] > last_keys[:, :, None]
    hidden = torch.from_numpy(is_hidden)
    mask = torch.zeros(hidden.shape, dtype=shape.dtype).masked_fill_(hidden, float("-inf"))
    group = shape.num_heads // shape.num_kv_heads
    mask = mask.repeat_interleave(group, dim=1) if max_q > 1 else mask
    is_valid = (np.arange(max_q) < q_lens[:, None]).reshape(-1)
    valid = None if is_valid.all() else np.flatnonzero(is_valid)
    out_rows = q_rows if valid is None else q_rows[valid]
    return Bucket(
        num_spans=chosen.size,
        pages=torch.from_numpy(pages.reshape(-1)),
        mask=mask.unsqueeze(1),
        q_rows=torch.from_numpy(q_rows),
        valid=None if valid is None else torch.from_numpy(valid),
        out_rows=torch.from_numpy(out_rows),
        covers_all_in_order=bool(q_rows.size == num_rows and (q_rows == np.arange(num_rows)).all()),
    )
