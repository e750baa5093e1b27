"""The queue of choices that wait to be admitted: who is next, how many there are, whether anything has changed.

The only writer of its entries and counters. It decides nothing: `admission` takes out whom it starts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from toka_engine.manager.requests import Waiting


class Queue:
    """Entries in order, the first one being next: by priority, then by arrival. An entry is the choices of one request
    that wait together.
    """

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[int, Waiting]] = {}  # in order of priority; by id(entry)
        self._num_choices = 0
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
        entries = self._by_priority.get(entry.request.priority)
        if entries is None:
            entries = self._by_priority[entry.request.priority] = OrderedDict()
            self._by_priority = dict(sorted(self._by_priority.items()))
        entries[id(entry)] = entry
        if at_front:
            entries.move_to_end(id(entry), last=False)
        self._num_choices += len(entry.choices)
        self._has_news = True

    def drop_choice(self, entry: Waiting, choice: int) -> None:
        """Take one choice out; the entry goes with its last one."""
        del entry.choices[choice]
        self._num_choices -= 1
        if not entry.choices:
            self._delete(entry)

    def remove(self, entry: Waiting) -> None:
        """Take out `entry` with all its choices."""
        self._num_choices -= len(entry.choices)
        self._delete(entry)

    def _delete(self, entry: Waiting) -> None:
        entries = self._by_priority[entry.request.priority]
        del entries[id(entry)]
        if not entries:
            del self._by_priority[entry.request.priority]

    def note_news(self) -> None:
        """Note that something has changed which may let an entry in."""
        self._has_news = True

    def settle(self) -> None:
        """Note that admission has looked at everything there is."""
        self._has_news = False
