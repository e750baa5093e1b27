"""The prefix tree: full pages of KV cache found again by the tokens that lead to them.

Pages that follow each other without a fork are one `Run`, entered, compared and evicted as a whole; a run hangs
below any page of another. A dictionary finds a run by that page and the tokens of its own first page: by hash,
decided by content, as everything here. Invariant: whoever holds a page of the tree holds those before it too, and
touches them; so among the pages that only the tree holds, a child is never younger than its parent and the oldest
can be evicted in one sorted batch, children first. Pure: `tick` is the caller's clock. Evicts only on demand,
never pages that a sequence holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toka_engine.manager.allocator import Allocator
from toka_engine.manager.arrays import resident_zeros
from toka_engine.messages import Int32s

ROOT = -1
_EVICT_SHARE = 32
EVICT_LEAST = 256
"""An eviction takes at least one in _EVICT_SHARE of the evictable pages: the selection is paid per batch."""
_DEPTH_BITS = 24
"""A page's age is its tick shifted by this, less its depth: the lowest goes first, and children before parents."""

Key = tuple[int, bytes]
"""A page's parent (or ROOT) and its own tokens."""

_NONE: Int32s = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class Run:
    """Pages below each other. Its arrays are replaced, never written to."""

    key: Key
    """Key of the first page."""
    depth: int
    """Column of its first page."""
    pages: Int32s
    content: bytes
    """Their tokens."""


