"""The gated activation of Llama's MLP: silu(gate) * up, from one packed GEMM."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import cdiv, next_power_of_2


@triton.jit
def activate(at, width, inside):
    """Return silu(gate) * up in fp32, zeros outside; `at` is where gate is, and up is `width` values behind."""
    gate = tl.load(at, mask=inside, other=0.0)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    # The activation is rounded before the multiplication, as in the reference.
    return (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32) * up


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    active = activate(gate_up_ptr + row * row_stride + column, width, inside)
    tl.store(out_ptr + row * width + column, active.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) * up [rows, width] for gate_up [rows, 2 * width]: gate in the first half, up in the second."""
    rows, double = gate_up.shape
    width = double // 2
    if out is None:
        out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(2048, next_power_of_2(width))
        grid = (rows, cdiv(width, block))
        _silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), width, BLOCK=block, num_warps=4)
    return out
