"""Maps a program (CTA) of `prefix_hopper` to its share of the work: units, tiles, (row, head) pairs.

Everything is read from the words of `prefix_groups.pack_groups`, again wherever it is needed: registers limit the
kernel, and a block's scores and weights take them all.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from toka_engine.model.kernels.prefix_groups import HEADER

_HEADER = gl.constexpr(HEADER)


@gluon.jit
def find_group(words_ptr, unit, AT_ONCE: gl.constexpr):
    """Return the index of the group that has the unit, or of the last one. Runs in four warps."""
    count, ends_ptr = gl.load(words_ptr), words_ptr + _HEADER + 5 * gl.load(words_ptr + 3)
    LAYOUT: gl.constexpr = gl.BlockedLayout([AT_ONCE // 128], [32], [4], [0])
    group = 0
    for begin in range(0, count, AT_ONCE):
        some = begin + gl.arange(0, AT_ONCE, layout=LAYOUT)
        ends = gl.load(ends_ptr + some, mask=some < count, other=2147483647)
        group += gl.sum((ends <= unit).to(gl.int32), axis=0)
    return gl.minimum(group, gl.maximum(count - 1, 0))


@gluon.jit
def find_end(words_ptr):
    """Return the end of this program's units."""
    num_units, share = gl.load(words_ptr + 1), gl.load(words_ptr + 2)
    return gl.minimum((gl.program_id(0) + 1) * share, num_units)


@gluon.jit
def measure(words_ptr, group, BLOCK: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Return a group's number of (row, head) pairs per KV head, of shared tokens, and of their blocks."""
    capacity = gl.load(words_ptr + 3)
    num_pairs = gl.load(words_ptr + _HEADER + capacity + group) * gl.load(words_ptr + 5)
    num_tokens = gl.load(words_ptr + _HEADER + 4 * capacity + group) * PAGE_SIZE
    return num_pairs, num_tokens, (num_tokens + BLOCK - 1) // BLOCK


@gluon.jit
def find_tile(
    words_ptr, group, unit, BLOCK: gl.constexpr, TILE: gl.constexpr, PAGE_SIZE: gl.constexpr, TILE_COST: gl.constexpr
):
    """Return the first unit from this one on that is a block, and its KV head, tile and block.

    A tile's first TILE_COST units are no blocks. Without groups the result is not used.
    """
    num_pairs, _, num_blocks = measure(words_ptr, group, BLOCK, PAGE_SIZE)
    num_units = gl.maximum(num_blocks, 1) + TILE_COST
    num_tiles = gl.maximum((num_pairs + TILE - 1) // TILE, 1)
    group_end = gl.load(words_ptr + _HEADER + 5 * gl.load(words_ptr + 3) + group)
    within = unit - (group_end - num_units * num_tiles * gl.load(words_ptr + 4))
    block = within % num_units - TILE_COST
    kv_head, tile = within // num_units // num_tiles, within // num_units % num_tiles
    return unit - gl.minimum(block, 0), kv_head, tile, gl.maximum(block, 0)


@gluon.jit
def find_next(words_ptr, group, kv_head, tile, num_pairs, TILE: gl.constexpr):
    """Return the next tile's group, KV head and tile. After the last one the result is not used."""
    is_last = (tile + 1) * TILE >= num_pairs
    tile = gl.where(is_last, 0, tile + 1)
    kv_head += is_last.to(gl.int32)
    is_over = kv_head == gl.load(words_ptr + 4)
    return group + is_over.to(gl.int32), gl.where(is_over, 0, kv_head), tile


@gluon.jit
def find_pages(words_ptr, group, table_ptr, table_stride):
    """Return the address of a group's first page in the block table."""
    capacity = gl.load(words_ptr + 3)
    slot = gl.load(words_ptr + _HEADER + 2 * capacity + group)
    return table_ptr + slot.to(gl.int64) * table_stride + gl.load(words_ptr + _HEADER + 3 * capacity + group)


@gluon.jit
def find_heads(words_ptr, where, WHICH: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return each (row, head) pair's index into [rows, num_heads], [ROWS], and whether the pair exists.

    See `prefix_attention`.
    """
    group, kv_head, tile = where
    capacity = gl.load(words_ptr + 3)
    num_kv_heads = gl.load(words_ptr + 4)
    heads_per_kv = gl.load(words_ptr + 5)
    first_row = gl.load(words_ptr + _HEADER + group)
    num_rows = gl.load(words_ptr + _HEADER + capacity + group)
    pair = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, layout=LAYOUT)
    row = ((pair.to(gl.float32) + 0.5) * (1.0 / heads_per_kv)).to(gl.int32)
    place = (first_row + row) * (num_kv_heads * heads_per_kv) + kv_head * heads_per_kv + pair - row * heads_per_kv
    return place, row < num_rows
