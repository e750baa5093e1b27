"""Learns from the steps that have come back how long one takes: a constant, and so much for each row and token. Pure.

The five costs are fitted by least squares; a step counts half as much as one that came `_HALF_LIFE` steps later. A cost
that comes out below zero is zero: rows and their contexts often grow together, and then the fit cannot tell them apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_HALF_LIFE = 200
_DECAY = 0.5 ** (1 / _HALF_LIFE)
_MIN_STEPS = 16
"""Before so many steps nothing is predicted."""
_MIN_TRUSTED = 64
"""Up to so many steps the costs are fitted anew with each."""
_FIT_INTERVAL = 8
_LOOK_INTERVAL = 8
"""One in so many steps is noted where nothing is decided by their times: noting costs time;"""
_LOOK_INTERVAL_MIXED = 2
"""one in so many with chunks, where streams have a target."""
_MAX_SURPRISE = 10.0
"""A step counts as this many times its prediction at most: one that the machine held up says little of the others."""
_SCALES = (1.0, 32.0, 16_384.0, 128.0, 1_048_576.0)
"""Usual sizes, so that all costs are alike in size where they are fitted."""
_RIDGE = 1e-5
"""Keeps the fit solvable where a size has not changed."""

_DOUBT = 0.01
"""Chunks of short prompts have contexts in proportion to their tokens: then the time is the tokens'."""

_UPPER = np.triu_indices(len(_SCALES))
_PLACES = np.zeros((len(_SCALES), len(_SCALES)), np.intp)
_PLACES[_UPPER] = np.arange(_UPPER[0].size)
_PLACES = np.maximum(_PLACES, _PLACES.T)
"""Places in a list of the numbers on a symmetric matrix's diagonal and above, row by row."""

_NUM_KEPT = 256
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class StepSize:
    """The work of a step."""

    num_rows: int
    """Decode rows."""
    num_context: int
    """Tokens in the contexts of those."""
    num_prefill: int
    """Tokens of chunks."""
    num_chunk_context: int = 0
    """The tokens before each of those in its prompt, added up: attention reads them all."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step as such, and of each unit of its size."""

    step_s: float
    row_s: float
    context_s: float
    prefill_s: float
    chunk_context_s: float = 0.0

    def predict_s(self, size: StepSize) -> float:
        return (
            self.step_s
            + self.row_s * size.num_rows
            + self.context_s * size.num_context
            + self.prefill_s * size.num_prefill
            + self.chunk_context_s * size.num_chunk_context
        )


class StepTimes:
    """The steps seen so far, as sums."""

    def __init__(self) -> None:
        self.costs: StepCosts | None = None
        """None: too few steps have come back."""
        self.mean_prefill = 0.0
        """Tokens of chunks in a step, over the last ones."""
        self._squares = [0.0] * _UPPER[0].size
        self._products = [0.0] * len(_SCALES)
        self._weight = 0.0
        self._num_steps = 0
        self._num_mixed = 0

    def begin_with(self, sizes: Sequence[StepSize], seconds: Sequence[float]) -> None:
        """Begin with steps that were measured before the first request, which count as the first `_MIN_STEPS`."""
        for turn in range(_MIN_STEPS if sizes else 0):
            self.note(sizes[turn % len(sizes)], seconds[turn % len(sizes)])
        self.mean_prefill = 0.0  # theirs says nothing of prompts to come

    def wants(self, number: int) -> bool:
        """Return whether step `number` is to be noted though nothing is decided by its time."""
        return self._num_steps < _MIN_TRUSTED or number % _LOOK_INTERVAL == 0

    def wants_mixed(self) -> bool:
        """Return whether a step is to be noted whose chunks have been cut so that it keeps to a target."""
        self._num_mixed += 1  # by a count of their own: prompts may come in time with the steps
        return self._num_mixed % _LOOK_INTERVAL_MIXED == 0

    def note(self, size: StepSize, seconds: float) -> None:
        """Note that a step has taken `seconds`."""
        if self.costs is not None:
            seconds = min(seconds, _MAX_SURPRISE * self.costs.predict_s(size))
        self.mean_prefill += (size.num_prefill - self.mean_prefill) * _SMOOTHING
        rows, context = size.num_rows / _SCALES[1], size.num_context / _SCALES[2]
        prefill, before = size.num_prefill / _SCALES[3], size.num_chunk_context / _SCALES[4]
        # So few numbers are faster without NumPy.
        sizes = (1.0, rows, context, prefill, before)
        squares = (
            *sizes,
            *(rows * rows, rows * context, rows * prefill, rows * before),
            *(context * context, context * prefill, context * before),
            *(prefill * prefill, prefill * before, before * before),
        )
        self._squares = [_DECAY * total + new for total, new in zip(self._squares, squares, strict=True)]
        self._products = [_DECAY * total + seconds * new for total, new in zip(self._products, sizes, strict=True)]
        self._weight = _DECAY * self._weight + 1.0
        self._num_steps += 1
        if self._num_steps >= _MIN_STEPS and (self._num_steps < _MIN_TRUSTED or self._num_steps % _FIT_INTERVAL == 0):
            self.costs = self._fit()

    def _fit(self) -> StepCosts | None:
        """Return the costs, none below zero; None where steps have taken no time at all."""
        squares = np.asarray(self._squares)[_PLACES] / self._weight
        products = np.asarray(self._products) / self._weight
        squares[4, 4] *= 1.0 + _DOUBT
        squares.flat[:: len(_SCALES) + 1] += _RIDGE
        used = np.arange(len(_SCALES))
        while used.size:
            found = np.linalg.solve(squares[used[:, None], used], products[used])
            if found.min() >= 0.0:
                break
            used = np.delete(used, found.argmin())
        costs = np.zeros(len(_SCALES))
        if used.size:
            costs[used] = found
        if not costs.any():
            return None
        return StepCosts(*(costs / np.asarray(_SCALES)).tolist())


class OnlineSteps:
    """The times of steps with online streams, which are those that are not background work."""

    def __init__(self) -> None:
        self.seen_s = float("-inf")
        """The last moment at which there was an online stream."""
        self.prompt_step_s = 0.0
        """The usual length of a step with a chunk of an online prompt; 0 before the first."""
        self.long_step_s = 0.0
        """One step with online rows in `long_share` of `note` is longer; 0 before the first."""
        self._steps_s: deque[float] = deque(maxlen=_NUM_KEPT)
        self._num_steps = 0

    def note(self, size: StepSize, costs: StepCosts | None, now: float, long_share: int) -> None:
        """Note the online part of a step that has one; one step in `long_share` is taken to be a long one."""
        self.seen_s = now
        if costs is None:
            return
        seconds = costs.predict_s(size)
        if size.num_prefill:
            self.prompt_step_s += (seconds - self.prompt_step_s) * (_SMOOTHING if self.prompt_step_s else 1.0)
        if size.num_rows:
            self._steps_s.append(seconds)
            self._num_steps += 1
            if self._num_steps % _FIT_INTERVAL == 1:
                longest = sorted(self._steps_s)
                self.long_step_s = longest[len(longest) - 1 - len(longest) // long_share]
