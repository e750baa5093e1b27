"""Gathers whole rows of logits on every rank, over peer memory: for samples whose filter needs the whole vocabulary.

Each rank stores its part of the rows into a buffer of every rank, in place, so that the buffer holds rows as one GPU
has them; then the ranks meet: each raises a flag at every other one and waits for theirs. There are two buffers, used
in turn. A rank fills one again only after the next meeting, at which the others arrive when they have read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import cdiv
from toka_engine.model.kernels.sampling import BLOCK

NUM_BUFFERS = 2
ROW_MULTIPLE = 16
"""A row of a buffer has a multiple of as many floats, for aligned loads."""


@dataclass(frozen=True, slots=True)
class RowBuffers:
    """The row buffers and flags of all ranks, and where this rank stands in them."""

    rank: int
    num_ranks: int
    first: int
    """This rank's first token, a multiple of ROW_MULTIPLE."""
    addresses: torch.Tensor
    """[num_ranks] int64: the device address of each rank's buffers."""
    flag_addresses: torch.Tensor
    """[num_ranks] int64: the device address of each rank's flags, int32 [num_ranks (source)], zero at first."""
    turns: torch.Tensor
    """[1] int32, zero at first: how often the ranks have met."""
    rows: torch.Tensor
    """This rank's buffers: [NUM_BUFFERS, max_rows, vocabulary rounded up] fp32."""
    vocab_size: int

    @property
    def max_rows(self) -> int:
        return self.rows.shape[1]

    @staticmethod
    def row_size(vocab_size: int) -> int:
        """Floats of a row in a buffer."""
        return -(-vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE


@triton.jit(do_not_specialize=["num_ranks"])
def _push_rows_kernel(
    logits_ptr, row_stride, width, logit_rows_ptr, addresses_ptr, begin, first, row_size, num_ranks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < width
    logit_row = tl.load(logit_rows_ptr + row).to(tl.int64)
    x = tl.load(logits_ptr + logit_row * row_stride + index, mask=inside, other=0.0).to(tl.float32)
    for owner in range(num_ranks):
        buffers = tl.load(addresses_ptr + owner).to(tl.pointer_type(tl.float32))
        tl.store(buffers + begin + row * row_size + first + index, x, mask=inside)


@triton.jit(do_not_specialize=["rank", "num_ranks"])
def _meet_kernel(flag_addresses_ptr, turns_ptr, rank, num_ranks, SENDS: tl.constexpr, RECEIVES: tl.constexpr):
    turn = tl.load(turns_ptr) + 1
    if SENDS:
        for owner in range(num_ranks):
            flags = tl.load(flag_addresses_ptr + owner).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + rank, turn, sem="release", scope="sys")
    if RECEIVES:
        own = tl.load(flag_addresses_ptr + rank).to(tl.pointer_type(tl.int32))
        for source in range(num_ranks):
            # By the difference, so that a count that has gone round is no lower one.
            seen = tl.atomic_add(own + source, 0, sem="acquire", scope="sys")
            while seen - turn < 0:
                seen = tl.atomic_add(own + source, 0, sem="acquire", scope="sys")
        tl.store(turns_ptr, turn)


def gather_rows(
    logits: torch.Tensor,  # [rows, width]: this rank's part of the vocabulary
    logit_rows: torch.Tensor,  # [n] int32, n <= buffers.max_rows
    buffers: RowBuffers,
    index: int,  # the buffer: the number of calls before this one, modulo NUM_BUFFERS
    *,
    sends: bool = True,
    receives: bool = True,
) -> torch.Tensor:
    """Return logits[logit_rows] over the whole vocabulary, [n, vocab] fp32, until the next call but one.

    Every rank must call it with as many rows, in the same order. A caller that simulates several ranks on one device
    calls with the `sends` of all before the `receives` of any.
    """
    count, row_size = logit_rows.shape[0], buffers.rows.shape[2]
    if not 0 < count <= buffers.max_rows:
        raise AssertionError(f"{count} rows are not what the buffers are for")
    if sends:
        _push_rows_kernel[(cdiv(logits.shape[1], BLOCK), count)](
            logits, logits.stride(0), logits.shape[1], logit_rows, buffers.addresses,
            index * buffers.max_rows * row_size, buffers.first, row_size,
            buffers.num_ranks, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    _meet_kernel[(1,)](
        buffers.flag_addresses, buffers.turns, buffers.rank, buffers.num_ranks,
        SENDS=sends, RECEIVES=receives, num_warps=1,
    )  # fmt: skip
    return buffers.rows[index, :count, : buffers.vocab_size]
