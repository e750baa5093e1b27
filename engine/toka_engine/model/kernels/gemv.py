"""GEMV kernels for a step of one row: one kernel each, fused with the norm, the activation or the residual add.

A step of one row is bound by reading its weights, so what counts is how little happens between two reads of them. Small
work is repeated by every program (the norm's sum of squares) or done by the program that has the result. From compute
capability 9.0 on, each kernel starts while the previous one ends (programmatic dependent launch): it loads its weights
at once, and waits before it touches anything that a kernel writes. Measured on an H100 at the 1B shape, a layer without
attention: 58.8 us with a kernel each for norm, GEMV, activation and add, 51.2 fused, 47.3 with dependent launches, 44.7
with two tiles of weights in flight instead of one. What lost: bulk prefetches into L2 of a program's whole weights
(55.3), x loaded once per output to avoid the exchange in shared memory (46.9), weights that L2 may keep.

Sums are fp32, and a result is rounded once, after norm, GEMV, activation and add. The kernels for weights of 8-bit
floats are in `fp8_gemv`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toka_engine.model.kernels import DEPENDENT_LAUNCH_CAPABILITY, cdiv


@triton.jit
def _load_tile(weight_at, up_offset, start, columns, width, is_out, IS_GATED: tl.constexpr):
    """Load [BLOCK_OUT, BLOCK_IN] weights from column `start` on, and with IS_GATED those of up."""
    inside = is_out[:, None] & (start + columns < width)
    weight = tl.load(weight_at + start, mask=inside, other=0, eviction_policy="evict_first")
    up = weight
    if IS_GATED:
        up = tl.load(weight_at + up_offset + start, mask=inside, other=0, eviction_policy="evict_first")
    return weight, up


@triton.jit
def _add_tile(
    sums, up_sums, squares, weight, up, x_ptr, norm_ptr, at, width, HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr
):
    """Add a tile's weights times the values `at` of x to the sums [BLOCK_OUT, BLOCK_IN] fp32."""
    x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares += x * x
        x *= tl.load(norm_ptr + at, mask=at < width, other=0.0).to(tl.float32)
    sums += weight.to(tl.float32) * x
    if IS_GATED:
        up_sums += up.to(tl.float32) * x
    return sums, up_sums, squares


@triton.jit
def _finish(
    result, up_result, bias_ptr, out_ptr, outs, num_out, is_out,
    IS_GATED: tl.constexpr, ADDS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Return what is stored for the sums of a program's outputs: with bias, activated and added, in fp32."""
    if HAS_BIAS:
        result += tl.load(bias_ptr + outs, mask=is_out, other=0.0).to(tl.float32)
        if IS_GATED:
            up_result += tl.load(bias_ptr + num_out + outs, mask=is_out, other=0.0).to(tl.float32)
    if IS_GATED:
        result = result / (1.0 + tl.exp(-result)) * up_result
    if ADDS:
        result += tl.load(out_ptr + outs, mask=is_out, other=0.0).to(tl.float32)
    return result


# A width that is known to be a multiple of 16 lets a thread load 16 bytes at a time. The number of outputs makes no
# variants (see aot.triton_build).
@triton.jit(do_not_specialize=["num_out"])
def _gemv_kernel(
    x_ptr,  # [width]
    norm_ptr,  # [width], with HAS_NORM
    weight_ptr,  # [num_out, width], with IS_GATED [2 * num_out, width]: gate, then up
    bias_ptr,  # as many as the weight has rows, with HAS_BIAS
    out_ptr,  # [num_out]
    num_out,
    width,
    eps,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    if HAS_PDL:
        gdc_launch_dependents()
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = outs < num_out
    columns = tl.arange(0, BLOCK_IN)[None, :]
    up_offset = num_out.to(tl.int64) * width
    weight_at = weight_ptr + outs.to(tl.int64)[:, None] * width + columns
    weight, up = _load_tile(weight_at, up_offset, 0, columns, width, is_out, IS_GATED)
    weight_2, up_2 = _load_tile(weight_at, up_offset, BLOCK_IN, columns, width, is_out, IS_GATED)
    if HAS_PDL:
        # Kernels before this one may still run, two or more of them. Above this line only weights are read, which no
        # step writes, and nothing is written: memory that is new to this kernel may be in use by those.
        gdc_wait()
    sums = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    up_sums = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    squares = tl.zeros((1, BLOCK_IN), tl.float32)
    # A turn has both tiles that are on their way: one that moved to other registers would have to have arrived first.
    for start in range(0, width, 2 * BLOCK_IN):
        at = start + columns
        sums, up_sums, squares = _add_tile(
            sums, up_sums, squares, weight, up, x_ptr, norm_ptr, at, width, HAS_NORM, IS_GATED
        )
        weight, up = _load_tile(weight_at, up_offset, start + 2 * BLOCK_IN, columns, width, is_out, IS_GATED)
        at += BLOCK_IN
        sums, up_sums, squares = _add_tile(
            sums, up_sums, squares, weight_2, up_2, x_ptr, norm_ptr, at, width, HAS_NORM, IS_GATED
        )
        weight_2, up_2 = _load_tile(weight_at, up_offset, start + 3 * BLOCK_IN, columns, width, is_out, IS_GATED)
    result, up_result = tl.sum(sums, axis=1), tl.sum(up_sums, axis=1)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / width + eps)
        result *= scale
        up_result *= scale
    result = _finish(result, up_result, bias_ptr, out_ptr, outs, num_out, is_out, IS_GATED, ADDS, HAS_BIAS)
    tl.store(out_ptr + outs, result.to(out_ptr.dtype.element_ty), mask=is_out)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """A program computes `block_out` outputs, and reads `block_in` weights of each at a time."""

    block_out: int
    block_in: int
    num_warps: int


class FusedGemv(ABC):
    """An ops.GemvKernels whose calls are launches of one kernel."""

    __slots__ = ()

    def norm_gemv(
        self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See ops.GemvKernels."""
        out = residual.new_empty((1, weight.shape[0]))
        return self.launch(residual, weight, bias, out, norm=norm, eps=eps)

    def norm_gated_gemv(
        self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See ops.GemvKernels."""
        out = residual.new_empty((1, weight.shape[0] // 2))
        return self.launch(residual, weight, bias, out, norm=norm, eps=eps, is_gated=True)

    def gemv_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> None:
        """See ops.GemvKernels."""
        self.launch(x, weight, bias, residual, adds=True, is_behind_norm=False)

    def gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ops.GemvKernels."""
        return self.launch(x, weight, bias, x.new_empty((1, weight.shape[0])))

    def gated_gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ops.GemvKernels."""
        return self.launch(x, weight, bias, x.new_empty((1, weight.shape[0] // 2)), is_gated=True)

    def partial_gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ops.GemvKernels."""
        return self.launch(x, weight, bias, x.new_empty((1, weight.shape[0])), is_behind_norm=False)

    def head_gemv(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See ops.GemvKernels."""
        out = x.new_empty((1, weight.shape[0]), dtype=torch.float32)
        return self.launch(x, weight, None, out, is_behind_norm=False)

    @abstractmethod
    def launch(
        self,
        x: torch.Tensor,  # [1, width]
        weight: torch.Tensor,  # [num_out, width], gated [2 * num_out, width]
        bias: torch.Tensor | None,  # as many as the weight has rows
        out: torch.Tensor,  # [1, num_out], written
        *,
        norm: torch.Tensor | None = None,  # [width]
        eps: float = 0.0,
        is_gated: bool = False,
        adds: bool = False,
        is_behind_norm: bool = True,
    ) -> torch.Tensor:
        """Launch the kernel and return `out`. With `adds` that is what the result is added to; `is_behind_norm`: x is
        a hidden state that a norm is or was applied to.
        """


@dataclass(frozen=True, slots=True)
class TritonGemv(FusedGemv):
    """An ops.GemvKernels, for any width and number of outputs.

    The launch configs are those that were the fastest on an H100 at the 1B shape (tests/gpu/bench_gemv.py).
    """

    has_pdl: bool
    behind_norm: LaunchConfig = LaunchConfig(2, 512, 2)
    """Outputs a program, for GEMVs over a hidden state: with more there would be too few programs."""
    other: LaunchConfig = LaunchConfig(8, 1024, 8)

    @classmethod
    def for_capability(cls, capability: int) -> Self:
        """`capability` of the device, as 90."""
        return cls(has_pdl=capability >= DEPENDENT_LAUNCH_CAPABILITY)

    def launch(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        is_gated: bool = False,
        adds: bool = False,
        is_behind_norm: bool = True,
    ) -> torch.Tensor:
        """See FusedGemv."""
        config = self.behind_norm if is_behind_norm else self.other
        num_out, width = out.shape[1], weight.shape[1]
        _gemv_kernel[(cdiv(num_out, config.block_out),)](
            x, x if norm is None else norm, weight, x if bias is None else bias, out, num_out, width, eps,
            BLOCK_OUT=config.block_out, BLOCK_IN=config.block_in,
            HAS_NORM=norm is not None, IS_GATED=is_gated, ADDS=adds, HAS_BIAS=bias is not None,
            HAS_PDL=self.has_pdl, num_warps=config.num_warps, launch_pdl=self.has_pdl,
        )  # fmt: skip
        return out
