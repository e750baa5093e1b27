"""Knows since when prompts have waited for nothing but their turn. Pure."""

from __future__ import annotations

from collections.abc import Callable


class PromptTurns:
    """The time since which each step's prompt tokens have been used up."""

    def __init__(self) -> None:
        self._since_s = float("inf")

    def note(self, num_left: int, clock: Callable[[], float]) -> None:
        """Note a step that had room for `num_left` more prompt tokens."""
        if num_left > 0:
            self._since_s = float("inf")
        else:
            self._since_s = min(self._since_s, clock())

    def measure_wait_s(self, submitted_s: float, now: float) -> float:
        """Return how long a prompt that came at `submitted_s` has waited for its turn: not for pages or a slot."""
        return max(0.0, now - max(self._since_s, submitted_s))
