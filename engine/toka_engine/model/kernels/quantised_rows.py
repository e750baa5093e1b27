"""Kernels that make rows of 8-bit floats (e4m3) for a GEMM in fp8: alone, and fused with what stands before a GEMM.

Each row gets a scale of its own, so that its largest value becomes e4m3's largest. That is decided in fp32, before any
rounding to the model's dtype; otherwise norm and activation compute what `norm` and `activation` do. One program has a
whole row in its registers, so that it is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2
from toka_engine.model.kernels.activation import activate
from toka_engine.model.kernels.norm import add_residual, normalise

VALUES_DTYPE = torch.float8_e4m3fn
_LARGEST = tl.constexpr(448.0)
"""The largest value of e4m3."""
_LEAST = tl.constexpr(1e-30)
"""Rows of smaller values become zeros: the reciprocal of a scale must be finite."""


@triton.jit
def _store_row(values, out_ptr, scale_ptr, row, column, width, inside):
    """Store a row of fp32, zeros outside, as 8-bit floats, and its scale."""
    largest = tl.maximum(tl.max(tl.abs(values), axis=0), _LEAST)
    scaled = values * (_LARGEST / largest)
    tl.store(out_ptr + row * width + column, scaled.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, largest / _LARGEST)


@triton.jit
def _quantised_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scale_ptr, x_stride, width, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = add_residual(x, residual_ptr + row * width + column, inside)
    normed = normalise(x, weight_ptr + column, width, eps, inside)
    _store_row(normed, out_ptr, scale_ptr, row, column, width, inside)


@triton.jit
def _quantised_silu_mul_kernel(gate_up_ptr, out_ptr, scale_ptr, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    active = activate(gate_up_ptr + row * row_stride + column, width, inside)
    _store_row(active, out_ptr, scale_ptr, row, column, width, inside)


@triton.jit
def _quantise_kernel(x_ptr, out_ptr, scale_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    _store_row(x, out_ptr, scale_ptr, row, column, width, inside)


def _allocate(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, width] and scales [rows, 1] for the rows of `x`."""
    values = torch.empty((x.shape[0], width), dtype=VALUES_DTYPE, device=x.device)
    return values, torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)


def _count_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] (rows may be strided) -> values [rows, width] and their scales [rows, 1]."""
    rows, width = x.shape
    values, scales = _allocate(x, width)
    if rows:
        block = next_power_of_2(width)
        _quantise_kernel[(rows,)](
            x, values, scales, x.stride(0), width, BLOCK=block, num_warps=_count_warps(block)
        )  # fmt: skip
    return values, scales


def quantised_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * weight for x [rows, width], weight [width] -> values [rows, width] and their scales [rows, 1]."""
    return _launch_norm(x, None, weight, eps)


def quantised_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the sum of x and `residual` [rows, width, contiguous], which becomes the residual in place."""
    return _launch_norm(x, residual, weight, eps)


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    values, scales = _allocate(x, width)
    if rows:
        block = next_power_of_2(width)
        _quantised_norm_kernel[(rows,)](
            x, x if residual is None else residual, weight, values, scales, x.stride(0), width, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=_count_warps(block),
        )  # fmt: skip
    return values, scales


def quantised_silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up for gate_up [rows, 2 * width] -> values [rows, width] and their scales [rows, 1]."""
    rows, double = gate_up.shape
    width = double // 2
    values, scales = _allocate(gate_up, width)
    if rows:
        block = next_power_of_2(width)
        _quantised_silu_mul_kernel[(rows,)](
            gate_up, values, scales, gate_up.stride(0), width, BLOCK=block, num_warps=_count_warps(block)
        )  # fmt: skip
    return values, scales
