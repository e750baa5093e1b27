"""Short functions of arrays that numpy lacks or runs more slowly. Pure."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from toka_engine.messages import Int32s

Number = TypeVar("Number", bound=np.generic)


def resident_zeros(shape: int | tuple[int, ...], dtype: type[Number]) -> NDArray[Number]:
    """Return zeros whose memory is resident at once; that of np.zeros is taken when it is first written."""
    return np.full(shape, 0, dtype)


def find_run_starts(values: Int32s) -> NDArray[np.intp]:
    """Return where runs of equal values begin."""
    is_start = np.ones(values.size, np.bool_)
    np.not_equal(values[1:], values[:-1], out=is_start[1:])
    return np.flatnonzero(is_start)


def distinct(values: Int32s) -> Int32s:
    """Return the distinct values, sorted. Up to some thousands a sort takes half the time of np.unique."""
    ordered = np.sort(values)
    return ordered[find_run_starts(ordered)]
