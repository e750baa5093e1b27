"""Predicts how long outputs get, from the share of their limit that finished ones reached.

A ring of the last finished fractions; a running stream that has reached fraction f is expected to end at the
mean of those fractions that are beyond f. After a preemption (the prediction was too low) predictions move
towards the limit, and back slowly with each finish, so that a storm of preemptions dies out. Pure.
"""

from __future__ import annotations

import numpy as np

from toka_engine.messages import Int32s

_RING = 1024
_MIN_FINISHED = 16
"""Fewer finished streams predict nothing: each is taken to reach its limit."""
_ROUNDING = 1e-6
_CAUTION_STEP = 0.25
_CAUTION_DECAY = 0.99


class StopPredictor:
    """Predicted totals only over-commit; preemption makes any prediction safe."""

    def __init__(self, is_enabled: bool) -> None:
        self._is_enabled = is_enabled
        self._ring = np.zeros(_RING, np.float64)
        self._num_seen = 0
        self._sorted: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
        self._means = self._ring
        self.caution = 0.0
        """0: predictions are used as they are; 1: every stream is taken to reach its limit."""

    def finished(self, num_tokens: Int32s, limits: Int32s) -> None:
        """Learn from streams that ended after `num_tokens` of `limits`."""
        if not self._is_enabled:
            return
        places = (self._num_seen + np.arange(num_tokens.size)) % _RING
        self._ring[places] = num_tokens / limits
        self._num_seen += num_tokens.size
        self._sorted = None
        self.caution *= _CAUTION_DECAY**num_tokens.size

    def preempted(self) -> None:
        self.caution = min(1.0, self.caution + _CAUTION_STEP)

    def predict_remaining(self, num_planned: Int32s, limits: Int32s) -> Int32s:
        """Return how many tokens each stream will still plan: at least 1, at most what its limit leaves."""
        left = limits - num_planned
        if not self._is_enabled or self._num_seen < _MIN_FINISHED:
            return left.astype(np.int32)
        if self._sorted is None:
            self._sorted = np.sort(self._ring[: min(self._num_seen, _RING)])
            counts = np.arange(self._sorted.size, 0, -1)
            self._means = np.append(np.cumsum(self._sorted[::-1])[::-1] / counts, 1.0)
        beyond = np.searchsorted(self._sorted, num_planned / np.maximum(limits, 1), side="right")
        predicted = np.ceil(self._means[beyond] * limits - _ROUNDING) - num_planned
        predicted = predicted + self.caution * (left - predicted)
        remaining: Int32s = np.minimum(np.maximum(np.ceil(predicted), 1), left).astype(np.int32)
        return remaining
