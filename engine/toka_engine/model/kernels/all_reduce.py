"""All-reduce over peer memory, fused with the residual add and the RMSNorm behind it.

Each rank holds a partial sum of every row. A program stores its row of the partial into an inbox of every peer, waits
until the peers' rows are in its own inboxes, adds all of them in rank order in float32, adds the residual, rounds once
and norms. All ranks compute the same sums in the same order, so they hold the same bits.

The data is its own flag (the low-latency protocol of NCCL, after Lamport): an inbox is filled with a mark that no
sender ever stores, so a word is there when it differs from the mark. That is one NVLink latency, without a barrier.
A row has two inboxes, used in turn, and its turn is counted on the device: a CUDA graph, whose addresses are fixed,
finds its own. A receiver marks an inbox empty as soon as it has read it, which is in time: a peer stores into it again
two turns later, and reaches that turn only with this rank's row of the turn between, sent by a later launch.

Programs must all be resident, as each waits for its peer: the grid never exceeds what a GPU runs at once, and a program
takes several rows, each sent before the row in front of it is awaited.

From compute capability 9.0 on the kernel behind this one starts while this one waits (programmatic dependent launch):
it is told so by the last program to begin, so it takes no place that a waiting program needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toka_engine.model.kernels import count_processors, next_power_of_2

EMPTY_WORD = -2147450880
"""The mark: two bfloat16 -0.0 (0x80008000) as int32. A sender turns -0.0 into 0.0, which changes no sum."""
_EMPTY = tl.constexpr(EMPTY_WORD)
_NUM_TURNS = 2
_TURNS = tl.constexpr(_NUM_TURNS)
_MAX_PROGRAMS_PER_PROCESSOR = 2
"""Two were the best of 1, 2 and 4, or within 7 % of it, at every number of rows (docs/lab/all-reduce.md)."""
_WORDS_PER_WARP = 128
"""Four words a thread: one load of 16 bytes."""


@dataclass(frozen=True, slots=True)
class Inboxes:
    """The inboxes of all ranks, and where this rank stands in them.

    An inbox region of a rank is int32 words [2 turns, max_rows, num_ranks (source), width / 2].
    """

    rank: int
    num_ranks: int
    max_rows: int
    width: int
    addresses: torch.Tensor
    """[num_ranks] int64: the device address of each rank's region, as this rank's GPU sees it."""
    turns: torch.Tensor
    """[max_rows] int32, zero at first: how often each row has been reduced."""
    max_programs: int
    """Programs that this GPU runs at once, at most."""
    has_pdl: bool = False
    """Whether the GPU has programmatic dependent launch."""

    @staticmethod
    def size_bytes(max_rows: int, width: int, num_ranks: int) -> int:
        """Bytes of one rank's region."""
        return _NUM_TURNS * max_rows * num_ranks * width * 2


def count_resident_programs(device: torch.device) -> int:
    """The largest grid whose programs surely run at once on this GPU."""
    return _MAX_PROGRAMS_PER_PROCESSOR * count_processors(device)


