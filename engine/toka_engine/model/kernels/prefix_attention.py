"""Attention of decode rows to shared prefixes (Hydragen), merged with each row's attention to its suffix.

One launch per layer, whose number of programs depends on the GPU alone: the work of all groups is divided into units,
each a block of keys for a tile of query heads, and each program takes an equal share of units, across tiles. So all
SMs stay busy to the end for any rows and lengths, the host computes only running sums (`prefix_groups.pack_groups`),
and a CUDA graph of the launch holds for any groups. This is the kernel for any GPU, `prefix_hopper` the one for Hopper.
Not here: RoPE, suffixes, and which rows form groups.

Algorithm: Hydragen's split by prefix (Juravsky et al. 2024); FlashAttention's online softmax (Dao et al. 2022) in base
2, started from a row's suffix; Stream-K's even split (Osama et al. 2023), for attention LeanAttention (2024).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toka_engine.model.kernels.decode_attention_common import to_operand
from toka_engine.model.kernels.prefix_groups import ARRAYS, HEADER, PrefixWorkspace
from toka_engine.model.kernels.prefix_hopper import attend_prefix_hopper

_LOG2_E = 1.4426950408889634
_SEARCHED_AT_ONCE = 256


@triton.jit
def _find_group(unit_ends_ptr, unit, count, AT_ONCE: tl.constexpr):
    """Return the index of the group that has the unit."""
    group = 0
    for begin in tl.range(0, count, AT_ONCE):
        some = begin + tl.arange(0, AT_ONCE)
        ends = tl.load(unit_ends_ptr + some, mask=some < count, other=2147483647)
        group += tl.sum((ends <= unit).to(tl.int32), axis=0)
    return group


@triton.jit
def _find_heads(tile, kv_head, first_row, num_rows, num_heads, heads_per_kv, BLOCK_ROWS: tl.constexpr):
    """Return each (row, head) pair's index into [rows, num_heads], [BLOCK_ROWS] int64, and whether the pair exists.

    Pairs follow each other without gaps, so that 5 or 7 heads per KV head waste nothing of a tile.
    """
    pair = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # A division, exact up to 2 ** 21 pairs: the half is more than floats err by. Of integers it takes 20 instructions.
    row = ((pair.to(tl.float32) + 0.5) * (1.0 / heads_per_kv)).to(tl.int32)
    place = (first_row + row).to(tl.int64) * num_heads + kv_head * heads_per_kv + pair - row * heads_per_kv
    return place, row < num_rows


@triton.jit
def _load_pages(table_at, block, last_column, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load the page [BLOCK] of each token of a block; the last page beyond the end."""
    column = (block * BLOCK + tl.arange(0, BLOCK)) // PAGE_SIZE
    return tl.load(table_at + tl.minimum(column, last_column))


@triton.jit
def _find_tokens(
    pages, block, page_stride, token_stride, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the offsets [BLOCK, HEAD_DIM] of a block's keys and values. Beyond the end there is memory, too."""
    within = (block * BLOCK + tl.arange(0, BLOCK)) % PAGE_SIZE
    offset = pages.to(tl.int64) * page_stride + within * token_stride
    return offset[:, None] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _weigh(scores, scale, top, total):
    """Return the new maximum [rows] and sum of weights [rows], the factor [rows] for earlier sums, and the weights.

    scores and weights [rows, BLOCK] fp32; the maximum is in base 2.
    """
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    kept = tl.exp2(top - new_top)
    weights = tl.exp2(scores * scale - new_top[:, None])
    return new_top, total * kept + tl.sum(weights, axis=1), kept, weights


@triton.jit
def _hide_end(scores, block, num_tokens, BLOCK: tl.constexpr):
    """Set scores [rows, BLOCK] of tokens beyond the end to -inf."""
    return tl.where((block * BLOCK + tl.arange(0, BLOCK) < num_tokens)[None, :], scores, float("-inf"))


@triton.jit
def _attend_blocks(
    q, k_at, v_at, table_at, pages, begin, end, last_column, page_stride, token_stride, scale, top, total, sums,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Advance the online softmax by blocks begin..end-1; `pages` [BLOCK] are the first one's.

    The state is top, total [rows] and sums [rows, HEAD_DIM], fp32. Only the last block may be short, and is handled
    separately: the others take no masks.
    """
    num_tokens = (last_column + 1) * PAGE_SIZE
    num_full = tl.minimum(end, num_tokens // BLOCK)
    for block in tl.range(begin, num_full, num_stages=STAGES):
        at = _find_tokens(pages, block, page_stride, token_stride, PAGE_SIZE, HEAD_DIM, BLOCK)
        keys = tl.load(k_at + at).to(q.dtype)
        values = tl.load(v_at + at).to(q.dtype)
        pages = _load_pages(table_at, block + 1, last_column, PAGE_SIZE, BLOCK)
        top, total, kept, weights = _weigh(tl.dot(q, tl.trans(keys)), scale, top, total)
        sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
    if num_full < end:
        at = _find_tokens(pages, num_full, page_stride, token_stride, PAGE_SIZE, HEAD_DIM, BLOCK)
        keys = tl.load(k_at + at).to(q.dtype)
        values = tl.load(v_at + at).to(q.dtype)
        scores = _hide_end(tl.dot(q, tl.trans(keys)), num_full, num_tokens, BLOCK)
        top, total, kept, weights = _weigh(scores, scale, top, total)
        sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
    return top, total, sums


@triton.jit
def _write(out_ptr, lse_ptr, place, is_head, top, total, sums, HEAD_DIM: tl.constexpr):
    """Write a tile's results: out [rows, num_heads, HEAD_DIM] and lse [rows, num_heads] at the indices `place`."""
    at = out_ptr + place[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(at, (sums * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty), mask=is_head[:, None])
    tl.store(lse_ptr + place, top + tl.log2(total), mask=is_head)


@triton.jit
def _merge_parts(sums_ptr, scales_ptr, first, last, BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Merge the parts of a tile that programs first..last share, in their order.

    These are the first program's last part and the first part of each other one. Loads bypass L1 (.cg), because other
    programs wrote these values through L2. Returns top, total [BLOCK_ROWS] and sums [BLOCK_ROWS, HEAD_DIM].
    """
    row = tl.arange(0, BLOCK_ROWS)
    at = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    part = 2 * first + 1
    top = tl.load(scales_ptr + part * 2 * BLOCK_ROWS + row, cache_modifier=".cg")
    total = tl.load(scales_ptr + (part * 2 + 1) * BLOCK_ROWS + row, cache_modifier=".cg")
    sums = tl.load(sums_ptr + part * BLOCK_ROWS * HEAD_DIM + at, cache_modifier=".cg")
    for program in tl.range(first + 1, last + 1):
        part = 2 * program
        other_top = tl.load(scales_ptr + part * 2 * BLOCK_ROWS + row, cache_modifier=".cg")
        other_total = tl.load(scales_ptr + (part * 2 + 1) * BLOCK_ROWS + row, cache_modifier=".cg")
        other_sums = tl.load(sums_ptr + part * BLOCK_ROWS * HEAD_DIM + at, cache_modifier=".cg")
        new_top = tl.maximum(top, other_top)
        kept, weight = tl.exp2(top - new_top), tl.exp2(other_top - new_top)
        total = total * kept + other_total * weight
        sums = sums * kept[:, None] + other_sums * weight[:, None]
        top = new_top
    return top, total, sums


@triton.jit
def _finish(
    out_ptr, lse_ptr, sums_ptr, scales_ptr, arrived_ptr, place, is_head, is_first, first, last, top, total, sums,
    BLOCK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write the tile if this program has all of it; else store its part, and merge all parts if it arrives last."""
    if first == last:
        _write(out_ptr, lse_ptr, place, is_head, top, total, sums, HEAD_DIM)
    else:
        row = tl.arange(0, BLOCK_ROWS)
        part = 2 * tl.program_id(0) + is_first.to(tl.int32)
        at = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        tl.store(sums_ptr + part * BLOCK_ROWS * HEAD_DIM + at, sums)
        tl.store(scales_ptr + part * 2 * BLOCK_ROWS + row, top)
        tl.store(scales_ptr + (part * 2 + 1) * BLOCK_ROWS + row, total)
        # As in decode_attention._finish: the barriers and one thread's addition put all stores of all programs that
        # arrived before in front of the last one's reads.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + first, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == last - first:
            top, total, sums = _merge_parts(sums_ptr, scales_ptr, first, last, BLOCK_ROWS, HEAD_DIM)
            _write(out_ptr, lse_ptr, place, is_head, top, total, sums, HEAD_DIM)
            tl.store(arrived_ptr + first, 0)  # for the next launch, which begins to write when this one has ended


@triton.jit(do_not_specialize=["capacity", "table_stride", "num_heads", "num_kv_heads"])
def _shared_kernel(
    q_ptr, words_ptr, table_ptr, k_cache_ptr, v_cache_ptr, out_ptr, lse_ptr, sums_ptr, scales_ptr, arrived_ptr, scale,
    capacity, table_stride, page_stride, token_stride, head_stride, num_heads, num_kv_heads,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, HEADER: tl.constexpr, AT_ONCE: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    if HAS_PDL:
        gdc_launch_dependents()
    count = tl.load(words_ptr)
    num_units = tl.load(words_ptr + 1)
    share = tl.load(words_ptr + 2)
    arrays_ptr = words_ptr + HEADER
    unit = tl.program_id(0) * share
    end = tl.minimum(unit + share, num_units)
    group = _find_group(arrays_ptr + 5 * capacity, unit, count, AT_ONCE)
    if HAS_PDL:
        gdc_wait()  # what kernels of this step wrote is read below only; programs without work wait for later kernels
    heads_per_kv = num_heads // num_kv_heads
    while unit < end:
        # A group has a unit at least, so the next unit is in this one or the next one.
        group += (tl.load(arrays_ptr + 5 * capacity + group) <= unit).to(tl.int32)
        at = arrays_ptr + group
        first_row, num_rows, slot = tl.load(at), tl.load(at + capacity), tl.load(at + 2 * capacity)
        first_column, num_columns = tl.load(at + 3 * capacity), tl.load(at + 4 * capacity)
        num_blocks = tl.cdiv(num_columns * PAGE_SIZE, BLOCK)
        num_tiles = tl.cdiv(num_rows * heads_per_kv, BLOCK_ROWS)
        within = unit - (tl.load(at + 5 * capacity) - num_blocks * num_tiles * num_kv_heads)
        begin_block = within % num_blocks
        end_block = tl.minimum(num_blocks, begin_block + end - unit)
        tile = (within // num_blocks) % num_tiles
        kv_head = within // num_blocks // num_tiles
        is_first = begin_block == 0

        # All loads before their first use, so that they are in flight together.
        table_at = table_ptr + slot.to(tl.int64) * table_stride + first_column
        pages = _load_pages(table_at, begin_block, num_columns - 1, PAGE_SIZE, BLOCK)
        place, is_head = _find_heads(tile, kv_head, first_row, num_rows, num_heads, heads_per_kv, BLOCK_ROWS)
        heads_at = place[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        q = to_operand(
            tl.load(q_ptr + heads_at, mask=is_head[:, None], other=0.0), k_cache_ptr.dtype.element_ty
        )  # fmt: skip
        # The part with a tile's first keys starts from the rows' suffixes, the others from nothing.
        sums = tl.load(out_ptr + heads_at, mask=is_head[:, None] & is_first, other=0.0).to(tl.float32)
        top = tl.load(lse_ptr + place, mask=is_head & is_first, other=float("-inf"))
        total = tl.where(is_head & is_first, 1.0, 0.0)
        k_at, v_at = k_cache_ptr + kv_head * head_stride, v_cache_ptr + kv_head * head_stride
        top, total, sums = _attend_blocks(
            q, k_at, v_at, table_at, pages, begin_block, end_block, num_columns - 1, page_stride, token_stride, scale,
            top, total, sums, PAGE_SIZE, HEAD_DIM, BLOCK, STAGES,
        )  # fmt: skip
        # Computed again, from words read again: otherwise the indices stay in registers that blocks need.
        first_row, num_rows = tl.load(at, volatile=True), tl.load(at + capacity, volatile=True)
        place, is_head = _find_heads(tile, kv_head, first_row, num_rows, num_heads, heads_per_kv, BLOCK_ROWS)
        begin_unit = unit - begin_block
        _finish(
            out_ptr, lse_ptr, sums_ptr, scales_ptr, arrived_ptr, place, is_head, is_first,
            begin_unit // share, (begin_unit + num_blocks - 1) // share, top, total, sums, BLOCK_ROWS, HEAD_DIM,
        )  # fmt: skip
        unit += end_block - begin_block


def attend_prefix(
    rotated: torch.Tensor,  # [rows, num_heads, head_dim] contiguous: q
    groups: torch.Tensor,  # [packed_size(capacity)] int32, as pack_groups makes them for `work`
    block_table: torch.Tensor,  # [max_seqs + 1, columns] int32
    k_cache: torch.Tensor,  # [pages, page_size, num_kv_heads, head_dim], any strides but the last
    v_cache: torch.Tensor,  # like k_cache, same strides
    out: torch.Tensor,  # [rows, num_heads, head_dim] contiguous, written
    lse: torch.Tensor,  # [rows, num_heads] fp32, base 2, finite, written
    work: PrefixWorkspace,
    scale: float,  # above 0
) -> None:
    """Merge attention to each group's shared prefix into `out` and `lse`; rows without a group stay as they are.

    Nested groups take one call per level. head_dim is a power of 2, 16 to 256. The same arguments give the same bits.

    With programmatic dependent launch this kernel starts before earlier ones have ended, and reads `groups` before it
    waits for them: between what wrote these and this launch there must be one without programmatic dependent launch.
    Dependent launches after this one must wait themselves.
    """
    head_dim, config = rotated.shape[2], work.config
    if config.num_warpgroups:
        attend_prefix_hopper(rotated, groups, block_table, k_cache, v_cache, out, lse, work, scale)
        return
    _shared_kernel[(work.num_programs,)](
        rotated, groups, block_table, k_cache, v_cache, out, lse, work.sums, work.scales, work.arrived,
        scale * _LOG2_E, (groups.shape[0] - HEADER) // ARRAYS,
        block_table.stride(0), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        work.num_heads, work.num_kv_heads,
        PAGE_SIZE=k_cache.shape[1], HEAD_DIM=head_dim, BLOCK_ROWS=config.block_rows, BLOCK=config.block_tokens,
        STAGES=config.num_stages, HEADER=HEADER, AT_ONCE=_SEARCHED_AT_ONCE,
        HAS_PDL=work.has_pdl, num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
        **({"launch_pdl": True} if work.has_pdl else {}),
    )  # fmt: skip
