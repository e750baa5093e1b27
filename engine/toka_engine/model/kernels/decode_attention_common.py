"""Device functions of both decode attention kernels: loading a row's inputs and cached tokens, and the online softmax.

Owns no launch: see `decode_attention` and `decode_attention_short`. TILE is the padded number of query heads of one KV
head, `group` the real one. Cosines and sines are fp32, all other inputs in the model's dtype, and the cache in that or
in 8-bit floats (e4m3).
"""

from __future__ import annotations

import triton
import triton.language as tl

from toka_engine.model.kernels.rope_append import rotate, to_stored


@triton.jit
def load_angles(cos_sin_ptr, position, HEAD_DIM: tl.constexpr):
    """Load a position's cosines and sines [HEAD_DIM / 2] each."""
    at = cos_sin_ptr + position.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)
    return tl.load(at), tl.load(at + HEAD_DIM // 2)


@triton.jit
def load_pages(table_at, tokens, end, PAGE_SIZE: tl.constexpr):
    """Load the page [tokens] int64 of each of a slot's tokens; page 0 from `end` on."""
    return tl.load(table_at + tokens // PAGE_SIZE, mask=tokens < end, other=0).to(tl.int64)


@triton.jit
def load_tokens(
    k_cache_at, v_cache_at, pages, tokens, end, page_stride, token_stride,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Load keys and values [tokens, HEAD_DIM] of one KV head, 8-bit floats as words of four; zeros from `end` on.

    What is loaded ahead stays in words: as values each would have a register of its own.
    """
    SIZE: tl.constexpr = 4 if k_cache_at.dtype.element_ty == tl.float8e4nv else 1
    if SIZE > 1:
        k_cache_at = k_cache_at.to(tl.pointer_type(tl.int32))
        v_cache_at = v_cache_at.to(tl.pointer_type(tl.int32))
    at = pages * (page_stride // SIZE) + (tokens % PAGE_SIZE) * (token_stride // SIZE)
    offset = at[:, None] + tl.arange(0, HEAD_DIM // SIZE)[None, :]
    inside = (tokens < end)[:, None]
    return tl.load(k_cache_at + offset, mask=inside, other=0.0), tl.load(v_cache_at + offset, mask=inside, other=0.0)


@triton.jit
def load_heads(q_at, k_at, v_at, q_head_stride, group, is_new, TILE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load the halves of the group's q [TILE, HALF] and of k [HALF], and v [HEAD_DIM]; k and v are zeros if not new."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.arange(0, TILE)[:, None]
    half = tl.arange(0, HALF)
    column = tl.arange(0, HEAD_DIM)
    q_at += head * q_head_stride + half[None, :]
    # All loads before their first use, so that they are in flight together.
    q_a = tl.load(q_at, mask=head < group, other=0.0)
    q_b = tl.load(q_at + HALF, mask=head < group, other=0.0)
    k_a = tl.load(k_at + half, mask=is_new & (half < HALF), other=0.0)
    k_b = tl.load(k_at + HALF + half, mask=is_new & (half < HALF), other=0.0)
    value = tl.load(v_at + column, mask=is_new & (column < HEAD_DIM), other=0.0)
    return q_a, q_b, k_a, k_b, value


@triton.jit
def rotate_heads(q_a, q_b, k_a, k_b, cos, sin):
    """Rotate the halves of q [TILE, HALF] and k [HALF], in their dtype."""
    dtype: tl.constexpr = q_a.dtype
    q_a, q_b = rotate(q_a.to(tl.float32), q_b.to(tl.float32), cos[None, :], sin[None, :], dtype)
    k_a, k_b = rotate(k_a.to(tl.float32), k_b.to(tl.float32), cos, sin, dtype)
    return q_a, q_b, k_a, k_b


@triton.jit
def join_halves(q_a, q_b, TILE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Join halves [TILE, HALF] into q [TILE, HEAD_DIM]."""
    return tl.reshape(tl.permute(tl.join(q_a, q_b), (0, 2, 1)), (TILE, HEAD_DIM))


@triton.jit
def to_operand(q, cache_dtype: tl.constexpr):
    """Return q [TILE, HEAD_DIM] in the dtype of products with a cache of `cache_dtype`.

    float16 has all values of 8-bit floats, and takes half as many instructions to make of them as bfloat16.
    """
    if cache_dtype == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return q


@triton.jit
def _take_half(pairs, SHIFT: tl.constexpr):
    """Return one of the two float16 in each int32."""
    return (pairs >> SHIFT).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def to_values(stored, dtype: tl.constexpr, HAS_CVT: tl.constexpr):
    """Return stored keys or values [tokens, HEAD_DIM] in `dtype`; they may be words of four e4m3, in a row.

    Without HAS_CVT, the instruction that converts these, they are made by moving bits: float16 has a wider exponent.
    """
    if stored.dtype == tl.int32:
        if HAS_CVT:
            first, second = tl.inline_asm_elementwise(
                """
                {
                .reg .b16 low, high;
                mov.b32 {low, high}, $2;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
                }
                """,
                "=r,=r,r",
                [stored],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            even = ((stored << 7) & 0x3F803F80) | ((stored << 8) & -0x7FFF8000)
            odd = ((stored >> 1) & 0x3F803F80) | (stored & -0x7FFF8000)
            first = (even & 0xFFFF) | (odd << 16)
            second = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
        pairs = tl.join(
            tl.join(_take_half(first, 0), _take_half(first, 16)), tl.join(_take_half(second, 0), _take_half(second, 16))
        )
        stored = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (stored.shape[0], 4 * stored.shape[1]))
        if not HAS_CVT:
            stored *= 256.0
    return stored.to(dtype)


@triton.jit
def append(k_at, v_at, k_a, k_b, value, is_new, HEAD_DIM: tl.constexpr):
    """Write the new token's key (halves [HALF]) and value [HEAD_DIM] to the caches."""
    HALF: tl.constexpr = HEAD_DIM // 2
    half = tl.arange(0, HALF)
    column = tl.arange(0, HEAD_DIM)
    STORED: tl.constexpr = k_at.dtype.element_ty
    tl.store(k_at + half, to_stored(k_a, STORED), mask=is_new & (half < HALF))
    tl.store(k_at + HALF + half, to_stored(k_b, STORED), mask=is_new & (half < HALF))
    tl.store(v_at + column, to_stored(value, STORED), mask=is_new & (column < HEAD_DIM))


@triton.jit
def give_back(rotated_at, q_a, q_b, group, is_new, TILE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write the group's rotated q [group, HEAD_DIM]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.arange(0, TILE)[:, None]
    at = rotated_at + head * HEAD_DIM + tl.arange(0, HALF)[None, :]
    tl.store(at, q_a, mask=is_new & (head < group))
    tl.store(at + HALF, q_b, mask=is_new & (head < group))


@triton.jit
def attend_new(q_a, q_b, k_a, k_b, value, is_new, scale, TILE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Begin the online softmax with the new token alone, or with nothing if not new; see `attend_block`."""
    products = q_a.to(tl.float32) * k_a.to(tl.float32)[None, :] + q_b.to(tl.float32) * k_b.to(tl.float32)[None, :]
    top = tl.where(is_new, tl.sum(products, axis=1) * scale, float("-inf"))
    total = tl.zeros((TILE,), tl.float32) + tl.where(is_new, 1.0, 0.0)
    return top, total, tl.zeros((TILE, HEAD_DIM), tl.float32) + value.to(tl.float32)[None, :]


@triton.jit
def attend_block_by_columns(q, keys, values, is_inside, scale, top, total, sums, HAS_CVT: tl.constexpr):
    """Do what `attend_block` does with q and sums [HEAD_DIM, TILE].

    Tokens are then the rows of a product, and heads its columns, which tensor cores take by 8: less of a group of 4 or
    8 heads is padding, and fewer registers hold it.
    """
    keys, values = to_values(keys, q.dtype, HAS_CVT), to_values(values, q.dtype, HAS_CVT)
    scores = tl.dot(keys, q) * scale
    scores = tl.where(is_inside[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=0))
    kept = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[None, :])
    total = total * kept + tl.sum(weights, axis=0)
    return new_top, total, tl.dot(tl.trans(values), weights.to(q.dtype), sums * kept[None, :])


@triton.jit
def attend_block(q, keys, values, is_inside, scale, top, total, sums, HAS_CVT: tl.constexpr):
    """Advance the online softmax by one block of keys and values [BLOCK, HEAD_DIM], as they are stored.

    Its state is `top` [TILE], the greatest score in base 2 (`scale` has the factor log2(e)), `total` [TILE], the sum
    of weights, and `sums` [TILE, HEAD_DIM], the weighted sum of values; all fp32.
    """
    keys, values = to_values(keys, q.dtype, HAS_CVT), to_values(values, q.dtype, HAS_CVT)
    scores = tl.dot(q, tl.trans(keys)) * scale
    scores = tl.where(is_inside[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    kept = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    total = total * kept + tl.sum(weights, axis=1)
    return new_top, total, tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
