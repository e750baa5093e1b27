"""Decode attention for many rows with short contexts: a program handles several KV heads of its row in sequence.

A program waits for a chain of loads before it has any work: position and slot, then the row's pages, then keys and
values. Where the rows alone fill the GPU, a program pays that once for all its heads, and from then on the next block
is in flight while one is worked on, whichever head it belongs to. Owns this kernel and the rule by which launches take
it (`ShortLaunchConfig`). Nothing here is split over programs: few rows of long contexts go to `decode_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toka_engine.model.kernels.decode_attention_common import (
    append,
    attend_block,
    attend_block_by_columns,
    attend_new,
    give_back,
    join_halves,
    load_angles,
    load_heads,
    load_pages,
    load_tokens,
    rotate_heads,
    to_operand,
)

_MOST_GROUP = 16
"""Query heads per KV head up to which they fit one tensor core MMA, and a program's registers."""


@dataclass(frozen=True, slots=True)
class ShortLaunchConfig:
    """Which launches take this kernel, and how many KV heads a program has. None of it changes the result.

    The choice does not depend on context lengths, so that one graph holds for all of them.
    """

    most_heads: int  # of a program, for rows with a shared prefix; 0: never this kernel
    most_heads_alone: int  # for rows without one, whose contexts may be long
    min_programs: int  # as many as fill the GPU
    min_programs_alone: int  # for rows without a shared prefix
    block_tokens: int  # keys and values in flight per program; a power of 2, at least 16
    num_warps: int
    most_registers: int  # of a thread: with fewer, more programs are on a processor at once
    by_columns: bool = False  # whether query heads are the columns of products, and not their rows

    @classmethod
    def of(cls, head_dim: int, has_fp8_cache: bool = False) -> ShortLaunchConfig:
        """Use eight resident programs for each of an H100's 132 SMs, with blocks of 8 KB.

        For heads of 64 this was the fastest that tests/gpu/bench_suffix_attention.py timed on an H100; other head sizes
        follow from it. One head per program is within 4 % of eight where rows share nothing, and balances long contexts
        better; fewer rows than timed there stay with the other kernel. Over a cache of 8-bit floats this was the
        fastest of tests/gpu/bench_fp8_cache.py on an H200.
        """
        if has_fp8_cache:
            return cls(
                most_heads=8,
                most_heads_alone=1 if head_dim <= 128 else 0,
                min_programs=1024,
                min_programs_alone=2048,
                block_tokens=32,
                num_warps=1 if head_dim <= 128 else 4,
                most_registers=128 if head_dim <= 64 else 255,
                by_columns=True,
            )
        return cls(
            most_heads=8,
            most_heads_alone=1 if head_dim <= 64 else 0,
            min_programs=1024,
            min_programs_alone=8192,
            block_tokens=32 if head_dim <= 64 else 16,
            num_warps=1 if head_dim <= 64 else 2 if head_dim <= 128 else 4,
            most_registers=255 if head_dim <= 64 else 168,
        )

    @property
    def most_rows(self) -> int:
        """From this many rows on, the choice of kernel no longer changes, whatever the number of heads."""
        return max(self.min_programs, self.min_programs_alone)

    def count_heads(self, rows: int, num_kv_heads: int, group: int, is_part: bool) -> int:
        """Return KV heads per program: the most allowed that divide `num_kv_heads` and leave enough programs, or 0."""
        if group > _MOST_GROUP:
            return 0
        if is_part:
            most, programs = self.most_heads, self.min_programs
        else:
            most, programs = self.most_heads_alone, self.min_programs_alone
        return max(
            (
                heads
                for heads in range(1, min(most, num_kv_heads) + 1)
                if num_kv_heads % heads == 0 and rows * num_kv_heads >= programs * heads
            ),
            default=0,
        )


@triton.jit
def _attend_head(
    q, keys, values, pages, begin, end, end_behind, k_cache_at, v_cache_at, head_stride, table_at, page_stride,
    token_stride, scale, top, total, sums, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BY_COLUMNS: tl.constexpr, HAS_CVT: tl.constexpr,
):  # fmt: skip
    """Run the online softmax over the tokens in [begin, end) of one KV head, then load the next head's first block.

    That block ends at `end_behind`. Also returns it, keys and values [BLOCK, HEAD_DIM], and the pages [BLOCK] of the
    block after it. For the state see `attend_block`.
    """
    token = tl.arange(0, BLOCK)
    if BY_COLUMNS:
        q, sums = tl.trans(q), tl.trans(sums)
    for start in tl.range(begin, end, BLOCK):
        is_last = start + BLOCK >= end
        following = tl.where(is_last, begin, start + BLOCK)
        # All heads have the same pages: after the last page comes the first again.
        second = tl.where(following + BLOCK >= end, begin, following + BLOCK)
        step = tl.where(is_last, head_stride, 0)
        next_keys, next_values = load_tokens(
            k_cache_at + step, v_cache_at + step, pages, following + token, tl.where(is_last, end_behind, end),
            page_stride, token_stride, PAGE_SIZE, HEAD_DIM,
        )  # fmt: skip
        pages = load_pages(table_at, second + token, end, PAGE_SIZE)
        is_inside = start + token < end
        if BY_COLUMNS:
            top, total, sums = attend_block_by_columns(q, keys, values, is_inside, scale, top, total, sums, HAS_CVT)
        else:
            top, total, sums = attend_block(q, keys, values, is_inside, scale, top, total, sums, HAS_CVT)
        keys = next_keys
        values = next_values
    if BY_COLUMNS:
        sums = tl.trans(sums)
    return top, total, sums, keys, values, pages


