"""Measures how long the model had work. Pure: the loop reports when tokens came."""

from __future__ import annotations


class BusyTime:
    """Sums the time in which at least one step was under way: a moment that several steps share counts once."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._last_end_s = float("-inf")

    def add_step(self, end_s: float, wall_s: float) -> None:
        """A step ended at `end_s`, `wall_s` after its launch. Steps end in order."""
        self.total_s += min(wall_s, end_s - self._last_end_s)
        self._last_end_s = end_s
