"""RMSNorm, alone and fused with the residual add before it: one pass over each row.

Rounding follows the reference implementation of Llama: the sum is rounded to the model's dtype before it is squared,
the normalised row is rounded before it is multiplied with the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from toka_engine.model.kernels import next_power_of_2


@triton.jit
def add_residual(x, at, inside):
    """Add the values at `at` of the residual stream to x, store the sum there, and return it, in x's dtype."""
    total = (x.to(tl.float32) + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
    tl.store(at, total, mask=inside)
    return total


@triton.jit
def normalise(x, weight_at, width, eps, inside):
    """Return the norm of a row x, zeros outside, in fp32."""
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    return normed * tl.load(weight_at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = add_residual(x, residual_ptr + row * width + column, inside)
    normed = normalise(x, weight_ptr + column, width, eps, inside)
    tl.store(out_ptr + row * width + column, normed.to(x.dtype), mask=inside)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor | None
) -> torch.Tensor:
    rows, width = x.shape
    if out is None:
        out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        block = next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            x.stride(0),
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return x / rms(x) * weight for x [rows, width] (rows may be strided), weight [width]."""
    return _launch(x, None, weight, eps, out)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add x [rows, width] to `residual` [rows, width, contiguous] in place and return the norm of the sum."""
    return _launch(x, residual, weight, eps, out)
