"""Simulates the KV pages in use while streams run to their predicted ends. Pure.

Time is counted in decode steps from now. Pages are only given back when streams end, so use peaks just before
an end, and only those moments are looked at. A page that several streams hold goes with the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toka_engine.manager.arrays import distinct
from toka_engine.messages import Int32s, Int64s


@dataclass(frozen=True, slots=True)
class Load:
    """Streams and the pages that they hold now."""

    lengths: Int32s  # [n] tokens whose KV is or will be written before time 0
    num_held: Int32s  # [n] pages that the stream holds now, shared ones too
    num_alone: Int32s  # [n] those of them that nobody else holds
    remaining: Int32s  # [n] steps until it ends; at time t <= remaining its length has grown by t
    shared_ends: Int32s  # [k] for each page with several holders: when the last of them ends


@dataclass(frozen=True, slots=True)
class Arrival:
    """Equal streams that would start now from one prompt."""

    length: int
    """Tokens of the prompt."""
    remaining: int
    num_new: int
    """Pages of the prompt that nobody holds yet (also those that the prefix tree alone holds)."""
    held_ends: Int32s
    """For each page of the prompt that running streams hold: when the last of them ends."""


class Forecast:
    """Pages in use at each moment that matters; streams are added one after the other."""

    def __init__(self, load: Load, more_ends: Int32s, page_size: int) -> None:
        """`more_ends`: the `remaining` of every arrival that will be asked about.

        At time t a stream with remaining >= t needs ceil((length + t) / page_size) pages. With length =
        page_size * q + m and t = page_size * u + v that is q + u + ceil((m + v) / page_size): sums need only
        counts by m.
        """
        self._page_size = page_size
        zero = np.zeros(1, np.int32)
        self.times = distinct(np.concatenate((load.remaining, load.shared_ends, more_ends, zero)))
        num_times = self.times.size
        ends = np.searchsorted(self.times, load.remaining)
        whole, rest = np.divmod(load.lengths, page_size)
        by_rest = np.bincount(ends * page_size + rest, minlength=num_times * page_size)
        counts = _alive(by_rest.reshape(num_times, page_size))
        fixed = _alive(np.bincount(ends, weights=whole - load.num_held + load.num_alone, minlength=num_times))
        shared = _alive(np.bincount(np.searchsorted(self.times, load.shared_ends), minlength=num_times))
        self._turns, self._within = np.divmod(self.times, page_size)
        residues = np.arange(page_size)
        extra = -(-(residues[:, None] + residues[None, :]) // page_size)  # [v, m]
        grown = (counts * extra[self._within]).sum(axis=1) + counts.sum(axis=1) * self._turns
        self.usage: Int64s = (fixed + shared + grown).astype(np.int64)
        """[times] pages in use."""

    @property
    def peak(self) -> int:
        return int(self.usage.max())

    def add_fitting(self, arrival: Arrival, num_streams: int, num_pages: int) -> int:
        """Add as many of `num_streams` streams of `arrival` as fit into `num_pages` at all times; return how
        many."""
        num_alive = int(np.searchsorted(self.times, arrival.remaining, side="right"))
        times, usage = self.times[:num_alive], self.usage[:num_alive]
        total = -(-(arrival.length + times) // self._page_size)
        first = total + (arrival.num_new - -(-arrival.length // self._page_size))
        if arrival.held_ends.size:  # held on after their present holders' ends
            first += np.searchsorted(np.sort(arrival.held_ends), times, side="left")
        room = num_pages - usage - first
        if int(room.min()) < 0 or (self.usage[num_alive:] > num_pages).any():
            return 0
        # A stream that ends with its first token takes no page for it.
        if num_streams > 1 and arrival.remaining > 0:
            other = total - arrival.length // self._page_size
            is_growing = other > 0
            if is_growing.any():
                num_streams = min(num_streams, 1 + int((room[is_growing] // other[is_growing]).min()))
            first += (num_streams - 1) * other
        usage += first
        return num_streams


def _alive(at_end: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Int64s:
    """From what ends at each time to what is there until it."""
    return np.cumsum(at_end[::-1], axis=0)[::-1].astype(np.int64)
