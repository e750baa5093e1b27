"""A keyed work queue: each key is worked on by one thread at a time, and waits once however often it is
added.

Owns: delays, backoff with jitter, and the count of failures of each key. Knows nothing of what a key means.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BACKOFF_FIRST_S = 0.2
BACKOFF_LAST_S = 30.0
TIMED_APART_S = 1.0
"""Time alone calls for no more passes of a key than one in so long, whatever a pass asks for."""


class WorkQueue(Generic[K]):
    """Thread-safe. A key added while it is worked on is worked on once more afterwards.

    Two lines that take turns, so that a thousand keys that came at once, in bulk, do not hold up the one that comes
    next; nor do they take all workers, because the work on each of them may be slow.
    """

    def __init__(self, max_bulk_workers: int) -> None:
        """At most `max_bulk_workers` keys that came in bulk are worked on at a time."""
        self._max_bulk_workers = max_bulk_workers
        self._changed = threading.Condition()
        self._ready: OrderedDict[K, float] = OrderedDict()
        self._bulk: OrderedDict[K, float] = OrderedDict()
        self._is_bulk_turn = False
        self._later: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._working: dict[K, bool] = {}
        """Keys that are worked on -> whether each came in bulk."""
        self._again: set[K] = set()
        self._failures: dict[K, int] = {}
        self._fired: OrderedDict[K, float] = OrderedDict()
        """Keys whose delay ended within `TIMED_APART_S` -> when."""
        self._sequence = 0
        self._is_closed = False

    def add(self, key: K, is_bulk: bool = False) -> None:
        """Asks for work on `key` as soon as possible; `is_bulk`: as one of many that may wait for others."""
        with self._changed:
            self._add(key, is_bulk)

    def add_after(self, key: K, delay_s: float) -> None:
        """Asks for work on `key` in `delay_s`, or earlier if that was asked for before."""
        with self._changed:
            self._add_at(key, time.monotonic() + delay_s)

    def add_timed(self, key: K, delay_s: float) -> None:
        """Add as `add_after` does, for a pass that nothing but time calls for: at most one a second, so that no mistake
        of a pass makes a loop that burns a core."""
        with self._changed:
            self._add_at(key, max(time.monotonic() + delay_s, self._fired.get(key, 0.0) + TIMED_APART_S))

    def get(self) -> K | None:
        """The next key, or None once the queue is closed. Call `done` or `retry` afterwards."""
        with self._changed:
            while not self._is_closed:
                self._move_due()
                if line := self._choose_line():
                    key, _ = line.popitem(last=False)
                    self._working[key] = line is self._bulk
                    return key
                self._changed.wait(self._later[0][0] - time.monotonic() if self._later else None)
            return None

    def done(self, key: K) -> None:
        """The work succeeded: its failures are forgotten."""
        with self._changed:
            self._failures.pop(key, None)
            self._finish(key)

    def retry(self, key: K, at_least_s: float = 0.0) -> float:
        """The work failed: `key` comes back after a backoff, whose seconds are returned."""
        with self._changed:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
            backoff = min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2.0 ** min(failures, 10))
            delay_s: float = max(at_least_s, backoff * random.uniform(0.75, 1.25))
            self._finish(key)
        self.add_after(key, delay_s)
        return delay_s

    def close(self) -> None:
        """Every `get` returns None from now on."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def measure(self) -> tuple[int, float]:
        """(keys waiting or worked on, seconds that the oldest waiting key has waited)."""
        with self._changed:
            now = time.monotonic()
            oldest = min((next(iter(line.values())) for line in (self._ready, self._bulk) if line), default=now)
            return len(self._ready) + len(self._bulk) + len(self._working), now - oldest

    def _add(self, key: K, is_bulk: bool = False) -> None:
        if self._is_closed or key in self._ready:
            return
        if key in self._working:
            self._again.add(key)
            return
        if is_bulk:
            self._bulk.setdefault(key, time.monotonic())
        else:
            self._bulk.pop(key, None)
            self._ready[key] = time.monotonic()
        self._changed.notify()

    def _add_at(self, key: K, due: float) -> None:
        if self._is_closed or self._due.get(key, float("inf")) <= due:
            return
        self._due[key] = due
        self._sequence += 1
        heapq.heappush(self._later, (due, self._sequence, key))
        self._changed.notify()

    def _choose_line(self) -> OrderedDict[K, float]:
        """The line to take the next key from; it is empty if there is nothing to do."""
        may_take_bulk = self._bulk and sum(self._working.values()) < self._max_bulk_workers
        if not may_take_bulk:
            return self._ready
        if not self._ready:
            return self._bulk
        line = self._bulk if self._is_bulk_turn else self._ready
        self._is_bulk_turn = not self._is_bulk_turn
        return line

    def _finish(self, key: K) -> None:
        if self._working.pop(key, False) and self._bulk:
            self._changed.notify()
        if key in self._again:
            self._again.discard(key)
            self._add(key)

    def _move_due(self) -> None:
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            due, _, key = heapq.heappop(self._later)
            if self._due.get(key) == due:
                del self._due[key]
                self._fired[key] = now
                self._fired.move_to_end(key)
                self._add(key)
        while self._fired and next(iter(self._fired.values())) + TIMED_APART_S < now:
            self._fired.popitem(last=False)