@triton.jit
def _load_first(
    k_cache_at, v_cache_at, table_at, begin, end, page_stride, token_stride,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load keys and values [BLOCK, HEAD_DIM] of a row's first block and the pages [BLOCK] of its second.

    Also returns the offset of the new token in a head's cache.
    """
    token = tl.arange(0, BLOCK)
    pages = load_pages(table_at, begin + token, end, PAGE_SIZE)
    page = tl.load(table_at + end // PAGE_SIZE, volatile=True).to(tl.int64)
    keys, values = load_tokens(
        k_cache_at, v_cache_at, pages, begin + token, end, page_stride, token_stride, PAGE_SIZE, HEAD_DIM
    )
    second = tl.where(begin + BLOCK >= end, begin, begin + BLOCK)
    pages = load_pages(table_at, second + token, end, PAGE_SIZE)
    return keys, values, pages, page * page_stride + (end % PAGE_SIZE) * token_stride


# How many heads a program has is no constant either: one variant serves all numbers of rows and of KV heads.
@triton.jit(do_not_specialize=["table_stride", "group", "num_heads"])
def attend_rows_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_cache_ptr, v_cache_ptr,
    cos_sin_ptr, slots_ptr, positions_ptr, table_ptr, starts_ptr, lse_ptr, rotated_ptr, scale,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    table_stride, page_stride, token_stride, head_stride, group, num_heads,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    BY_COLUMNS: tl.constexpr, HAS_CVT: tl.constexpr, IS_PART: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, num_kv_heads / num_heads); see `decode_attention.attend_decode`."""
    if HAS_PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * num_heads
    position = tl.load(positions_ptr + row)
    slot = tl.load(slots_ptr + row, volatile=True)  # else ptxas moves it behind the wait for the position
    begin = 0
    if IS_PART:
        begin = tl.load(starts_ptr + row, volatile=True)
    table_at = table_ptr + slot.to(tl.int64) * table_stride
    k_cache_at = k_cache_ptr + first_head.to(tl.int64) * head_stride
    v_cache_at = v_cache_ptr + first_head.to(tl.int64) * head_stride
    keys, values, pages, new = _load_first(
        k_cache_at, v_cache_at, table_at, begin, position, page_stride, token_stride, PAGE_SIZE, HEAD_DIM, BLOCK
    )
    if HAS_PDL:
        gdc_wait()  # what kernels of this step wrote is read below alone, and nothing is written above

    q_at = q_ptr + row * q_row_stride + first_head * group * q_head_stride
    k_at = k_ptr + row * k_row_stride + first_head * k_head_stride
    v_at = v_ptr + row * v_row_stride + first_head * v_head_stride
    first = (row * tl.num_programs(1) * num_heads + first_head) * group  # of q's heads, over all rows
    q_a, q_b, k_a, k_b, value = load_heads(q_at, k_at, v_at, q_head_stride, group, True, TILE, HEAD_DIM)
    head = tl.arange(0, TILE)
    heads_at = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    for index in tl.range(0, num_heads):
        cos, sin = load_angles(cos_sin_ptr, position, HEAD_DIM)  # anew: a few registers less while blocks are worked on
        # The next head's inputs are in flight with its first tokens; after the last head there are none.
        has_next = index + 1 < num_heads
        q_at, k_at, v_at = q_at + group * q_head_stride, k_at + k_head_stride, v_at + v_head_stride
        next_q_a, next_q_b, next_k_a, next_k_b, next_value = load_heads(
            q_at, k_at, v_at, q_head_stride, tl.where(has_next, group, 0), has_next, TILE, HEAD_DIM
        )
        q_a, q_b, k_a, k_b = rotate_heads(q_a, q_b, k_a, k_b, cos, sin)
        append(k_cache_at + new, v_cache_at + new, k_a, k_b, value, True, HEAD_DIM)
        if IS_PART:
            give_back(rotated_ptr + first * HEAD_DIM, q_a, q_b, group, True, TILE, HEAD_DIM)
        top, total, sums = attend_new(q_a, q_b, k_a, k_b, value, True, scale, TILE, HEAD_DIM)
        q = to_operand(join_halves(q_a, q_b, TILE, HEAD_DIM), k_cache_ptr.dtype.element_ty)
        top, total, sums, keys, values, pages = _attend_head(
            q, keys, values, pages, begin, position,
            tl.where(has_next, position, begin), k_cache_at, v_cache_at, head_stride, table_at, page_stride,
            token_stride, scale, top, total, sums, PAGE_SIZE, HEAD_DIM, BLOCK, BY_COLUMNS, HAS_CVT,
        )  # fmt: skip
        mean = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + first * HEAD_DIM + heads_at, mean, mask=(head < group)[:, None])
        if IS_PART:
            tl.store(lse_ptr + first + head, top + tl.log2(total), mask=head < group)
        first += group
        k_cache_at += head_stride
        v_cache_at += head_stride
        q_a, q_b, k_a, k_b, value = next_q_a, next_q_b, next_k_a, next_k_b, next_value
