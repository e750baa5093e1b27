"""The prefix tree: full pages of KV cache found again by the tokens that lead to them.

A node is a physical page; its key is its parent page and its own tokens, so a dictionary finds it by hash and
decides by content. Invariant: whoever holds a node holds its parent too, and touches both; so among the nodes
that only the tree holds, a child is never younger than its parent and the oldest can be evicted in one sorted
batch, children first. Pure: `tick` is the caller's clock. Evicts only on demand, never pages that a sequence
holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toka_engine.manager.allocator import Allocator
from toka_engine.messages import Int32s

ROOT = -1
_EVICT_SHARE = 32
_EVICT_LEAST = 256
"""An eviction takes at least one in _EVICT_SHARE of the evictable pages: the selection is paid per batch."""

Key = tuple[int, bytes]


class PrefixTree:
    """Finds, inserts and evicts full pages. `page_tokens` [num_pages, page_size] holds each page's token
    ids."""

    def __init__(self, allocator: Allocator, page_tokens: NDArray[np.int32], is_enabled: bool = True) -> None:
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._page_size = int(page_tokens.shape[1])
        self._is_enabled = is_enabled
        self._pages: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * allocator.num_pages
        self._depths = np.zeros(allocator.num_pages, np.int64)
        self._ticks = np.zeros(allocator.num_pages, np.int64)

    @property
    def is_enabled(self) -> bool:
        return self._is_enabled

    def __len__(self) -> int:
        return len(self._pages)

    def key(self, parent: int, page: int) -> Key:
        return parent, self._page_tokens[page].tobytes()

    def match(self, tokens: Int32s) -> tuple[list[int], Key | None]:
        """Return the pages that hold the longest known prefix of `tokens`, and the key of the first one
        missing.

        The last token is never part of a match, because it must be computed to sample from it. The key is
        None when no further full page could have matched.
        """
        if not self._is_enabled:
            return [], None
        most = (tokens.size - 1) // self._page_size
        width = 4 * self._page_size
        content = tokens[: most * self._page_size].astype(np.int32, copy=False).tobytes()
        pages: list[int] = []
        parent = ROOT
        for start in range(0, most * width, width):
            key = parent, content[start : start + width]
            page = self._pages.get(key)
            if page is None:
                return pages, key
            pages.append(page)
            parent = page
        return pages, None

    def touch(self, pages: Int32s, tick: int) -> None:
        self._ticks[pages] = tick

    def insert_path(self, pages: Int32s, num_known: int, tick: int) -> int:
        """Enter pages[num_known:], the pages of one sequence's columns in order; return how many columns are
        in now.

        pages[:num_known] are in the tree already. Stops at the first column whose content is there in another
        page: the sequence does not hold that page, so nothing may hang below it.
        """
        if not self._is_enabled:
            return num_known
        parent = int(pages[num_known - 1]) if num_known else ROOT
        column = num_known
        added = []
        for page, content in zip(pages[num_known:].tolist(), self._contents(pages[num_known:]), strict=True):
            key = parent, content
            if self._pages.setdefault(key, page) != page:
                break
            if self._keys[page] is None:
                self._keys[page] = key
                added.append(page)
            parent = page
            column += 1
        self._note(added, pages[:column], tick)
        return column

    def insert_released(self, pages: Int32s, num_known: int, tick: int) -> None:
        """As `insert_path`, for a sequence that lets go of `pages` right after.

        Pages that nobody else holds may hang below another page of equal content, because no holder is left.
        """
        column = self.insert_path(pages, num_known, tick)
        if not self._is_enabled or column == pages.size or (self._allocator.refs[pages[column:]] > 1).any():
            return
        parent = int(pages[column - 1]) if column else ROOT
        path, added = [], []
        for page, content in zip(pages[column:].tolist(), self._contents(pages[column:]), strict=True):
            key = parent, content
            found = self._pages.setdefault(key, page)
            if found == page and self._keys[page] is None:
                self._keys[page] = key
                added.append(page)
            path.append(found)
            parent = found
        self._note(added, np.asarray(path, np.int32), tick, column)

    def evict(self, count: int) -> None:
        """Free at least `count` pages that only the tree holds (the caller knows that there are as many)."""
        allocator = self._allocator
        candidates = np.flatnonzero(allocator.is_cached & (allocator.refs == 0))
        count = min(max(count, candidates.size // _EVICT_SHARE, _EVICT_LEAST), candidates.size)
        if count < candidates.size:
            ages = (self._ticks[candidates] << 24) - self._depths[candidates]
            candidates = candidates[np.argpartition(ages, count - 1)[:count]]
        for page in candidates.tolist():
            key = self._keys[page]
            assert key is not None
            del self._pages[key]
            self._keys[page] = None
        allocator.uncache(candidates.astype(np.int32))

    def _contents(self, pages: Int32s) -> list[bytes]:
        content, width = self._page_tokens[pages].tobytes(), 4 * self._page_size
        return [content[start : start + width] for start in range(0, len(content), width)]

    def _note(self, added: list[int], path: Int32s, tick: int, first_depth: int = 0) -> None:
        """Keep the books of pages that came in, all on `path`, whose first page has depth `first_depth`."""
        self._ticks[path] = tick
        if added:
            self._depths[path] = np.arange(first_depth, first_depth + path.size)
            self._allocator.cache(np.asarray(added, np.int32))
