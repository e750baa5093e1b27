"""Decode attention in one kernel per layer: RoPE, the write of K and V, attention over splits, and their merge.

A row finds its slot, position and pages on the device: the host uploads slots and positions and plans nothing else, and
a CUDA graph of these launches holds for any contexts. Owns the scratch memory of a step's launches (`Workspace`). Not
here: q/k norm, prefill, shared prefixes. For a row with a shared prefix this attends to the suffix only and returns the
log-sum-exp for merging. `decode_attention_short` has the kernel for many rows with short suffixes.

Algorithm: FlashAttention's online softmax (Dao et al. 2022) in base 2 over splits of the keys (Flash-Decoding, 2023);
the last split to arrive merges all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from toka_engine.model.kernels import DEPENDENT_LAUNCH_CAPABILITY, FP8_CAPABILITY, next_power_of_2
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
from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig, attend_rows_kernel

MAX_SPLITS = 64
_MIN_TILE, _MIN_COLUMNS = 16, 8
"""Rows and columns of a tensor core MMA, which the query heads of a KV head are padded to."""
_LOG2_E = 1.4426950408889634
_MERGED_AT_ONCE = 8192
"""Floats of partial results that a program loads at once when it merges: 64 registers for each of 128 threads."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Block size, warps and splits of a launch. None of them changes the result."""

    block_tokens: int  # keys and values in flight per program; a power of 2, at least 16
    num_warps: int
    num_programs: int  # up to which the tokens of a row are split
    short: ShortLaunchConfig | None = None  # for many rows of few tokens; None: they are launched like all others
    by_columns: bool = False  # whether query heads are the columns of products, and not their rows

    @classmethod
    def of(cls, head_dim: int, has_fp8_cache: bool = False) -> LaunchConfig:
        """Use blocks of 16 KB (32 KB for a head of 256), and about four programs for each of an H100's 132 SMs.

        For heads of 64 and 128 this was the fastest of those that tests/gpu/bench_decode_attention.py times on an H100,
        and over a cache of 8-bit floats of those of tests/gpu/bench_fp8_cache.py on an H200.
        """
        short = ShortLaunchConfig.of(head_dim, has_fp8_cache)
        if has_fp8_cache:
            return cls(64, 2 if head_dim <= 64 else 4, 512, short, by_columns=True)
        return cls(64 if head_dim <= 64 else 32, 2 if head_dim <= 128 else 4, 512, short)

    def count_splits(self, rows: int, num_kv_heads: int) -> int:
        """Return how many splits a row's tokens get: the largest power of 2 with at most `num_programs` programs.

        It lies between 1 and MAX_SPLITS and depends on the number of rows alone, so that one graph holds for all
        contexts; splits beyond the end of a short context return at once.
        """
        splits = self.num_programs // (rows * num_kv_heads)
        return 1 << (min(MAX_SPLITS, max(1, splits)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Partial results of a row's splits. Launches that follow each other in a stream may share it."""

    sums: torch.Tensor  # [num_programs, group, head_dim] fp32: weighted sums of values
    scales: torch.Tensor  # [num_programs, group, 2] fp32: greatest score in base 2, sum of weights
    arrived: torch.Tensor  # [num_programs] int32, by row and KV head; zeros between launches
    config: LaunchConfig
    has_pdl: bool  # programmatic dependent launch
    has_cvt: bool  # an instruction that converts 8-bit floats

    @classmethod
    def allocate(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, config: LaunchConfig | None = None
    ) -> Workspace:
        """Allocate for any number of rows: where the rows alone make `num_programs` programs, none is split."""
        config = config or LaunchConfig.of(head_dim)
        group = num_heads // num_kv_heads
        return cls(
            sums=torch.empty(config.num_programs, group, head_dim, dtype=torch.float32, device=device),
            scales=torch.empty(config.num_programs, group, 2, dtype=torch.float32, device=device),
            arrived=torch.zeros(config.num_programs, dtype=torch.int32, device=device),
            config=config,
            has_pdl=has_pdl(),
            has_cvt=find_capability() >= FP8_CAPABILITY,
        )


@dataclass(frozen=True, slots=True)
class SuffixPart:
    """Suffix starts of rows with a shared prefix, and outputs that the merge with it needs."""

    starts: torch.Tensor  # [rows] int32, tokens
    lse: torch.Tensor  # [rows, num_heads] fp32, base 2, written
    rotated: torch.Tensor  # [rows, num_heads, head_dim] contiguous, written: q


def find_capability() -> int:
    """Return the compute capability, as 90, that Triton compiles for; 0 in its interpreter and for other vendors."""
    if knobs.runtime.interpret:
        return 0
    target: Any = driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def has_pdl() -> bool:
    """Whether the GPU that Triton compiles for has programmatic dependent launch."""
    return find_capability() >= DEPENDENT_LAUNCH_CAPABILITY


@triton.jit
def _find_split(suffix_start, position, split, num_splits, BLOCK: tl.constexpr):
    """Return how many splits have work, and this split's part of the tokens in [suffix_start, position).

    Scalars in tokens. Parts are whole blocks, except for the last one's.
    """
    count = position - suffix_start
    size = tl.cdiv(tl.cdiv(count, num_splits), BLOCK) * BLOCK
    num_active = tl.maximum(tl.cdiv(count, tl.maximum(size, 1)), 1)
    begin = suffix_start + split * size
    return num_active, begin, tl.minimum(begin + size, position)


@triton.jit
def _attend_tokens(
    q, keys, values, pages, begin, end, k_cache_at, v_cache_at, table_at, page_stride, token_stride, scale,
    top, total, sums, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BY_COLUMNS: tl.constexpr, HAS_CVT: tl.constexpr,
):  # fmt: skip
    """Run the online softmax over all tokens in [begin, end) of one KV head; see `attend_block` for its state.

    `keys` and `values` [BLOCK, HEAD_DIM] are the first block's, `pages` [BLOCK] the second's.
    """
    token = tl.arange(0, BLOCK)
    if BY_COLUMNS:
        q, sums = tl.trans(q), tl.trans(sums)
    for start in tl.range(begin, end, BLOCK):
        # The next block and the pages of the one after it are in flight while this block is worked on.
        following = start + BLOCK + token
        next_keys, next_values = load_tokens(
            k_cache_at, v_cache_at, pages, following, end, page_stride, token_stride, PAGE_SIZE, HEAD_DIM
        )
        pages = load_pages(table_at, following + BLOCK, end, PAGE_SIZE)
        is_inside = start + token < end
        if BY_COLUMNS:
            top, total, sums = attend_block_by_columns(q, keys, values, is_inside, scale, top, total, sums, HAS_CVT)
        else:
            top, total, sums = attend_block(q, keys, values, is_inside, scale, top, total, sums, HAS_CVT)
        keys = next_keys
        values = next_values
    if BY_COLUMNS:
        sums = tl.trans(sums)
    return top, total, sums


@triton.jit
def _merge_splits(
    sums_ptr, scales_ptr, num_active, group, out_at, lse_at,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr, SPLITS: tl.constexpr, IS_PART: tl.constexpr,
):  # fmt: skip
    """Merge all splits of a row and KV head, in their order, and write out [group, HEAD_DIM] (and lse [group]).

    Loads bypass L1 (.cg), because other programs wrote these values through L2.
    """
    head = tl.arange(0, GROUP)
    is_head = head < group
    split = tl.arange(0, SPLITS)[:, None]
    scales_at = scales_ptr + (split * group + head[None, :]) * 2
    inside = (split < num_active) & is_head[None, :]
    tops = tl.load(scales_at, mask=inside, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(scales_at + 1, mask=inside, other=0.0, cache_modifier=".cg")
    top = tl.where(is_head, tl.max(tops, axis=0), 0.0)
    total = tl.where(is_head, tl.sum(tl.exp2(tops - top[None, :]) * totals, axis=0), 1.0)

    column = tl.arange(0, HEAD_DIM)
    merged = tl.zeros((GROUP, HEAD_DIM), tl.float32)
    for begin in tl.range(0, num_active, AT_ONCE):
        some = begin + tl.arange(0, AT_ONCE)
        row = some[:, None] * group + head[None, :]
        is_some = (some < num_active)[:, None] & is_head[None, :]
        top_of = tl.load(scales_ptr + row * 2, mask=is_some, other=float("-inf"), cache_modifier=".cg")
        sums_at = sums_ptr + row[:, :, None] * HEAD_DIM + column[None, None, :]
        sums = tl.load(sums_at, mask=is_some[:, :, None], other=0.0, cache_modifier=".cg")
        merged += tl.sum(sums * tl.exp2(top_of - top[None, :])[:, :, None], axis=0)
    merged = (merged / total[:, None]).to(out_at.dtype.element_ty)
    tl.store(out_at + head[:, None] * HEAD_DIM + column[None, :], merged, mask=is_head[:, None])
    if IS_PART:
        tl.store(lse_at + head, top + tl.log2(total), mask=is_head)


@triton.jit
def _finish(
    sums_ptr, scales_ptr, arrived_at, out_at, lse_at, split, num_active, group, top, total, sums,
    GROUP: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr, SPLITS: tl.constexpr,
    IS_PART: tl.constexpr,
):  # fmt: skip
    """Write the result if there is only this split; else store its part, and merge all parts if it arrives last.

    top, total [TILE] fp32 and sums [TILE, HEAD_DIM] fp32, as in `attend_block`.
    """
    head = tl.arange(0, TILE)
    is_head = head < group
    heads_at = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    if num_active == 1:
        tl.store(out_at + heads_at, (sums / total[:, None]).to(out_at.dtype.element_ty), mask=is_head[:, None])
        if IS_PART:
            tl.store(lse_at + head, top + tl.log2(total), mask=is_head)
    else:
        tl.store(sums_ptr + split * group * HEAD_DIM + heads_at, sums, mask=is_head[:, None])
        scales_at = scales_ptr + (split * group + head) * 2
        tl.store(scales_at, top, mask=is_head)
        tl.store(scales_at + 1, total, mask=is_head)
        # One thread adds for the program. The barrier puts all its threads' stores before that addition, which as a
        # release publishes them to the GPU with its own; as an acquire it sees what the programs that arrived before
        # published, and the second barrier puts the reads of all threads behind it. So the last sees every part.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == num_active - 1:
            _merge_splits(
                sums_ptr, scales_ptr, num_active, group, out_at, lse_at, GROUP, HEAD_DIM, AT_ONCE, SPLITS, IS_PART
            )  # fmt: skip
            tl.store(arrived_at, 0)  # for the next launch, which begins to write when this one has ended


# Head counts are no constants of the kernel, only the power of 2 of a group: few variants serve all models.
@triton.jit(do_not_specialize=["table_stride", "group"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_cache_ptr, v_cache_ptr,
    cos_sin_ptr, slots_ptr, positions_ptr, table_ptr, starts_ptr, lse_ptr, rotated_ptr,
    sums_ptr, scales_ptr, arrived_ptr, scale,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    table_stride, page_stride, token_stride, head_stride, group,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr, SPLITS: tl.constexpr, BY_COLUMNS: tl.constexpr, HAS_CVT: tl.constexpr,
    IS_PART: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    if HAS_PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions_ptr + row)
    slot = tl.load(slots_ptr + row, volatile=True)  # else ptxas moves it behind the wait for the position
    suffix_start = 0
    if IS_PART:
        suffix_start = tl.load(starts_ptr + row, volatile=True)
    num_active, begin, end = _find_split(suffix_start, position, split, tl.num_programs(2), BLOCK)
    if split >= num_active:
        return
    table_at = table_ptr + slot.to(tl.int64) * table_stride
    k_cache_ptr += kv_head * head_stride
    v_cache_ptr += kv_head * head_stride
    token = tl.arange(0, BLOCK)
    pages = load_pages(table_at, begin + token, end, PAGE_SIZE)
    keys, values = load_tokens(
        k_cache_ptr, v_cache_ptr, pages, begin + token, end, page_stride, token_stride, PAGE_SIZE, HEAD_DIM
    )
    pages = load_pages(table_at, begin + BLOCK + token, end, PAGE_SIZE)
    # The last split, the only one that may be short, has the new token: written for later, counted from registers.
    is_new = split == num_active - 1
    page = tl.load(table_at + position // PAGE_SIZE).to(tl.int64)
    new = page * page_stride + (position % PAGE_SIZE) * token_stride
    cos, sin = load_angles(cos_sin_ptr, position, HEAD_DIM)
    if HAS_PDL:
        gdc_wait()  # what kernels of this step wrote is read below alone, and nothing is written above

    q_at = q_ptr + row * q_row_stride + kv_head * group * q_head_stride
    k_at = k_ptr + row * k_row_stride + kv_head * k_head_stride
    v_at = v_ptr + row * v_row_stride + kv_head * v_head_stride
    q_a, q_b, k_a, k_b, value = load_heads(q_at, k_at, v_at, q_head_stride, group, is_new, TILE, HEAD_DIM)
    q_a, q_b, k_a, k_b = rotate_heads(q_a, q_b, k_a, k_b, cos, sin)
    append(k_cache_ptr + new, v_cache_ptr + new, k_a, k_b, value, is_new, HEAD_DIM)
    pair = row * tl.num_programs(1) + kv_head
    if IS_PART:
        give_back(rotated_ptr + pair * group * HEAD_DIM, q_a, q_b, group, is_new, TILE, HEAD_DIM)
    top, total, sums = attend_new(q_a, q_b, k_a, k_b, value, is_new, scale, TILE, HEAD_DIM)
    q = to_operand(join_halves(q_a, q_b, TILE, HEAD_DIM), k_cache_ptr.dtype.element_ty)
    top, total, sums = _attend_tokens(
        q, keys, values, pages, begin, end, k_cache_ptr, v_cache_ptr, table_at, page_stride, token_stride, scale,
        top, total, sums, PAGE_SIZE, HEAD_DIM, BLOCK, BY_COLUMNS, HAS_CVT,
    )  # fmt: skip
    first = pair * tl.num_programs(2) * group
    _finish(
        sums_ptr + first * HEAD_DIM, scales_ptr + first * 2, arrived_ptr + pair, out_ptr + pair * group * HEAD_DIM,
        lse_ptr + pair * group, split, num_active, group, top, total, sums,
        GROUP, TILE, HEAD_DIM, AT_ONCE, SPLITS, IS_PART,
    )  # fmt: skip


def attend_decode(
    q: torch.Tensor,  # [S, num_heads, head_dim] before RoPE, last dimension contiguous
    k: torch.Tensor,  # [S, num_kv_heads, head_dim] before RoPE
    v: torch.Tensor,  # [S, num_kv_heads, head_dim]
    cos_sin: torch.Tensor,  # [max_positions, head_dim] fp32: cos in the first half, sin in the second
    slots: torch.Tensor,  # [S] int32
    positions: torch.Tensor,  # [S] int32
    block_table: torch.Tensor,  # [max_seqs + 1, columns] int32
    k_cache: torch.Tensor,  # [pages, page_size, num_kv_heads, head_dim], any strides but the last, q's dtype or e4m3
    v_cache: torch.Tensor,  # like k_cache, same strides
    out: torch.Tensor,  # [S, num_heads, head_dim] contiguous
    work: Workspace,
    scale: float,
    part: SuffixPart | None = None,
) -> None:
    """Write each row's K (rotated) and V to the page of its position, and its attention over 0..position to `out`.

    With `part` it attends to the row's suffix only, which has at least the new token, and writes q rotated. head_dim is
    a power of 2, at least 32. Rows of the same slot are padding: what they write to its page is arbitrary, so the page
    must belong to nobody. The same arguments give the same bits.

    With programmatic dependent launch this kernel starts before earlier ones have ended, and waits for them before it
    reads q, k and v or writes anything. Before the wait it reads `slots`, `positions`, the table, `cos_sin` and tokens
    of earlier steps: between whatever wrote these and this launch there must be one without programmatic dependent
    launch, such as the first kernel of a graph. Dependent launches after this one must wait themselves.
    """
    rows, num_heads, head_dim = q.shape
    if not rows:
        return
    num_kv_heads, config = k.shape[1], work.config
    group = num_heads // num_kv_heads
    padded_group = next_power_of_2(group)
    tensors = (
        q, k, v, out, k_cache, v_cache, cos_sin, slots, positions, block_table,
        slots if part is None else part.starts,
        work.scales if part is None else part.lse,
        out if part is None else part.rotated,
    )  # fmt: skip
    strides = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        block_table.stride(0), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), group,
    )  # fmt: skip
    options: dict[str, Any] = {
        "PAGE_SIZE": k_cache.shape[1], "HEAD_DIM": head_dim, "HAS_CVT": work.has_cvt,
        "IS_PART": part is not None, "HAS_PDL": work.has_pdl, "num_stages": 1,
        **({"launch_pdl": True} if work.has_pdl else {}),
    }  # fmt: skip
    heads = 0 if config.short is None else config.short.count_heads(rows, num_kv_heads, group, part is not None)
    if config.short is not None and heads:
        attend_rows_kernel[(rows, num_kv_heads // heads)](
            *tensors, scale * _LOG2_E, *strides, heads,
            BLOCK=config.short.block_tokens, num_warps=config.short.num_warps,
            maxnreg=config.short.most_registers, **_arrange_heads(config.short.by_columns, padded_group), **options,
        )  # fmt: skip
        return
    _attend_kernel[(rows, num_kv_heads, config.count_splits(rows, num_kv_heads))](
        *tensors, work.sums, work.scales, work.arrived, scale * _LOG2_E, *strides,
        GROUP=padded_group, AT_ONCE=max(1, min(MAX_SPLITS, _MERGED_AT_ONCE // (padded_group * head_dim))),
        SPLITS=MAX_SPLITS, BLOCK=config.block_tokens, num_warps=config.num_warps,
        **_arrange_heads(config.by_columns, padded_group), **options,
    )  # fmt: skip


def _arrange_heads(by_columns: bool, padded_group: int) -> dict[str, Any]:
    """Return how the query heads of a KV head lie in a product."""
    return {"BY_COLUMNS": by_columns, "TILE": max(_MIN_COLUMNS if by_columns else _MIN_TILE, padded_group)}
