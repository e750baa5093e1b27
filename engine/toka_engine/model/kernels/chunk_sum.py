"""The sum of ranks' parts of a chunk of rows that have all arrived, with the residual add and the RMSNorm behind it.

Copies put the peers' parts into this rank's *boxes* while the GEMM still makes the next chunk; whoever launches the
kernel has seen to it that they are there. It adds in rank order in float32, adds the residual, rounds once and norms:
the arithmetic of `all_reduce`, so the same parts give the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2
from toka_engine.model.kernels.all_reduce import count_warps, finish_row, high_half, low_half

NUM_TURNS = 2
"""Sums whose rows may be in the boxes at a time: a peer may be one sum ahead."""
MAX_CHUNKS = 4
"""Chunks of one sum, each with a flag of its own."""
_FLAG_BYTES = 4


@dataclass(frozen=True, slots=True)
class Boxes:
    """The boxes of all ranks, and where this rank stands among them.

    A rank's region is bfloat16 [NUM_TURNS, num_ranks - 1 (source), max_rows, width], then flags, int32
    [num_ranks (source), MAX_CHUNKS].
    """

    rank: int
    num_ranks: int
    max_rows: int
    width: int
    addresses: tuple[int, ...]
    """The device address of each rank's region, as this rank's GPU sees it."""
    words: torch.Tensor
    """[NUM_TURNS, num_ranks - 1, max_rows, width / 2] int32: this rank's own boxes."""

    @staticmethod
    def count_words(max_rows: int, width: int, num_ranks: int) -> int:
        """Words (int32) of the boxes of one rank, without the flags."""
        return NUM_TURNS * (num_ranks - 1) * max_rows * (width // 2)

    @staticmethod
    def size_bytes(max_rows: int, width: int, num_ranks: int) -> int:
        """Bytes of one rank's region; none if it has no rows."""
        if not max_rows:
            return 0
        return 4 * Boxes.count_words(max_rows, width, num_ranks) + _FLAG_BYTES * num_ranks * MAX_CHUNKS

    def find_box(self, owner: int, source: int, turn: int, row: int) -> int:
        """The address in the region of `owner` of the row that `source` puts there in this turn."""
        place = (turn % NUM_TURNS) * (self.num_ranks - 1) + source - (source > owner)
        return self.addresses[owner] + (place * self.max_rows + row) * self.width * 2

    def find_flag(self, owner: int, source: int, chunk: int) -> int:
        """The address in the region of `owner` of the flag by which `source` says that a chunk is there."""
        begin = self.addresses[owner] + 4 * self.count_words(self.max_rows, self.width, self.num_ranks)
        return begin + _FLAG_BYTES * (source * MAX_CHUNKS + chunk)


@triton.jit(do_not_specialize=["rank", "first_row", "max_rows"])
def _sum_kernel(
    part_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    boxes_ptr,
    rank,
    first_row,
    max_rows,
    words,
    eps,
    NUM_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < words
    at = row * words + column
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(NUM_RANKS):
        if source == rank:
            word = tl.load(part_ptr + at, mask=inside, other=0)
        else:
            place = source - (rank < source).to(tl.int64)
            box = boxes_ptr + (place * max_rows + first_row + row) * words
            word = tl.load(box + column, mask=inside, other=0)
        low += low_half(word)
        high += high_half(word)
    residual = tl.load(residual_ptr + at, mask=inside, other=0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0)
    finish_row(low, high, residual, weight, residual_ptr + at, out_ptr + at, words, eps, inside)


def sum_add_rms_norm(
    part: torch.Tensor,  # [rows, width], contiguous
    residual: torch.Tensor,  # [rows, width], contiguous
    weight: torch.Tensor,  # [width]
    eps: float,
    boxes: Boxes,
    turn: int,
    first_row: int,
    out: torch.Tensor,  # [rows, width], contiguous
) -> None:
    """Add this rank's part and the peers' parts of `turn`, in the boxes from `first_row` on, to `residual` in place,
    and write the RMSNorm of the sum to `out`; all bfloat16.
    """
    rows, width = part.shape
    if first_row + rows > boxes.max_rows or width != boxes.width or part.dtype != torch.bfloat16:
        raise AssertionError(f"{rows} rows of {width} {part.dtype} from {first_row} on are not what the boxes are for")
    block = next_power_of_2(width // 2)
    _sum_kernel[(rows,)](
        part.view(torch.int32),
        residual.view(torch.int32),
        weight.view(torch.int32),
        out.view(torch.int32),
        boxes.words[turn % NUM_TURNS],
        boxes.rank,
        first_row,
        boxes.max_rows,
        width // 2,
        eps,
        NUM_RANKS=boxes.num_ranks,
        BLOCK=block,
        num_warps=count_warps(block),
    )
