"""The allocator's gaps go back to the system once a minute."""

from __future__ import annotations

import sys

import pytest
from toka_engine.portable import TRIM_INTERVAL_S, HeapKeeper, count_resident_bytes

NUM_BLOCKS, BLOCK_BYTES = 200_000, 600
"""Blocks that are too large for Python's own allocator, and too small for mappings of their own."""


def make_gaps() -> list[bytes]:
    """Return blocks that keep a large heap from shrinking by itself: those in between are freed."""
    blocks = [bytes(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    return blocks[:: NUM_BLOCKS // 100]


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_memory_between_blocks_in_use_goes_back_when_it_is_due() -> None:
    keeper = HeapKeeper()
    keeper.look(0.0)
    kept = make_gaps()
    before = count_resident_bytes()
    keeper.look(TRIM_INTERVAL_S - 1.0)
    assert count_resident_bytes() >= before - 10_000_000
    keeper.look(TRIM_INTERVAL_S)
    assert count_resident_bytes() <= before - NUM_BLOCKS * BLOCK_BYTES // 2
    assert len(kept) == 100
