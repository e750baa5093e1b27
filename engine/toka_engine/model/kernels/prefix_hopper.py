"""Attention to shared prefixes on Hopper GPUs: `prefix_attention`'s computation with warp specialisation, in Gluon.

One program per SM. A producer warp loads blocks of keys and values by TMA, one page per copy, and three consumer
warpgroups, each with its own rows, multiply them without a barrier between each other: while one computes exponentials,
the others use the tensor cores. Results, the division of work and the arguments of a launch are the same.

After FlashAttention-3 (Shah et al. 2024). Its other techniques, starting the next block's scores before this block's
values are summed and ping-pong scheduling, gained nothing here (docs/lab/attention.md).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toka_engine.model.kernels.prefix_groups import PrefixWorkspace
from toka_engine.model.kernels.prefix_hopper_blocks import attend, let_pass, shrink
from toka_engine.model.kernels.prefix_hopper_segments import (
    find_end,
    find_group,
    find_heads,
    find_next,
    find_pages,
    find_tile,
    measure,
)

_LOG2_E = 1.4426950408889634
_BOX = 64
"""Values of a row per TMA copy: 128 bytes, as wide as the swizzle."""
_SEARCHED_AT_ONCE = 256
_LINES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Layout for reading and writing rows of heads in global memory: 8 threads have 128 consecutive bytes."""
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


# ---------------------------------------------------------------- producer warp


