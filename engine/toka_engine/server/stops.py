"""Finds stop strings in text that arrives in pieces.

Owns: one automaton per stop string (Knuth, Morris and Pratt, 1977: the longest prefix of the pattern that
ends here), so a character costs constant time however the text is cut. The stop string that completes first
wins, the longest among those that complete at the same character; so the result does not depend on the
pieces.
"""

from __future__ import annotations


class StopStrings:
    """The stop strings of one request, prepared once for all its choices."""

    __slots__ = ("_failures", "patterns")

    def __init__(self, patterns: tuple[str, ...]) -> None:
        """Prepare `patterns`, which must not be empty, nor any of them."""
        self.patterns = tuple(sorted(set(patterns), key=len, reverse=True))
        self._failures = tuple(_failure_table(pattern) for pattern in self.patterns)

    def scanner(self) -> StopScanner:
        return StopScanner(self.patterns, self._failures)


class StopScanner:
    """Scans one text, piece by piece."""

    __slots__ = ("_failures", "_num_seen", "_patterns", "_states")

    def __init__(self, patterns: tuple[str, ...], failures: tuple[list[int], ...]) -> None:
        self._patterns = patterns
        self._failures = failures
        self._states = [0] * len(patterns)
        self._num_seen = 0

    @property
    def num_held(self) -> int:
        """Return how many of the last characters may begin a stop string."""
        return max(self._states)

    def feed(self, piece: str) -> tuple[int, int] | None:
        """Return where in the whole text the stop string begins and ends that `piece` completes, if it does."""
        best: tuple[int, int] | None = None
        for row, pattern in enumerate(self._patterns):
            if not self._states[row] and pattern[0] not in piece:
                continue
            end = self._advance(row, piece)
            if end and (best is None or end < best[0]):
                best = (end, len(pattern))
        end = self._num_seen + best[0] if best else 0
        self._num_seen += len(piece)
        return (end - best[1], end) if best else None

    def skip(self, count: int) -> None:
        """Pass over as many characters, in which no stop string counts."""
        self._num_seen += count

    def _advance(self, row: int, piece: str) -> int:
        """Return how many characters of `piece` complete pattern `row`; 0: they do not."""
        pattern, failure, state = self._patterns[row], self._failures[row], self._states[row]
        for index, character in enumerate(piece):
            while state and pattern[state] != character:
                state = failure[state - 1]
            if pattern[state] == character:
                state += 1
            if state == len(pattern):
                return index + 1
        self._states[row] = state
        return 0


def _failure_table(pattern: str) -> list[int]:
    """Return, for each i, the length of the longest proper prefix of pattern[: i + 1] that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return table
