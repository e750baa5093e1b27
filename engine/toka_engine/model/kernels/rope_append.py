"""RoPE and the write of K and V into the cache's pages, in one kernel per layer.

A row finds its page itself: block table [slot, position // page_size]. Non-interleaved halves, as Llama rotates:
(a, b) -> (a cos - b sin, b cos + a sin). A cache of 8-bit floats (e4m3) takes the nearest of its values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2

_LARGEST_E4M3 = tl.constexpr(448.0)


@triton.jit
def to_stored(x, dtype: tl.constexpr):
    """Round keys or values to the cache's `dtype`; what is beyond the range of 8-bit floats becomes their largest."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -_LARGEST_E4M3, _LARGEST_E4M3)
    return x.to(dtype)


@triton.jit
def rotate(a, b, cos, sin, dtype: tl.constexpr):
    """Rotate both halves of heads [heads, HALF], fp32, and round them to `dtype`."""
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _load_rotated(
    x_ptr, head_stride, cos, sin, num_heads,
    HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the heads at x_ptr and return both halves rotated, [HEADS, HALF_BLOCK] each."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < num_heads) & (column < HALF)
    at = x_ptr + head * head_stride + column
    a = tl.load(at, mask=inside, other=0.0)
    b = tl.load(at + HALF, mask=inside, other=0.0)
    return rotate(a.to(tl.float32), b.to(tl.float32), cos, sin, a.dtype)


# Head counts are no constants of the kernel, only their powers of two: few variants serve all models (see aot).
# Beside decode rows, the slots and positions of a step's prompts begin at any address.
@triton.jit(
    do_not_specialize=["table_stride", "num_heads", "num_kv_heads"],
    do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"],
)
def _rope_append_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    cos_sin_ptr, slots_ptr, positions_ptr, table_ptr,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    table_stride, page_stride, token_stride, head_stride, num_heads, num_kv_heads,
    PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    position = tl.load(positions_ptr + row).to(tl.int64)
    page = tl.load(table_ptr + slot * table_stride + position // PAGE_SIZE).to(tl.int64)
    half = tl.arange(0, HALF_BLOCK)
    cos_at = cos_sin_ptr + position * (2 * HALF) + half
    cos = tl.load(cos_at, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(cos_at + HALF, mask=half < HALF, other=0.0)[None, :]

    q_a, q_b = _load_rotated(
        q_ptr + row * q_row_stride, q_head_stride, cos, sin, num_heads, HEADS, HALF, HALF_BLOCK
    )  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    column = half[None, :]
    inside = (head < num_heads) & (column < HALF)
    q_at = q_out_ptr + row * (num_heads * 2 * HALF) + head * (2 * HALF) + column
    tl.store(q_at, q_a, mask=inside)
    tl.store(q_at + HALF, q_b, mask=inside)

    k_a, k_b = _load_rotated(
        k_ptr + row * k_row_stride, k_head_stride, cos, sin, num_kv_heads, KV_HEADS, HALF, HALF_BLOCK
    )  # fmt: skip
    kv_head = tl.arange(0, KV_HEADS)[:, None]
    inside = (kv_head < num_kv_heads) & (column < HALF)
    offset = page * page_stride + (position % PAGE_SIZE) * token_stride + kv_head * head_stride + column
    STORED: tl.constexpr = k_cache_ptr.dtype.element_ty
    tl.store(k_cache_ptr + offset, to_stored(k_a, STORED), mask=inside)
    tl.store(k_cache_ptr + offset + HALF, to_stored(k_b, STORED), mask=inside)
    v_at = v_ptr + row * v_row_stride + kv_head * v_head_stride + column
    v_a, v_b = tl.load(v_at, mask=inside, other=0.0), tl.load(v_at + HALF, mask=inside, other=0.0)
    tl.store(v_cache_ptr + offset, to_stored(v_a, STORED), mask=inside)
    tl.store(v_cache_ptr + offset + HALF, to_stored(v_b, STORED), mask=inside)


def rope_append(
    q: torch.Tensor,  # [T, num_heads, head_dim], last dimension contiguous
    k: torch.Tensor,  # [T, num_kv_heads, head_dim]
    v: torch.Tensor,  # [T, num_kv_heads, head_dim]
    cos_sin: torch.Tensor,  # [max_positions, head_dim] fp32: cos in the first half, sin in the second
    slots: torch.Tensor,  # [T] int32
    positions: torch.Tensor,  # [T] int32
    block_table: torch.Tensor,  # [max_seqs, columns] int32
    k_cache: torch.Tensor,  # [pages, page_size, num_kv_heads, head_dim], any strides, q's dtype or e4m3
    v_cache: torch.Tensor,  # like k_cache, same strides
    q_out: torch.Tensor,  # [T, num_heads, head_dim] contiguous
) -> None:
    """Write rotated q to `q_out`, rotated k and plain v to the page of each row's position."""
    rows, num_heads, head_dim = q.shape
    if not rows:
        return
    half = head_dim // 2
    heads = next_power_of_2(num_heads)
    _rope_append_kernel[(rows,)](
        q, k, v, q_out, k_cache, v_cache,
        cos_sin, slots, positions, block_table,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        block_table.stride(0), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), num_heads, k.shape[1],
        PAGE_SIZE=k_cache.shape[1], HEADS=heads, KV_HEADS=next_power_of_2(k.shape[1]),
        HALF=half, HALF_BLOCK=next_power_of_2(half),
        num_warps=4 if heads * head_dim <= 4096 else 8,
    )  # fmt: skip
