"""The queue of choices that wait to be admitted: who is next, how many there are, whether anything has changed.

The only writer of its entries and counters. It decides nothing: `admission` takes out whom it starts.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

from toka_engine.manager.requests import Waiting


class Queue:
    """Entries in order, the first one being next: by priority, then by arrival. An entry is the choices of one request
    that wait together.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._by_priority: dict[int, OrderedDict[int, Waiting]] = {}  # in order of priority; by id(entry)
        self._num_by_priority: Counter[int] = Counter()  # choices
        self._num_choices = 0
        self._busy_s = 0.0
        self._filled_s = 0.0  # when it was last empty
        self._num_arrivals = 0
        self._has_news = True

    @property
    def entries(self) -> Iterator[Waiting]:
        return chain.from_iterable(entries.values() for entries in self._by_priority.values())

    @property
    def head(self) -> Waiting | None:
        """The entry that is next."""
        return next(self.entries, None)

    @property
    def num_choices(self) -> int:
        """Choices of all entries."""
        return self._num_choices

    @property
    def busy_s(self) -> float:
        """Seconds in which an entry has waited, all in all."""
        return self._busy_s + (self.clock() - self._filled_s if self._by_priority else 0.0)

    @property
    def oldest_background(self) -> Waiting | None:
        """The background entry that came first, of those that are not about to start."""
        oldest = None
        for entries in self._by_priority.values():
            entry = next((entry for entry in entries.values() if entry.prefill is None), None)
            if entry is None or not entry.request.is_background:
                continue
            if oldest is None or entry.request.arrival < oldest.request.arrival:
                oldest = entry
        return oldest

    def count_ahead(self, priority: int) -> int:
        """Return the choices that start before a new request of `priority`."""
        return sum(count for ahead, count in self._num_by_priority.items() if ahead <= priority)

    @property
    def has_news(self) -> bool:
        """Something has changed since `settle` that may let an entry in."""
        return self._has_news

    def __bool__(self) -> bool:
        return bool(self._by_priority)

    def __len__(self) -> int:
        return sum(map(len, self._by_priority.values()))

    def __contains__(self, entry: Waiting) -> bool:
        return id(entry) in self._by_priority.get(entry.request.priority, ())

    def count_arrival(self) -> int:
        """Return the number of a request that has arrived: one more than the last one's."""
        self._num_arrivals += 1
        return self._num_arrivals - 1

    def add(self, entry: Waiting, *, at_front: bool) -> None:
        """Let `entry` wait, behind those of its priority or before them."""
        if not self._by_priority:
            self._filled_s = self.clock()
        entries = self._by_priority.get(entry.request.priority)
        if entries is None:
            entries = self._by_priority[entry.request.priority] = OrderedDict()
            self._by_priority = dict(sorted(self._by_priority.items()))
        entries[id(entry)] = entry
        if at_front:
            entries.move_to_end(id(entry), last=False)
        self._count(entry, len(entry.choices))
        self._has_news = True

    def drop_choice(self, entry: Waiting, choice: int) -> None:
        """Take one choice out; the entry goes with its last one."""
        del entry.choices[choice]
        self._count(entry, -1)
        if not entry.choices:
            self._delete(entry)

    def remove(self, entry: Waiting) -> None:
        """Take out `entry` with all its choices."""
        self._count(entry, -len(entry.choices))
        self._delete(entry)

    def _count(self, entry: Waiting, num_more: int) -> None:
        self._num_by_priority[entry.request.priority] += num_more
        self._num_choices += num_more

    def _delete(self, entry: Waiting) -> None:
        entries = self._by_priority[entry.request.priority]
        del entries[id(entry)]
        if not entries:
            if len(self._by_priority) == 1:
                self._busy_s = self.busy_s
            del self._by_priority[entry.request.priority]

    def note_news(self) -> None:
        """Note that something has changed which may let an entry in."""
        self._has_news = True

    def settle(self) -> None:
        """Note that admission has looked at everything there is."""
        self._has_news = False