@gluon.jit
def _bring_block(
    desc, place, ready, table_at, block, last_column, kv_head, num_kv_heads, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr
):
    """Start the copies of a block's keys or values to an empty stage `place` [BLOCK, HEAD_DIM].

    Columns beyond the end read the last page again: what lies beyond may belong to any sequence.
    """
    BLOCK: gl.constexpr = place.shape[0]
    HEAD_DIM: gl.constexpr = place.shape[1]
    PAGES: gl.constexpr = BLOCK // PAGE_SIZE
    mbarrier.expect(ready, BLOCK * HEAD_DIM * 2)
    for page in gl.static_range(PAGES):
        column = gl.minimum(block * PAGES + page, last_column)
        row = (gl.load(table_at + column) * num_kv_heads + kv_head) * PAGE_SIZE
        for box in gl.static_range(HEAD_DIM // BOX):
            part = place.slice(page * PAGE_SIZE, PAGE_SIZE, 0).slice(box * BOX, BOX, 1)
            tma.async_copy_global_to_shared(desc, [row, box * BOX], ready, part)


@gluon.jit
def _bring(
    cache, words_ptr, work, ring,
    TILE: gl.constexpr, TILE_COST: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Load all blocks of the program's units, in their order. Runs in one warp."""
    # What kernels of this step wrote is read after this only. All warps wait, also those of programs without work,
    # for whose end later kernels wait.
    gdc_wait()
    k_desc, v_desc, table_ptr, table_stride = cache
    group, unit = work
    keys, values, k_full, v_full, empty = ring
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    num_kv_heads = gl.load(words_ptr + 4)
    count = 0
    unit, kv_head, tile, begin_block = find_tile(words_ptr, group, unit, BLOCK, TILE, PAGE_SIZE, TILE_COST)
    while unit < find_end(words_ptr):
        num_pairs, num_tokens, num_blocks = measure(words_ptr, group, BLOCK, PAGE_SIZE)
        end_block = gl.minimum(num_blocks, begin_block + find_end(words_ptr) - unit)
        table_at = find_pages(words_ptr, group, table_ptr, table_stride)
        last_column = num_tokens // PAGE_SIZE - 1
        for block in range(begin_block, end_block):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            _bring_block(
                k_desc, keys.index(stage), k_full.index(stage), table_at, block, last_column, kv_head, num_kv_heads,
                PAGE_SIZE, BOX,
            )  # fmt: skip
            _bring_block(
                v_desc, values.index(stage), v_full.index(stage), table_at, block, last_column, kv_head, num_kv_heads,
                PAGE_SIZE, BOX,
            )  # fmt: skip
            count += 1
        unit += end_block - begin_block + TILE_COST
        begin_block = gl.to_tensor(0)
        group, kv_head, tile = find_next(words_ptr, group, kv_head, tile, num_pairs, TILE)


# ---------------------------------------------------------------- consumer warpgroups


@gluon.jit
def _write(
    rows, where, q_buffer, top, total, sums,
    WHICH: gl.constexpr, TILE: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's results as full lines, through the shared memory of the queries, which it no longer needs."""
    _, words_ptr, out_ptr, lse_ptr = rows
    ROWS: gl.constexpr = sums.shape[0]
    HEAD_DIM: gl.constexpr = sums.shape[1]
    place, is_head = find_heads(words_ptr, where, WHICH, TILE, ROWS, gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + place, top + gl.log2(total), mask=is_head)
    q_buffer.store(shrink(sums, 1.0 / total, SUMS).to(q_buffer.dtype))
    place, is_head = find_heads(words_ptr, where, WHICH, TILE, ROWS, gl.SliceLayout(1, _LINES))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, _LINES))
    gl.store(out_ptr + place[:, None] * HEAD_DIM + column[None, :], q_buffer.load(_LINES), mask=is_head[:, None])


@gluon.jit
def _place_sums(
    part, WHICH: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, SUMS: gl.constexpr
):
    """Return the offsets of a warpgroup's part: what a warp holds in one register is one line of memory."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, SUMS))
    # In registers 16 rows of a warp are twice 8, and columns are pairs of 8.
    by_row = (row // 16 * (HEAD_DIM // 2) + row // 8 % 2 * 2) * 32 + row % 8 * 4
    by_column = (column // 8 * 4 + column % 2) * 32 + column // 2 % 4
    return (part * TILE + WHICH * ROWS) * HEAD_DIM + by_row[:, None] + by_column[None, :]


@gluon.jit
def _store_part(
    parts, part, top, total, sums, WHICH: gl.constexpr, TILE: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr
):
    """Store a warpgroup's part: top, total [ROWS] and sums [ROWS, HEAD_DIM], fp32."""
    sums_ptr, scales_ptr, _ = parts
    ROWS: gl.constexpr = sums.shape[0]
    gl.store(sums_ptr + _place_sums(part, WHICH, TILE, ROWS, sums.shape[1], SUMS), sums)
    row = 2 * part * TILE + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    gl.store(scales_ptr + row, top)
    gl.store(scales_ptr + TILE + row, total)


@gluon.jit
def _load_part(
    parts, part, WHICH: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Load a warpgroup's part. Loads bypass L1 (.cg), because other programs wrote it through L2."""
    sums_ptr, scales_ptr, _ = parts
    sums = gl.load(sums_ptr + _place_sums(part, WHICH, TILE, ROWS, HEAD_DIM, SUMS), cache_modifier=".cg")
    row = 2 * part * TILE + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    top = gl.load(scales_ptr + row, cache_modifier=".cg")
    total = gl.load(scales_ptr + TILE + row, cache_modifier=".cg")
    return top, total, sums


@gluon.jit
def _merge_parts(
    parts, first, last, WHICH: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Merge the parts of a tile that programs first..last share; see `prefix_attention`."""
    top, total, sums = _load_part(parts, 2 * first + 1, WHICH, TILE, ROWS, HEAD_DIM, SCORES, SUMS)
    for program in range(first + 1, last + 1):
        other_top, other_total, other = _load_part(parts, 2 * program, WHICH, TILE, ROWS, HEAD_DIM, SCORES, SUMS)
        new_top = gl.maximum(top, other_top)
        kept, weight = gl.exp2(top - new_top), gl.exp2(other_top - new_top)
        total = total * kept + other_total * weight
        sums = shrink(sums, kept, SUMS) + shrink(other, weight, SUMS)
        top = new_top
    return top, total, sums


@gluon.jit
def _finish(
    rows, where, q_buffer, parts, unit, begin_block, num_blocks, top, total, sums,
    WHICH: gl.constexpr, TILE: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Write the tile's rows if this program has all of it; else store their part, and merge all if it arrives last.

    Each warpgroup counts its own arrivals, and waits for no other.
    """
    ROWS: gl.constexpr = sums.shape[0]
    HEAD_DIM: gl.constexpr = sums.shape[1]
    share = gl.load(rows[1] + 2)
    first, last = (unit - begin_block) // share, (unit - begin_block + num_blocks - 1) // share
    if first == last:
        _write(rows, where, q_buffer, top, total, sums, WHICH, TILE, SCORES, SUMS)
    else:
        part = 2 * gl.program_id(0) + (begin_block == 0).to(gl.int32)
        _store_part(parts, part, top, total, sums, WHICH, TILE, SCORES, SUMS)
        # As in prefix_attention._finish: the barriers and one thread's addition put all stores of all programs that
        # arrived before in front of the last one's reads.
        arrived_at = parts[2] + first * (TILE // ROWS) + WHICH
        gl.thread_barrier()
        arrived = gl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu")
        gl.thread_barrier()
        if arrived == last - first:
            top, total, sums = _merge_parts(parts, first, last, WHICH, TILE, ROWS, HEAD_DIM, SCORES, SUMS)
            _write(rows, where, q_buffer, top, total, sums, WHICH, TILE, SCORES, SUMS)
            gl.store(arrived_at, 0)  # for the next launch, which begins to write when this one has ended


@gluon.jit
def _begin_rows(
    rows, where, is_first, q_buffer, WHICH: gl.constexpr, TILE: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr
):
    """Load the queries of a tile's rows, and the state that their online softmax starts from.

    That is the rows' suffix for the part with a tile's first keys, and nothing for the others.
    """
    q_ptr, words_ptr, out_ptr, lse_ptr = rows
    ROWS: gl.constexpr = q_buffer.shape[0]
    HEAD_DIM: gl.constexpr = q_buffer.shape[1]
    place, is_head = find_heads(words_ptr, where, WHICH, TILE, ROWS, gl.SliceLayout(1, _LINES))
    at = place[:, None] * HEAD_DIM + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, _LINES))[None, :]
    own = gl.load(out_ptr + at, mask=is_head[:, None] & is_first, other=0.0)
    q = gl.load(q_ptr + at, mask=is_head[:, None], other=0.0)
    place, is_head = find_heads(words_ptr, where, WHICH, TILE, ROWS, gl.SliceLayout(1, SCORES))
    top = gl.load(lse_ptr + place, mask=is_head & is_first, other=float("-inf"))
    total = gl.where(is_head & is_first, 1.0, 0.0)
    q_buffer.store(own)  # only to change threads: a load is of whole lines
    sums = q_buffer.load(SUMS).to(gl.float32)
    q_buffer.store(q)
    fence_async_shared()
    return top, total, sums


@gluon.jit
def _multiply(
    rows, parts, work, ring, q_buffer, scale,
    WHICH: gl.constexpr, TILE: gl.constexpr, TILE_COST: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Compute a warpgroup's rows of all tiles that the program has blocks of."""
    gdc_wait()
    words_ptr = rows[1]
    group, unit = work
    ROWS: gl.constexpr = q_buffer.shape[0]
    BLOCK: gl.constexpr = ring[0].shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, q_buffer.shape[1], 16])
    count = 0
    unit, kv_head, tile, begin_block = find_tile(words_ptr, group, unit, BLOCK, TILE, PAGE_SIZE, TILE_COST)
    while unit < find_end(words_ptr):
        num_pairs, num_tokens, num_blocks = measure(words_ptr, group, BLOCK, PAGE_SIZE)
        end_block = gl.minimum(num_blocks, begin_block + find_end(words_ptr) - unit)
        if num_pairs > tile * TILE + WHICH * ROWS:
            top, total, sums = _begin_rows(
                rows, (group, kv_head, tile), begin_block == 0, q_buffer, WHICH, TILE, SCORES, SUMS
            )
            top, total, sums = attend(
                q_buffer, ring, count, begin_block, end_block, num_tokens, scale, top, total, sums, SCORES, SUMS
            )
            _finish(
                rows, (group, kv_head, tile), q_buffer, parts, unit, begin_block, num_blocks, top, total, sums,
                WHICH, TILE, SCORES, SUMS,
            )  # fmt: skip
        else:
            let_pass(ring, count, end_block - begin_block)
        count += end_block - begin_block
        unit += end_block - begin_block + TILE_COST
        begin_block = gl.to_tensor(0)
        group, kv_head, tile = find_next(words_ptr, group, kv_head, tile, num_pairs, TILE)


# ---------------------------------------------------------------- program


@gluon.jit
def _make_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Allocate [STAGES] barriers that complete a phase after COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["table_stride"])
def _hopper_kernel(
    q_ptr, words_ptr, table_ptr, k_desc, v_desc, out_ptr, lse_ptr, sums_ptr, scales_ptr, arrived_ptr, scale,
    table_stride,
    HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, TILE_COST: gl.constexpr, BOX: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILE: gl.constexpr = 3 * ROWS
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, HEAD_DIM], LAYOUT)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, HEAD_DIM], LAYOUT)
    queries = gl.allocate_shared_memory(DTYPE, [3, ROWS, HEAD_DIM], LAYOUT)
    k_full, v_full, empty = _make_barriers(STAGES, 1), _make_barriers(STAGES, 1), _make_barriers(STAGES, 3)
    fence_async_shared()
    unit = gl.program_id(0) * gl.load(words_ptr + 2)
    group = find_group(words_ptr, unit, AT_ONCE)
    # Constants are named in each call's tuple: in a variable of this function they would be no constants any more.
    rows = (q_ptr, words_ptr, out_ptr, lse_ptr)
    parts = (sums_ptr, scales_ptr, arrived_ptr)
    work = (group, unit)
    ring = (keys, values, k_full, v_full, empty)
    cache = (k_desc, v_desc, table_ptr, table_stride)
    gl.warp_specialize(
        [
            (_multiply, (rows, parts, work, ring, queries.index(0), scale, 0, TILE, TILE_COST, PAGE_SIZE)),
            (_multiply, (rows, parts, work, ring, queries.index(1), scale, 1, TILE, TILE_COST, PAGE_SIZE)),
            (_multiply, (rows, parts, work, ring, queries.index(2), scale, 2, TILE, TILE_COST, PAGE_SIZE)),
            (_bring, (cache, words_ptr, work, ring, TILE, TILE_COST, PAGE_SIZE, BOX)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 32],  # with three times 160 all that a processor has
    )


def attend_prefix_hopper(
    rotated: torch.Tensor,  # [rows, num_heads, head_dim] contiguous: q
    groups: torch.Tensor,  # [packed_size(capacity)] int32
    block_table: torch.Tensor,  # [max_seqs + 1, columns] int32
    k_cache: torch.Tensor,  # [pages, page_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # like k_cache
    out: torch.Tensor,  # [rows, num_heads, head_dim] contiguous, written
    lse: torch.Tensor,  # [rows, num_heads] fp32, base 2, written
    work: PrefixWorkspace,
    scale: float,
) -> None:
    """Do `prefix_attention.attend_prefix` by three warpgroups, for head_dim 64 or 128 and a heads-first cache."""
    head_dim, config = rotated.shape[2], work.config
    _hopper_kernel[(work.num_programs,)](
        rotated, groups, block_table, _describe(k_cache), _describe(v_cache), out, lse,
        work.sums, work.scales, work.arrived, scale * _LOG2_E, block_table.stride(0),
        HEAD_DIM=head_dim, PAGE_SIZE=k_cache.shape[1], ROWS=config.block_rows // config.num_warpgroups,
        BLOCK=config.block_tokens, STAGES=config.num_stages, REGISTERS=config.max_registers,
        TILE_COST=config.tile_cost, BOX=_BOX, AT_ONCE=_SEARCHED_AT_ONCE,
        num_warps=config.num_warps, launch_pdl=True,
    )  # fmt: skip


def _describe(tokens: torch.Tensor) -> TensorDescriptor:
    """Describe a layer's keys or values [pages, page_size, num_kv_heads, head_dim] to TMA as [rows, head_dim].

    They are a view of a heads-first cache: a page of one head is consecutive rows.
    """
    page_size, head_dim = tokens.shape[1], tokens.shape[3]
    flat = tokens.transpose(1, 2).view(-1, head_dim)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [page_size, _BOX], _SWIZZLED)
