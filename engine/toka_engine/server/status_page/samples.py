"""The load of the last ten minutes, as samples at even times in a ring."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from toka_engine.server.replicas import Replicas

SAMPLE_S = 5.0
NUM_SAMPLES = 121
"""Ten minutes, both ends included."""


class Sample(msgspec.Struct, frozen=True):
    """The load at one moment, over all replicas."""

    at_s: float
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Series(msgspec.Struct, frozen=True):
    """A quantity over the last ten minutes: one value for each sample, the oldest first."""

    ages_s: Sequence[float]
    values: Sequence[float]

    @property
    def latest(self) -> float:
        return self.values[-1] if self.values else 0.0


class LoadSamples:
    """The ring. It holds NUM_SAMPLES, however long the process lives."""

    def __init__(self, replicas: Replicas, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas = replicas
        self._clock = clock
        self._ring: deque[Sample] = deque(maxlen=NUM_SAMPLES)

    def __len__(self) -> int:
        return len(self._ring)

    async def run(self) -> None:
        """Take a sample every SAMPLE_S, for as long as the process lives."""
        while True:
            self.take()
            await asyncio.sleep(SAMPLE_S)

    def take(self) -> None:
        self._ring.append(self.read())

    def read(self) -> Sample:
        """Return the load now, of replicas that have said something. Totals hold those of lost replicas, too."""
        stats = [one.stats for one in self._replicas.all if one.stats is not None]
        live = [one.stats for one in self._replicas.live if one.stats is not None]
        return Sample(
            self._clock(),
            sum(one.running for one in live),
            sum(one.waiting for one in live),
            sum(one.kv_pages_used for one in live),
            sum(one.kv_pages_total for one in live),
            sum(one.prompt_tokens_total for one in stats),
            sum(one.output_tokens_total for one in stats),
        )

    def level(self, value_of: Callable[[Sample], float]) -> Series:
        """Return a quantity as it was at each sample."""
        now = self._clock()
        return Series([now - one.at_s for one in self._ring], [value_of(one) for one in self._ring])

    def rate(self, total_of: Callable[[Sample], float]) -> Series:
        """Return how fast a total grew up to each sample, in units a second."""
        now = self._clock()
        ages: list[float] = []
        values: list[float] = []
        ring = list(self._ring)
        for before, after in itertools.pairwise(ring):
            ages.append(now - after.at_s)
            values.append(max(0.0, total_of(after) - total_of(before)) / max(after.at_s - before.at_s, 1e-3))
        return Series(ages, values)
