"""The server's guess of which prompt prefixes a replica's KV cache holds. Pure.

A prompt is cut into blocks of about 64 tokens, and each block is named by a keyed hash of the prompt up to its end. A
replica is taken to hold what was sent to it, least recently used blocks going first. No mirror of its prefix tree: what
the manager found when a prompt was admitted corrects the guess.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from toka_engine.messages import Int32s

BLOCK_TOKENS = 64
"""Tokens of a block where pages are not larger; a shared prefix that is shorter is not worth a detour."""
_HASH_BYTES = 8


class PrefixHasher:
    """Names the blocks of prompts. Any thread may use it."""

    def __init__(self, page_size: int) -> None:
        self.block_tokens = page_size * -(-BLOCK_TOKENS // page_size)
        """A multiple of the page size, because the manager finds whole pages."""
        self._key = secrets.token_bytes(16)  # nobody can make two prompts collide on purpose

    def hash_blocks(self, prompt_ids: Int32s) -> list[bytes]:
        """Return one hash for each full block, of the prompt up to that block's end.

        The last token belongs to no block: the manager computes it in any case.
        """
        width = self.block_tokens * np.dtype(np.int32).itemsize
        content = prompt_ids.astype(np.int32, copy=False).tobytes()
        hasher = hashlib.blake2b(key=self._key, digest_size=_HASH_BYTES)
        hashes = []
        for block in range((prompt_ids.size - 1) // self.block_tokens):
            hasher.update(content[block * width : (block + 1) * width])
            hashes.append(hasher.digest())
        return hashes


class PrefixIndex:
    """The blocks that one replica is taken to hold, least recently used first."""

    def __init__(self, max_blocks: int = 0) -> None:
        self.max_blocks = max_blocks
        """The number of blocks that the replica's KV cache holds; 0 until that is known."""
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def count_known(self, blocks: Sequence[bytes]) -> int:
        """Return how many of a prompt's first `blocks` are here without a gap."""
        known = self._blocks
        for count, block in enumerate(blocks):
            if block not in known:
                return count
        return len(blocks)

    def add(self, blocks: Sequence[bytes]) -> None:
        """Note that a prompt of these blocks was sent to the replica."""
        known = self._blocks
        for block in reversed(blocks):  # so that no block is older than those that follow it in a prompt
            known[block] = None
            known.move_to_end(block)
        self._drop_oldest(len(known) - self.max_blocks)

    def forget(self, blocks: Sequence[bytes]) -> None:
        """Take back blocks that the replica never computed."""
        for block in blocks:
            self._blocks.pop(block, None)

    def note_evicted(self, num_blocks: int, blocks: Sequence[bytes]) -> None:
        """Take in that `num_blocks` of the prompt `blocks`, which was added last, had been evicted.

        They come back with this prompt. But the replica evicts what is least recently used, so as many of the oldest
        blocks here are gone as well: the index shrinks to what the replica keeps beside its running streams.
        """
        self._drop_oldest(min(num_blocks, len(self._blocks) - len(blocks)))

    def _drop_oldest(self, count: int) -> None:
        for _ in range(count):
            self._blocks.popitem(last=False)
