"""KV pages: reference counts and the free list, as numpy arrays.

A page is held by any number of sequences (`refs`) and perhaps by the prefix tree (`is_cached`). It is free
when neither holds it. Pages that the tree alone holds are counted, because they can be had back by eviction.
Pure; knows neither slots nor tokens.
"""

from __future__ import annotations

import numpy as np

from toka_engine.manager.arrays import distinct, resident_zeros
from toka_engine.messages import Int32s

_ONE = np.int32(1)
"""One, in the dtype of the counts: numpy subtracts a value of another dtype element by element."""


class Allocator:
    """Owns which page is free. `num_cached_only` pages are held by the tree alone."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.refs = resident_zeros(num_pages, np.int32)
        self.is_cached = resident_zeros(num_pages, np.bool_)
        self.num_cached_only = 0
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self.num_free = num_pages

    @property
    def num_available(self) -> int:
        """Pages free now or after eviction."""
        return self.num_free + self.num_cached_only

    @property
    def num_used(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - self.num_available

    def allocate(self, count: int) -> Int32s:
        """Take `count` free pages, each with one reference. The caller has made sure that they are free."""
        assert count <= self.num_free, "allocate() without free pages"
        self.num_free -= count
        pages = self._free[self.num_free : self.num_free + count][::-1].copy()
        self.refs[pages] = 1
        return pages

    def retain(self, pages: Int32s, times: int = 1) -> None:
        """Add `times` references to each of `pages` (distinct): held ones, or ones that the tree alone
        holds."""
        self.num_cached_only -= int(np.count_nonzero(self.refs[pages] == 0))
        self.refs[pages] += times

    def release(self, pages: Int32s) -> None:
        """Drop one reference per entry of `pages`; entries may repeat."""
        if pages.size == 0:
            return
        np.subtract.at(self.refs, pages, _ONE)
        unheld = distinct(pages[self.refs[pages] == 0])
        cached = self.is_cached[unheld]
        self.num_cached_only += int(np.count_nonzero(cached))
        self._push(unheld[~cached])

    def cache(self, pages: Int32s) -> None:
        """The tree takes hold of `pages`: distinct, not cached, each held by a sequence."""
        self.is_cached[pages] = True

    def uncache(self, pages: Int32s) -> None:
        """The tree lets go of `pages`: distinct, cached, held by no sequence; they become free."""
        self.is_cached[pages] = False
        self.num_cached_only -= pages.size
        self._push(pages)

    def _push(self, pages: Int32s) -> None:
        self._free[self.num_free : self.num_free + pages.size] = pages
        self.num_free += pages.size
