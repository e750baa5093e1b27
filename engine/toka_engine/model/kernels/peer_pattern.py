"""A pattern that each rank writes into every rank's region of peer memory, to see whether writes arrive."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PATTERN_WORDS = 1024
"""int32 words that a rank writes to each rank: word i of source s at target t is `pattern_start(s, t) + i`."""


@triton.jit(do_not_specialize=["rank"])
def _write_kernel(addresses_ptr, rank, BLOCK: tl.constexpr):
    target = tl.program_id(0)
    word = tl.arange(0, BLOCK)
    region = tl.load(addresses_ptr + target).to(tl.pointer_type(tl.int32))
    tl.store(region + rank * BLOCK + word, (rank << 24) + (target << 16) + 1 + word)


def pattern_start(source: int, target: int) -> int:
    """Return the first word that `source` writes to `target`."""
    return (source << 24) + (target << 16) + 1


def write_pattern(addresses: torch.Tensor, rank: int) -> None:
    """Write this rank's pattern to words [rank * PATTERN_WORDS, ...) of each region; `addresses` is [ranks] int64."""
    _write_kernel[(addresses.shape[0],)](addresses, rank, BLOCK=PATTERN_WORDS)
