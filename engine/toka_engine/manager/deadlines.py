"""Predicts when a new request would start, from the rate at which waiting ones did. Pure.

The rate holds whatever makes requests wait: slots, pages, prefill, preemptions. Only starts that left others waiting
count, over the time in which something waited, so that an idle hour or a short burst says nothing about it.
"""

from __future__ import annotations

from collections import deque

_WINDOW = 64
_MIN_STARTS = 8
"""Before so many choices have started nothing is predicted: no request is refused on a guess."""


class StartRate:
    """The last moments at which waiting choices started. Times are `Queue.busy_s`."""

    def __init__(self) -> None:
        self._starts: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def note(self, busy_s: float, num_choices: int) -> None:
        """Note that choices have started while others went on waiting."""
        self._starts.append((busy_s, num_choices))

    def predict_wait_s(self, busy_s: float, num_ahead: int) -> float:
        """Return how long a choice waits that `num_ahead` go before; 0 where that is unknown."""
        if not num_ahead or not self._starts:
            return 0.0
        first_s, num_first = self._starts[0]
        num_started = sum(count for _, count in self._starts) - num_first
        if num_started < _MIN_STARTS:
            return 0.0
        return (num_ahead + 1) * (busy_s - first_s) / num_started
