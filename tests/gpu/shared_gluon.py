"""A candidate for attention over shared tokens: warp-specialised, in Gluon. Not in the engine; see bench_shared_gluon.

One program a processor: a warp brings keys and values by TMA, a page a copy, and each warpgroup has rows of its own,
without a barrier between them. Of one group, of whole blocks; parts of tiles that programs share are left unmerged.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _find_segment(unit, end, num_blocks, num_tiles):
    """Of the tile that has the unit: its KV head, its place among the head's, and the blocks of it that come next."""
    begin_block = unit % num_blocks
    tile = (unit // num_blocks) % num_tiles
    kv_head = unit // num_blocks // num_tiles
    return kv_head, tile, begin_block, gl.minimum(num_blocks, begin_block + end - unit)


@gluon.jit
def _bring(
    load, ring,
    KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, STAGES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """One warp: all blocks that the program's units need, in their order."""
    k_desc, v_desc, table_ptr = load
    keys, values, k_full, k_empty, v_full, v_empty, unit, end, num_blocks, num_tiles = ring
    BLOCK: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    PAGES: gl.constexpr = BLOCK // PAGE_SIZE
    count = 0
    while unit < end:
        kv_head, _, begin_block, end_block = _find_segment(unit, end, num_blocks, num_tiles)
        for block in range(begin_block, end_block):
            stage = count % STAGES
            phase = (count // STAGES) & 1
            k_at, v_at = keys.index(stage), values.index(stage)
            k_ready, v_ready = k_full.index(stage), v_full.index(stage)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_ready, BLOCK * HEAD_DIM * 2)
            for page in gl.static_range(PAGES):
                row = (gl.load(table_ptr + block * PAGES + page) * KV_HEADS + kv_head) * PAGE_SIZE
                for box in gl.static_range(HEAD_DIM // BOX):
                    to = k_at.slice(page * PAGE_SIZE, PAGE_SIZE, 0).slice(box * BOX, BOX, 1)
                    tma.async_copy_global_to_shared(k_desc, [row, box * BOX], k_ready, to)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_ready, BLOCK * HEAD_DIM * 2)
            for page in gl.static_range(PAGES):
                row = (gl.load(table_ptr + block * PAGES + page) * KV_HEADS + kv_head) * PAGE_SIZE
                for box in gl.static_range(HEAD_DIM // BOX):
                    to = v_at.slice(page * PAGE_SIZE, PAGE_SIZE, 0).slice(box * BOX, BOX, 1)
                    tma.async_copy_global_to_shared(v_desc, [row, box * BOX], v_ready, to)
            count += 1
        unit += end_block - begin_block


@gluon.jit
def _weigh(scores, scale, top, total, WEIGHTS: gl.constexpr, DTYPE: gl.constexpr):
    """The new greatest score and sum of weights, by how much what was summed before shrinks, and the weights."""
    new_top = gl.maximum(top, gl.max(scores, axis=1) * scale)
    kept = gl.exp2(top - new_top)
    weights = gl.exp2(scores * scale - new_top[:, None])
    total = total * kept + gl.sum(weights, axis=1)
    return new_top, total, kept, gl.convert_layout(weights.to(DTYPE), WEIGHTS)


@gluon.jit
def _scores(q, keys, k_full, count, ROWS: gl.constexpr, SCORES: gl.constexpr, STAGES: gl.constexpr):
    """Begin a block's products with the queries, once its keys are there."""
    BLOCK: gl.constexpr = keys.shape[1]
    _wait_for(k_full, count, STAGES)
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    return warpgroup_mma(q, keys.index(count % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _wait_for(full, count, STAGES: gl.constexpr):
    mbarrier.wait(full.index(count % STAGES), (count // STAGES) & 1)


@gluon.jit
def _attend_blocks(
    q, keys, values, k_full, k_empty, v_full, v_empty, count, num_blocks, scale, top, total, sums,
    ROWS: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr, WEIGHTS: gl.constexpr,
    STAGES: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """The greatest score, sum of weights and weighted sums with `num_blocks` blocks more; `count` came before them."""
    DTYPE: gl.constexpr = keys.dtype
    if OVERLAPS:
        scores = warpgroup_mma_wait(0, [_scores(q, keys, k_full, count, ROWS, SCORES, STAGES)])
        mbarrier.arrive(k_empty.index(count % STAGES), count=1)
        top, total, kept, weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
        sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, SUMS))[:, None]
        _wait_for(v_full, count, STAGES)
        for each in range(count + 1, count + num_blocks):
            begun = _scores(q, keys, k_full, each, ROWS, SCORES, STAGES)
            added = warpgroup_mma(weights, values.index((each - 1) % STAGES), sums, is_async=True)
            scores = warpgroup_mma_wait(1, [begun])
            mbarrier.arrive(k_empty.index(each % STAGES), count=1)
            top, total, kept, next_weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
            # The next weights are made before the sums are waited for: without a branch (of the wait for values)
            # between them, and without being named in the second wait, they would be made behind it.
            _wait_for(v_full, each, STAGES)
            sums, weights, next_weights = warpgroup_mma_wait(0, [added, weights, next_weights])
            mbarrier.arrive(v_empty.index((each - 1) % STAGES), count=1)
            sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, SUMS))[:, None]
            weights = next_weights
        last = count + num_blocks - 1
        sums = warpgroup_mma_wait(0, [warpgroup_mma(weights, values.index(last % STAGES), sums, is_async=True)])
        mbarrier.arrive(v_empty.index(last % STAGES), count=1)
    else:
        for each in range(count, count + num_blocks):
            scores = warpgroup_mma_wait(0, [_scores(q, keys, k_full, each, ROWS, SCORES, STAGES)])
            mbarrier.arrive(k_empty.index(each % STAGES), count=1)
            top, total, kept, weights = _weigh(scores, scale, top, total, WEIGHTS, DTYPE)
            sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, SUMS))[:, None]
            _wait_for(v_full, each, STAGES)
            sums = warpgroup_mma_wait(0, [warpgroup_mma(weights, values.index(each % STAGES), sums, is_async=True)])
            mbarrier.arrive(v_empty.index(each % STAGES), count=1)
    return top, total, sums


@gluon.jit
def _find_heads(
    tile, kv_head, num_rows, WHICH: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr,
    HEADS: gl.constexpr, HEADS_PER_KV: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of each of this warpgroup's pairs of row and head: its place in [rows, heads], and whether it is one."""
    pair = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, layout=LAYOUT)
    row = pair // HEADS_PER_KV
    return row * HEADS + kv_head * HEADS_PER_KV + pair % HEADS_PER_KV, row < num_rows


@gluon.constexpr_function
def _choose_layout(scores, keeps_q):
    """Of the queries as they are read: as products take them from registers, or in pieces of 16 bytes."""
    return gl.DotOperandLayout(0, scores, 2) if keeps_q else gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _multiply(
    work, ring, q_buffer,
    WHICH: gl.constexpr, TILE: gl.constexpr, HEADS: gl.constexpr, HEADS_PER_KV: gl.constexpr,
    STAGES: gl.constexpr, OVERLAPS: gl.constexpr, KEEPS_Q: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its rows of all tiles that the program has blocks of."""
    q_ptr, out_ptr, lse_ptr, sums_ptr, scales_ptr, num_rows, scale = work
    keys, values, k_full, k_empty, v_full, v_empty, unit, end, num_blocks, num_tiles = ring
    ROWS: gl.constexpr = q_buffer.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    QUERIES: gl.constexpr = _choose_layout(SCORES, KEEPS_Q)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    count = 0
    while unit < end:
        kv_head, tile, begin_block, end_block = _find_segment(unit, end, num_blocks, num_tiles)
        is_first = begin_block == 0
        place, is_head = _find_heads(
            tile, kv_head, num_rows, WHICH, TILE, ROWS, HEADS, HEADS_PER_KV, gl.SliceLayout(1, QUERIES)
        )
        column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, QUERIES))
        q = gl.load(q_ptr + place[:, None] * HEAD_DIM + column[None, :], mask=is_head[:, None], other=0.0)
        place, is_head = _find_heads(
            tile, kv_head, num_rows, WHICH, TILE, ROWS, HEADS, HEADS_PER_KV, gl.SliceLayout(1, SUMS)
        )
        column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, SUMS))
        out_at = place[:, None] * HEAD_DIM + column[None, :]
        sums = gl.load(out_ptr + out_at, mask=is_head[:, None] & is_first, other=0.0).to(gl.float32)
        row_place, is_row = _find_heads(
            tile, kv_head, num_rows, WHICH, TILE, ROWS, HEADS, HEADS_PER_KV, gl.SliceLayout(1, SCORES)
        )
        top = gl.load(lse_ptr + row_place, mask=is_row & is_first, other=float("-inf"))
        total = gl.where(is_row & is_first, 1.0, 0.0)
        if KEEPS_Q:
            top, total, sums = _attend_blocks(
                q, keys, values, k_full, k_empty, v_full, v_empty, count, end_block - begin_block, scale,
                top, total, sums, ROWS, SCORES, SUMS, WEIGHTS, STAGES, OVERLAPS,
            )  # fmt: skip
        else:
            q_buffer.store(q)
            fence_async_shared()
            top, total, sums = _attend_blocks(
                q_buffer, keys, values, k_full, k_empty, v_full, v_empty, count, end_block - begin_block, scale,
                top, total, sums, ROWS, SCORES, SUMS, WEIGHTS, STAGES, OVERLAPS,
            )  # fmt: skip
        count += end_block - begin_block
        if end_block - begin_block == num_blocks:
            sums = sums / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
            gl.store(out_ptr + out_at, sums.to(out_ptr.dtype.element_ty), mask=is_head[:, None])
            gl.store(lse_ptr + row_place, top + gl.log2(total), mask=is_row)
        else:
            part = 2 * gl.program_id(0) + is_first.to(gl.int32)
            sums_row = part * TILE + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
            gl.store(sums_ptr + sums_row[:, None] * HEAD_DIM + column[None, :], sums)
            scales_at = scales_ptr + part * 2 * TILE + WHICH * ROWS + row
            gl.store(scales_at, top)
            gl.store(scales_at + TILE, total)
        unit += end_block - begin_block


@gluon.jit(do_not_specialize=["num_blocks", "num_tiles", "num_rows", "share", "num_units"])
def specialised_kernel(
    q_ptr, k_desc, v_desc, table_ptr, out_ptr, lse_ptr, sums_ptr, scales_ptr,
    scale, num_blocks, num_tiles, num_rows, share, num_units,
    HEAD_DIM: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr,
    GROUPS: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, REGISTERS: gl.constexpr,
    STAGES: gl.constexpr, BOX: gl.constexpr, OVERLAPS: gl.constexpr, KEEPS_Q: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILE: gl.constexpr = GROUPS * ROWS
    PER_KV: gl.constexpr = HEADS // KV_HEADS
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, HEAD_DIM], LAYOUT)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, HEAD_DIM], LAYOUT)
    queries = gl.allocate_shared_memory(DTYPE, [GROUPS, ROWS, HEAD_DIM], LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
        mbarrier.init(v_empty.index(stage), count=GROUPS)
    fence_async_shared()
    unit = gl.program_id(0) * share
    end = gl.minimum(unit + share, num_units)
    # Constants are named in each call's tuple: in a variable of this function they would be no constants any more.
    ring = (keys, values, k_full, k_empty, v_full, v_empty, unit, end, num_blocks, num_tiles)
    work = (q_ptr, out_ptr, lse_ptr, sums_ptr, scales_ptr, num_rows, scale)
    load = (k_desc, v_desc, table_ptr)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (work, ring, queries.index(0), 0, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_multiply, (work, ring, queries.index(1), 1, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_bring, (load, ring, KV_HEADS, PAGE_SIZE, STAGES, BOX)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    elif GROUPS == 3:
        gl.warp_specialize(
            [
                (_multiply, (work, ring, queries.index(0), 0, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_multiply, (work, ring, queries.index(1), 1, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_multiply, (work, ring, queries.index(2), 2, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_bring, (load, ring, KV_HEADS, PAGE_SIZE, STAGES, BOX)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (work, ring, queries.index(0), 0, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_multiply, (work, ring, queries.index(1), 1, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_multiply, (work, ring, queries.index(2), 2, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_multiply, (work, ring, queries.index(3), 3, TILE, HEADS, PER_KV, STAGES, OVERLAPS, KEEPS_Q)),
                (_bring, (load, ring, KV_HEADS, PAGE_SIZE, STAGES, BOX)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )
