"""Logits as integers that sort as they do, for searches by halving."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x, SHIFT: tl.constexpr):
    """int32 keys that sort as the floats do; a bf16 value has its key in the upper 16 bits alone (SHIFT 16)."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """The key of a scalar, int64: differences of two keys do not overflow."""
    return tl.sum(ordered(tl.full([1], 0.0, tl.float32) + x, SHIFT).to(tl.int64), axis=0)


@triton.jit
def unordered(key, SHIFT: tl.constexpr):
    """The float of a key: those are at or above it whose keys are."""
    key = key.to(tl.int32)
    filler = (1 << SHIFT) - 1
    wide = tl.where(key < 0, (key << SHIFT) | filler, key << SHIFT)
    return (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
