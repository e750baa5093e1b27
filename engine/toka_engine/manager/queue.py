"""The queue of choices that wait to be admitted: who is next, how many there are, whether anything has changed.

The only writer of its entries and counters. It decides nothing: `admission` takes out whom it starts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from toka_engine.manager.requests import Waiting


class Queue:
    """Entries in order, the first one being next. An entry is the choices of one request that wait together."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, Waiting] = OrderedDict()  # by id(entry)
        self._num_choices = 0
        self._num_arrivals = 0
        self._has_news = True

    @property
    def entries(self) -> Collection[Waiting]:
        return self._entries.values()

    @property
    def num_choices(self) -> int:
        """Choices of all entries."""
        return self._num_choices

    @property
    def has_news(self) -> bool:
        """Something has changed since `settle` that may let an entry in."""
        return self._has_news

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: Waiting) -> bool:
        return id(entry) in self._entries

    def count_arrival(self) -> int:
        """Return the number of a request that has arrived: one more than the last one's."""
        self._num_arrivals += 1
        return self._num_arrivals - 1

    def add(self, entry: Waiting, *, at_front: bool) -> None:
        self._entries[id(entry)] = entry
        if at_front:
            self._entries.move_to_end(id(entry), last=False)
        self._num_choices += len(entry.choices)
        self._has_news = True

    def drop_choice(self, entry: Waiting, choice: int) -> None:
        """Take one choice out; the entry goes with its last one."""
        del entry.choices[choice]
        self._num_choices -= 1
        if not entry.choices:
            del self._entries[id(entry)]

    def remove(self, entry: Waiting) -> None:
        """Take out `entry` with all its choices."""
        self._num_choices -= len(entry.choices)
        del self._entries[id(entry)]

    def note_news(self) -> None:
        """Note that something has changed which may let an entry in."""
        self._has_news = True

    def settle(self) -> None:
        """Note that admission has looked at everything there is."""
        self._has_news = False
