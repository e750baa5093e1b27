"""Histograms of durations, cheap enough for every token, in a form that travels between processes. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left

import msgspec
import numpy as np
from numpy.typing import NDArray

BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
    0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0,
)  # fmt: skip
"""The upper bounds of the buckets; one more bucket has what is longer."""


class Buckets(msgspec.Struct, frozen=True, array_like=True):
    """A histogram at one moment."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    """The number in each bucket alone."""
    sum_s: float = 0.0


class Histogram:
    """Counts durations by bucket."""

    __slots__ = ("_counts", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a duration, as often as `count` says."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += count
        self._sum_s += seconds * count

    def add_all(self, seconds: NDArray[np.float64]) -> None:
        """Count durations, without those that are NaN."""
        for each in seconds.tolist():
            if not math.isnan(each):
                self.add(each)

    def report(self) -> Buckets:
        """Return what has been counted so far."""
        return Buckets(tuple(self._counts), self._sum_s)


def add_up(all_buckets: list[Buckets]) -> Buckets:
    """Return the histogram of all."""
    if not all_buckets:
        return Buckets()
    counts = tuple(map(sum, zip(*(each.counts for each in all_buckets), strict=True)))
    return Buckets(counts, sum(each.sum_s for each in all_buckets))
