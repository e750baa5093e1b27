"""Which leading columns of sequences' block tables are shared with others. Pure.

Sharing is always of a prefix: two sequences that hold the same page hold the same pages before it. So along
the columns of one sequence reference counts never rise, and equality of two sequences' pages never comes back
once lost; both can be found by bisection, vectorised over rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toka_engine.messages import Int32s

_FEW_PAGES = 8192
"""Up to here looking at every page takes less time than the calls of a bisection."""


def count_shared_columns(table: NDArray[np.int32], rows: Int32s, num_columns: Int32s, refs: Int32s) -> Int32s:
    """Return for each of `rows` of `table` how many of its first `num_columns` pages have several holders."""
    shared = np.zeros(rows.size, np.int32)
    places = np.flatnonzero(num_columns > 0)
    places = places[refs[table[rows[places], 0]] > 1]
    if places.size == 0:
        return shared
    most = int(num_columns[places].max())
    if places.size * most <= _FEW_PAGES:
        is_shared = refs[table[rows[places], :most]] > 1
        shared[places] = (is_shared & (np.arange(most) < num_columns[places, None])).sum(axis=1)
        return shared
    low, high = np.ones(places.size, np.int32), num_columns[places].astype(np.int32)  # low columns are shared
    while (is_open := low < high).any():
        middle = (low + high + 1) // 2
        is_shared = refs[table[rows[places], middle - 1]] > 1
        low = np.where(is_open & is_shared, middle, low)
        high = np.where(is_open & ~is_shared, middle - 1, high)
    shared[places] = low
    return shared


def recount_shared_columns(
    table: NDArray[np.int32], rows: Int32s, num_columns: Int32s, refs: Int32s, guesses: Int32s
) -> Int32s:
    """Count shared columns again: two looks at each of the rows that still share `guesses[i]` columns suffice."""
    shared = np.minimum(guesses, num_columns)
    is_right = (shared == 0) | (refs[table[rows, np.maximum(shared, 1) - 1]] > 1)
    is_right &= (shared == num_columns) | (refs[table[rows, np.minimum(shared, table.shape[1] - 1)]] <= 1)
    wrong = np.flatnonzero(~is_right)
    if wrong.size:
        shared[wrong] = count_shared_columns(table, rows[wrong], num_columns[wrong], refs)
    return shared


def count_common_columns(table: NDArray[np.int32], rows: Int32s, first: int, most: int) -> int:
    """Return the largest `end` <= most such that all `rows` hold the same pages up to it; `first` < end is
    known."""
    low, high = first + 1, most
    while low < high:
        middle = (low + high + 1) // 2
        column = table[rows, middle - 1]
        if (column == column[0]).all():
            low = middle
        else:
            high = middle - 1
    return low
