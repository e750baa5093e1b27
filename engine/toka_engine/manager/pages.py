"""The KV pages and what is stored with them: references, the prefix tree, tokens, logprobs, and pages held for a step.

The only writer of the pages that steps hold; references are the allocator's, the tree is its own.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from toka_engine.config import EngineConfig
from toka_engine.manager.allocator import Allocator
from toka_engine.manager.arrays import resident_zeros
from toka_engine.manager.prefix_tree import PrefixTree
from toka_engine.manager.sizes import Sizes
from toka_engine.manager.top_logprobs import TopLogprobs
from toka_engine.messages import Int32s


class Pages:
    """Arrays [num_pages, page_size], by page."""

    def __init__(self, config: EngineConfig, sizes: Sizes) -> None:
        self.allocator = Allocator(sizes.num_pages)
        self.tokens = resident_zeros((sizes.num_pages, sizes.page_size), np.int32)
        self.logprobs = resident_zeros((sizes.num_pages, sizes.page_size), np.float32)
        self.tops = TopLogprobs(sizes.num_pages * sizes.page_size, sizes.num_slots, config.max_topk_logprobs)
        self.tree = PrefixTree(self.allocator, self.tokens, config.use_prefix_cache)
        self._held: deque[tuple[int, Int32s]] = deque()

    @property
    def held(self) -> tuple[tuple[int, Int32s], ...]:
        """(step, pages) in the order of steps: released when the step is back."""
        return tuple(self._held)

    @property
    def has_held(self) -> bool:
        return bool(self._held)

    def take(self, count: int) -> Int32s:
        """Allocate `count` pages, evicting from the prefix tree as needed. The caller knows that they are available."""
        shortage = count - self.allocator.num_free
        if shortage > 0:
            self.tree.evict(shortage)
        return self.allocator.allocate(count)

    def hold(self, step: int, pages: Int32s) -> None:
        """Hand one reference of each of `pages` to `step`: it is released when the step is back."""
        self._held.append((step, pages))

    def release_held(self, completed_step: int) -> bool:
        """Release what steps up to `completed_step` hold; return whether there was any."""
        has_released = False
        while self._held and self._held[0][0] <= completed_step:
            self.allocator.release(self._held.popleft()[1])
            has_released = True
        return has_released