def count_warps(block: int) -> int:
    """The warps of a program that has a row of `block` words."""
    return min(16, max(1, block // _WORDS_PER_WARP))


@triton.jit
def _load_sent(partial_ptr, row, column, inside, words):
    """Return a row of the partial as int32 words [BLOCK], with 0.0 for -0.0."""
    word = tl.load(partial_ptr + row * words + column, mask=inside, other=0)
    low, high = word & 0xFFFF, (word >> 16) & 0xFFFF
    low, high = tl.where(low == 0x8000, 0, low), tl.where(high == 0x8000, 0, high)
    return (high << 16) | low


@triton.jit
def low_half(word):
    """Return the bfloat16 in the low half of int32 words as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word):
    """Return the bfloat16 in the high half of int32 words as float32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pack(low, high):
    """Round two float32 to bfloat16 and return them as int32 words, `low` in the low half."""
    low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high_bits = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return high_bits | low_bits


@triton.jit
def finish_row(low, high, residual, weight, residual_at, out_at, words, eps, inside):
    """Add a row of the residual to its summed halves (float32), store the sum and its norm. Arguments are [BLOCK]."""
    total = pack(low + low_half(residual), high + high_half(residual))
    tl.store(residual_at, total, mask=inside)
    low, high = low_half(total), high_half(total)
    scale = 1.0 / tl.sqrt(tl.sum(low * low + high * high, axis=0) / (2 * words) + eps)
    normed = pack(low * scale, high * scale)
    out = pack(low_half(normed) * low_half(weight), high_half(normed) * high_half(weight))
    tl.store(out_at, out, mask=inside)


@triton.jit
def _find_inbox(addresses_ptr, owner, source, turn, row, max_rows, words, NUM_RANKS: tl.constexpr):
    """Return a pointer to the words that `source` sends to `owner` for this turn and row."""
    region = tl.load(addresses_ptr + owner).to(tl.pointer_type(tl.int32))
    return region + ((((turn % _TURNS) * max_rows + row) * NUM_RANKS) + source) * words


@triton.jit
def _send_row(
    partial_ptr, addresses_ptr, turns_ptr, row, rank, max_rows, words, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < words
    turn = tl.load(turns_ptr + row).to(tl.int64)
    word = _load_sent(partial_ptr, row, column, inside, words)
    for peer in tl.static_range(NUM_RANKS):
        if peer != rank:
            inbox = _find_inbox(addresses_ptr, peer, rank, turn, row, max_rows, words, NUM_RANKS)
            tl.store(inbox + column, word, mask=inside)


@triton.jit
def _receive_row(
    partial_ptr, residual_ptr, weight_ptr, out_ptr, addresses_ptr, turns_ptr, row, rank, max_rows, words, eps,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < words
    turn = tl.load(turns_ptr + row).to(tl.int64)
    residual = tl.load(residual_ptr + row * words + column, mask=inside, other=0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0)
    own = _load_sent(partial_ptr, row, column, inside, words)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(NUM_RANKS):
        if source == rank:
            low += low_half(own)
            high += high_half(own)
        else:
            inbox = _find_inbox(addresses_ptr, rank, source, turn, row, max_rows, words, NUM_RANKS)
            word = tl.load(inbox + column, mask=inside, other=0, volatile=True)
            while tl.max((word == _EMPTY).to(tl.int32), axis=0) > 0:
                word = tl.load(inbox + column, mask=inside, other=0, volatile=True)
            low += low_half(word)
            high += high_half(word)
            tl.store(inbox + column, tl.full([BLOCK], _EMPTY, tl.int32), mask=inside)
    tl.store(turns_ptr + row, (turn + 1).to(tl.int32))
    at = row * words + column
    finish_row(low, high, residual, weight, residual_ptr + at, out_ptr + at, words, eps, inside)


@triton.jit(do_not_specialize=["rank", "num_rows", "max_rows"])
def _all_reduce_kernel(
    partial_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    addresses_ptr,
    turns_ptr,
    rank,
    num_rows,
    max_rows,
    words,
    eps,
    NUM_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SENDS: tl.constexpr,
    RECEIVES: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    if HAS_PDL:
        gdc_launch_dependents()
        gdc_wait()
    step = tl.num_programs(0)
    row = tl.program_id(0).to(tl.int64)
    if SENDS:
        _send_row(partial_ptr, addresses_ptr, turns_ptr, row, rank, max_rows, words, NUM_RANKS, BLOCK)
    while row < num_rows:
        following = row + step
        if SENDS and following < num_rows:
            _send_row(partial_ptr, addresses_ptr, turns_ptr, following, rank, max_rows, words, NUM_RANKS, BLOCK)
        if RECEIVES:
            _receive_row(
                partial_ptr, residual_ptr, weight_ptr, out_ptr, addresses_ptr, turns_ptr, row, rank, max_rows, words,
                eps, NUM_RANKS, BLOCK,
            )  # fmt: skip
        row = following


def all_reduce_add_rms_norm(
    partial: torch.Tensor,  # [rows, width], contiguous
    residual: torch.Tensor,  # [rows, width], contiguous
    weight: torch.Tensor,  # [width]
    eps: float,
    inboxes: Inboxes,
    out: torch.Tensor | None = None,  # [rows, width]
    *,
    sends: bool = True,
    receives: bool = True,
) -> torch.Tensor:
    """Add all ranks' partials to `residual` in place and return the RMSNorm of the sum, [rows, width]; all bfloat16.

    Every rank must launch it with as many rows, in the same order of launches; it waits on the device for the others.
    A caller that simulates several ranks on one device launches the `sends` of all before the `receives` of any.
    """
    rows, width = partial.shape
    if not rows <= inboxes.max_rows or width != inboxes.width or partial.dtype != torch.bfloat16:
        raise AssertionError(f"{rows} rows of {width} {partial.dtype} are not what the inboxes are for")
    if out is None:
        out = torch.empty_like(partial)
    if rows:
        block = next_power_of_2(width // 2)
        _all_reduce_kernel[(min(rows, inboxes.max_programs),)](
            partial.view(torch.int32),
            residual.view(torch.int32),
            weight.view(torch.int32),
            out.view(torch.int32),
            inboxes.addresses,
            inboxes.turns,
            inboxes.rank,
            rows,
            inboxes.max_rows,
            width // 2,
            eps,
            NUM_RANKS=inboxes.num_ranks,
            BLOCK=block,
            SENDS=sends,
            RECEIVES=receives,
            HAS_PDL=inboxes.has_pdl,
            launch_pdl=inboxes.has_pdl,
            num_warps=count_warps(block),
        )
    return out
