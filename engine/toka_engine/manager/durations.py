"""Durations in the lives of streams: queue, prefill, decode, and between tokens.

Owns: the stamps of running streams, by slot. Costs are per stream and per step, never per token.
"""

from __future__ import annotations

import numpy as np

from toka_engine.histogram import Histogram
from toka_engine.messages import Durations, Int32s


class StreamTimes:
    """Stamps and histograms. Queue and prefill count with the first token: a stream that was preempted behind it has no
    stamps.
    """

    def __init__(self, num_slots: int) -> None:
        self._submitted_s = np.full(num_slots, np.nan)
        self._started_s = np.full(num_slots, np.nan)
        self._first_token_s = np.full(num_slots, np.nan)
        self._last_token_s = np.full(num_slots, np.nan)
        self._queue = Histogram()
        self._prefill = Histogram()
        self._first_token = Histogram()
        self._decode = Histogram()
        self._between_tokens = Histogram()

    def note_start(self, slots: list[int], submitted_s: float, now: float, *, is_again: bool) -> None:
        """Note that streams have taken `slots`; `is_again`: they had tokens before a preemption."""
        self._first_token_s[slots] = np.nan
        self._submitted_s[slots] = np.nan if is_again else submitted_s
        self._started_s[slots] = np.nan if is_again else now

    def note_tokens(self, slots: Int32s, num_decoded: int, now: float, *, may_differ: bool) -> None:
        """Note a step's tokens: the streams of the first `num_decoded` of `slots` had some before, all in the same step
        unless they `may_differ`, but for those that sat it out while pages were short.
        """
        if num_decoded and not may_differ:
            self._between_tokens.add(now - self._last_token_s.item(slots.item(0)), num_decoded)
        elif num_decoded:
            before_s = self._last_token_s[slots[:num_decoded]]
            if (before_s == before_s[0]).all():
                self._between_tokens.add(now - before_s.item(0), num_decoded)
            else:
                for each_s, count in zip(*np.unique(before_s, return_counts=True), strict=True):
                    self._between_tokens.add(now - float(each_s), int(count))
        self._last_token_s[slots] = now
        if num_decoded < slots.size:
            first = slots[num_decoded:]
            self._queue.add_all(self._started_s[first] - self._submitted_s[first])
            self._prefill.add_all(now - self._started_s[first])
            self._first_token.add_all(now - self._submitted_s[first])
            self._first_token_s[first] = np.where(np.isnan(self._started_s[first]), np.nan, now)

    def note_ends(self, slots: Int32s, now: float) -> None:
        """Note that the streams of `slots` have ended."""
        self._decode.add_all(now - self._first_token_s[slots])

    def report(self) -> Durations:
        """Return what has been counted so far."""
        return Durations(
            queue=self._queue.report(),
            prefill=self._prefill.report(),
            first_token=self._first_token.report(),
            decode=self._decode.report(),
            between_tokens=self._between_tokens.report(),
        )
