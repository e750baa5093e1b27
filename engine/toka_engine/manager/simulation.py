"""How many KV pages will be in use at most, if streams run to their predicted ends. Pure.

Time is counted in decode steps from now. Pages are only given back when streams end, so use peaks just before an end, and
only those moments are looked at. A page that several streams hold goes with the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toka_engine.messages import Int32s, Int64s


@dataclass(frozen=True, slots=True)
class Load:
    """Streams and the pages that they hold now."""

    lengths: Int32s  # [n] tokens whose KV is or will be written before time 0
    num_held: Int32s  # [n] pages that the stream holds now, shared ones too
    remaining: Int32s  # [n] steps until it ends; at time t < remaining it grows by one token
    releases: Int32s  # [k] for pages held now: the time of the last holder's end
    weights: Int32s  # [k] how many pages each entry of `releases` stands for

    def joined(self, other: Load) -> Load:
        return Load(
            np.concatenate((self.lengths, other.lengths)),
            np.concatenate((self.num_held, other.num_held)),
            np.concatenate((self.remaining, other.remaining)),
            np.concatenate((self.releases, other.releases)),
            np.concatenate((self.weights, other.weights)),
        )

    def holding(self, releases: Int32s, weights: Int32s) -> Load:
        """Return the same load with more pages held."""
        return Load(
            self.lengths,
            self.num_held,
            self.remaining,
            np.concatenate((self.releases, releases)),
            np.concatenate((self.weights, weights)),
        )


def bound_pages(load: Load, page_size: int) -> int:
    """Return a quick upper bound of `peak_pages`: nobody gives anything back before all have their last page."""
    last = -(-(load.lengths + load.remaining) // page_size)
    return int(load.weights.sum() + (last - load.num_held).sum())


def peak_pages(load: Load, page_size: int) -> int:
    """Return the largest number of pages in use at any time from now on.

    At time t a stream with remaining >= t needs ceil((length + t) / page_size) pages. With length = page_size * q + m
    and t = page_size * u + v that is q + u + ceil((m + v) / page_size), so sums over streams need only counts by m.
    """
    if load.lengths.size == 0:
        return int(load.weights.sum())
    order = np.argsort(-load.remaining, kind="stable")
    remaining = load.remaining[order]
    whole, rest = np.divmod(load.lengths[order], page_size)
    num_streams = order.size
    counts = np.zeros((num_streams + 1, page_size), np.int32)  # of the first k streams, by m
    counts[np.arange(1, num_streams + 1), rest] = 1
    np.cumsum(counts, axis=0, out=counts)
    grown = _running_sum(whole - load.num_held[order])

    times = np.unique(np.append(remaining, np.int32(0)))
    alive = num_streams - np.searchsorted(remaining[::-1], times, side="left")
    turns, within = np.divmod(times, page_size)
    residues = np.arange(page_size)
    extra = -(-(residues[:, None] + residues[None, :]) // page_size)  # [v, m]
    growth = grown[alive] + alive * turns + (counts[alive] * extra[within]).sum(axis=1)

    by_release = np.argsort(-load.releases, kind="stable")
    held = _running_sum(load.weights[by_release])
    num_left = load.releases.size - np.searchsorted(load.releases[by_release][::-1], times, side="left")
    return int((growth + held[num_left]).max())


def _running_sum(values: Int32s) -> Int64s:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)))