class PrefixTree:
    """Finds, inserts and evicts full pages. `page_tokens` [num_pages, page_size] holds each page's token
    ids."""

    def __init__(self, allocator: Allocator, page_tokens: NDArray[np.int32], is_enabled: bool = True) -> None:
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._page_size = int(page_tokens.shape[1])
        self._width = page_tokens.itemsize * self._page_size
        self._is_enabled = is_enabled
        self._num_pages = 0
        self._root = Run((ROOT, b""), 0, _NONE, b"")
        self._runs: dict[Key, Run] = {}
        self._by_first: dict[int, Run] = {}
        """The same runs by their first page."""
        self._firsts = np.full(allocator.num_pages, ROOT, np.int32)
        """The first page of the run that a page is in."""
        self._ages = resident_zeros(allocator.num_pages, np.int64)

    @property
    def is_enabled(self) -> bool:
        return self._is_enabled

    def __len__(self) -> int:
        return self._num_pages

    def key(self, parent: int, page: int) -> Key:
        return parent, self._page_tokens[page].tobytes()

    def match(self, tokens: Int32s) -> tuple[Int32s, Key | None]:
        """Return the pages that hold the longest known prefix of `tokens`, and the key of the first one
        missing.

        The last token is never part of a match, because it must be computed to sample from it. The key is
        None when no further full page could have matched.
        """
        if not self._is_enabled:
            return _NONE, None
        width, most = self._width, (tokens.size - 1) // self._page_size
        content = tokens[: most * self._page_size].astype(np.int32, copy=False).tobytes()
        parts: list[Int32s] = []
        parent, position = ROOT, 0
        while position < len(content):
            key = parent, content[position : position + width]
            run = self._runs.get(key)
            if run is None:
                return _joined(parts), key
            if content.startswith(run.content, position):
                part = run.pages
            else:
                part = run.pages[: self._count_common(run, 0, content, position)]
            parts.append(part)
            parent = int(part[-1])
            position += part.size * width
        return _joined(parts), None

    def touch(self, pages: Int32s, tick: int) -> None:
        """`pages` from the first column on were used at `tick`."""
        self._ages[pages] = (tick << _DEPTH_BITS) - np.arange(pages.size)

    def insert_path(self, pages: Int32s, num_known: int, tick: int) -> int:
        """Enter pages[num_known:], the pages of one sequence's columns in order; return how many columns are
        in now.

        pages[:num_known] are in the tree already. Stops at the first column whose content is there in another
        page: the sequence does not hold that page, so nothing may hang below it.
        """
        return self._insert(pages, num_known, tick, is_released=False) if self._is_enabled else num_known

    def insert_released(self, pages: Int32s, num_known: int, tick: int) -> None:
        """Insert a path (see `insert_path`) of a sequence that releases `pages` right after.

        Pages that nobody else holds may hang below another page of equal content, because no holder is left.
        """
        if self._is_enabled:
            self._insert(pages, num_known, tick, is_released=True)

    def evict(self, count: int) -> None:
        """Free at least `count` pages that only the tree holds (the caller knows that there are as many)."""
        allocator = self._allocator
        candidates = np.flatnonzero(allocator.is_cached & (allocator.refs == 0)).astype(np.int32)
        count = min(max(count, candidates.size // _EVICT_SHARE, EVICT_LEAST), candidates.size)
        if count < candidates.size:
            candidates = candidates[np.argpartition(self._ages[candidates], count - 1)[:count]]
        firsts, counts = np.unique(self._firsts[candidates], return_counts=True)
        for first, num_evicted in zip(firsts.tolist(), counts.tolist(), strict=True):
            run = self._by_first[first]
            num_left = run.pages.size - num_evicted
            if num_left:  # children go first, so these are the last ones
                run.pages, run.content = run.pages[:num_left], run.content[: num_left * self._width]
            else:
                del self._runs[run.key], self._by_first[first]
        self._firsts[candidates] = ROOT
        self._num_pages -= candidates.size
        allocator.uncache(candidates)

    def _insert(self, pages: Int32s, num_known: int, tick: int, *, is_released: bool) -> int:
        path, column = pages, num_known
        if column < pages.size:
            content = self._page_tokens[pages[num_known:]].tobytes()
            run, offset = self._root, 0
            if num_known:
                known = self._by_first.get(int(self._firsts[pages[num_known - 1]]))
                assert known is not None, "a known page is not in the tree"
                run, offset = known, num_known - known.depth
        while column < pages.size:
            position = (column - num_known) * self._width
            num_common = self._count_common(run, offset, content, position)
            if num_common == 0:  # a fork, or the end of the run
                parent = int(path[column - 1]) if column else ROOT
                key = parent, content[position : position + self._width]
                if (child := self._runs.get(key)) is None:
                    self._add(run, offset, key, column, pages[column:], content[position:])
                    column = pages.size
                else:
                    run, offset = child, 0
                continue
            theirs = run.pages[offset : offset + num_common]
            differs = theirs != pages[column : column + num_common]
            if differs.any():
                stop = column + int(differs.argmax())
                if not is_released or (self._allocator.refs[pages[stop:]] > 1).any():
                    column = stop
                    break
                path = path.copy()
                path[column : column + num_common] = theirs
            column += num_common
            offset += num_common
        self.touch(path[:column], tick)
        return column

    def _add(self, run: Run, offset: int, key: Key, column: int, pages: Int32s, content: bytes) -> None:
        """Enter `pages` at `column`: as a longer `run` where they follow its last page, else as one of their
        own."""
        if run is not self._root and offset == run.pages.size:
            run.pages, run.content = np.concatenate((run.pages, pages)), run.content + content
        else:
            run = Run(key, column, pages.copy(), content)
            self._runs[key] = self._by_first[int(pages[0])] = run
        self._firsts[pages] = run.pages[0]
        self._num_pages += pages.size
        self._allocator.cache(pages)

    def _count_common(self, run: Run, offset: int, content: bytes, position: int) -> int:
        """Return how many pages of `run` from `offset` on have the tokens of `content` from byte `position`
        on."""
        width = self._width
        start = offset * width
        low, high = 0, min(len(run.content) - start, len(content) - position) // width
        if high == 0 or run.content[start : start + width] != content[position : position + width]:
            return 0
        low = 1
        while low < high:
            middle = (low + high + 1) // 2
            first, last = low * width, middle * width
            if run.content[start + first : start + last] == content[position + first : position + last]:
                low = middle
            else:
                high = middle - 1
        return low


def _joined(parts: list[Int32s]) -> Int32s:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else _NONE
