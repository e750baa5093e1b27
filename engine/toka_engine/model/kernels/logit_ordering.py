"""Maps logits to integer keys of the same order, for binary searches."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """Return int32 keys that sort as the floats do; a bf16 value needs only its upper 16 bits (SHIFT 16)."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """Return a scalar's key as int64, so that differences of keys do not overflow."""
    return tl.sum(ordered(tl.full([1], 0.0, tl.float32) + x, SHIFT).to(tl.int64), axis=0)


@triton.jit
def unordered(key, SHIFT: tl.constexpr):
    """Return a key's float: x >= it exactly where ordered(x) >= key."""
    key = key.to(tl.int32)
    filler = (1 << SHIFT) - 1
    wide = tl.where(key < 0, (key << SHIFT) | filler, key << SHIFT)
    return (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
