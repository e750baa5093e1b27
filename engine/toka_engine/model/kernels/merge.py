"""Merge of two partial attentions over disjoint keys, by their log-sum-exp (base 2, as flashinfer gives it).

The identity behind Hydragen (Juravsky et al. 2024) and FlashAttention's split keys: the softmax over a union of keys is
the mean of the parts' results, weighted by 2 ** lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_row", "num_heads"])
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, rows_ptr,
    first_row, num_heads,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64) if HAS_ROWS else index + first_row
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = head < num_heads
    lse_a = tl.load(lse_ptr + row * num_heads + head, mask=inside, other=0.0)
    lse_b = tl.load(part_lse_ptr + index * num_heads + head, mask=inside, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    weight_a = tl.exp2(lse_a - top)
    weight_b = tl.exp2(lse_b - top)
    total = weight_a + weight_b
    both = inside[:, None] & (column < HEAD_DIM)
    at_a = out_ptr + (row * num_heads + head[:, None]) * HEAD_DIM + column
    at_b = part_ptr + (index * num_heads + head[:, None]) * HEAD_DIM + column
    a = tl.load(at_a, mask=both, other=0.0)
    b = tl.load(at_b, mask=both & (weight_b > 0)[:, None], other=0.0).to(tl.float32)
    merged = a.to(tl.float32) * (weight_a / total)[:, None] + b * (weight_b / total)[:, None]
    tl.store(at_a, merged.to(a.dtype), mask=both)
    tl.store(lse_ptr + row * num_heads + head, top + tl.log2(total), mask=inside)


def merge_state(
    out: torch.Tensor,  # [rows, num_heads, head_dim] contiguous
    lse: torch.Tensor,  # [rows, num_heads] fp32
    part: torch.Tensor,  # [n, num_heads, head_dim] contiguous
    part_lse: torch.Tensor,  # [n, num_heads] fp32
    first_row: int = 0,
    rows: torch.Tensor | None = None,  # [n] int32
) -> None:
    """Merge part row i into row first_row + i of `out` and `lse` (or row rows[i]), in place.

    part_lse may be -inf (no keys: the row stays as it is), lse may not.
    """
    count, num_heads, head_dim = part.shape
    if count:
        heads = min(16, triton.next_power_of_2(num_heads))
        _merge_kernel[(count, triton.cdiv(num_heads, heads))](
            out, lse, part, part_lse, part if rows is None else rows,
            first_row, num_heads,
            HEAD_DIM=head_dim, HEADS=heads, BLOCK=triton.next_power_of_2(head_dim), HAS_ROWS=rows is not None,
            num_warps=4,
        )  # fmt: skip
