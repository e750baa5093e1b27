"""GEMV kernels for a step of one row: one kernel each, fused with the norm, the activation or the residual add.

A step of one row is bound by reading its weights, so what counts is how little happens between two reads of them. Small
work is repeated by every program (the norm's sum of squares) or done by the program that has the result. From compute
capability 9.0 on, each kernel starts while the previous one ends (programmatic dependent launch): it loads its weights
at once, and waits before it touches anything that a kernel writes. Measured on an H100 at the 1B shape, a layer without
attention: 58.8 us with a kernel each for norm, GEMV, activation and add, 51.2 fused, 47.3 with dependent launches, 44.7
with two tiles of weights in flight instead of one. What lost: bulk prefetches into L2 of a program's whole weights
(55.3), x loaded once per output to avoid the exchange in shared memory (46.9), weights that L2 may keep.

Sums are fp32, and a result is rounded once, after norm, GEMV, activation and add.

Weights of 8-bit floats are read by the same kernels: the row stays as it is, and a sum is multiplied with the scale of
its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toka_engine.model.kernels import DEPENDENT_LAUNCH_CAPABILITY, FP8_CAPABILITY


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
def _load_four(at, inside):
    """Load four neighbours for each place, in fp32: as words of four bfloat16, or from places that are four apart."""
    if at.dtype.element_ty == tl.int64:
        words = tl.load(at, mask=inside, other=0)
        low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
        first, second = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
        third, fourth = (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True)
    else:
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
        third = tl.load(at + 2, mask=inside, other=0.0).to(tl.float32)
        fourth = tl.load(at + 3, mask=inside, other=0.0).to(tl.float32)
    return first, second, third, fourth


@triton.jit
def _unpack(words, HAS_CVT: tl.constexpr):
    """Return the four e4m3 of each word in fp32; without HAS_CVT times 2 ** -8, as float16 of the same bits, moved.

    What is loaded ahead stays in words: as values it would take four times the registers, and their number decides how
    many loads are on their way.
    """
    if HAS_CVT:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }
            """,
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    even = ((words << 7) & 0x3F803F80) | ((words << 8) & -0x7FFF8000)
    odd = ((words >> 1) & 0x3F803F80) | (words & -0x7FFF8000)
    first, third = even.to(tl.int16).to(tl.float16, bitcast=True), (even >> 16).to(tl.int16)
    second, fourth = odd.to(tl.int16).to(tl.float16, bitcast=True), (odd >> 16).to(tl.int16)
    third, fourth = third.to(tl.float16, bitcast=True), fourth.to(tl.float16, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32), fourth.to(tl.float32)


@triton.jit
def _add_words(
    sums, up_sums, squares, weight, up, x_ptr, norm_ptr, at, width,
    HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr, HAS_CVT: tl.constexpr,
):  # fmt: skip
    """Do what `_add_tile` does with words of four 8-bit weights; `at` and `width` count words."""
    STEP: tl.constexpr = 1 if x_ptr.dtype.element_ty == tl.int64 else 4
    x0, x1, x2, x3 = _load_four(x_ptr + at * STEP, at < width)
    if HAS_NORM:
        squares = x3 * x3 + (x2 * x2 + (x1 * x1 + (x0 * x0 + squares)))
        n0, n1, n2, n3 = _load_four(norm_ptr + at * STEP, at < width)
        x0, x1, x2, x3 = x0 * n0, x1 * n1, x2 * n2, x3 * n3
    w0, w1, w2, w3 = _unpack(weight, HAS_CVT)
    sums = w3 * x3 + (w2 * x2 + (w1 * x1 + (w0 * x0 + sums)))
    if IS_GATED:
        w0, w1, w2, w3 = _unpack(up, HAS_CVT)
        up_sums = w3 * x3 + (w2 * x2 + (w1 * x1 + (w0 * x0 + up_sums)))
    return sums, up_sums, squares


@triton.jit
def _add(
    sums, up_sums, squares, weight, up, x_ptr, norm_ptr, at, width,
    HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CVT: tl.constexpr,
):  # fmt: skip
    if HAS_SCALE:
        sums, up_sums, squares = _add_words(
            sums, up_sums, squares, weight, up, x_ptr, norm_ptr, at, width, HAS_NORM, IS_GATED, HAS_CVT
        )
    else:
        sums, up_sums, squares = _add_tile(
            sums, up_sums, squares, weight, up, x_ptr, norm_ptr, at, width, HAS_NORM, IS_GATED
        )
    return sums, up_sums, squares


@triton.jit
def _finish(
    result, up_result, scale_ptr, bias_ptr, out_ptr, outs, num_out, is_out,
    IS_GATED: tl.constexpr, ADDS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CVT: tl.constexpr,
):  # fmt: skip
    """Return what is stored for the sums of a program's outputs: scaled, with bias, activated and added, in fp32."""
    if HAS_SCALE:
        UNIT: tl.constexpr = 1.0 if HAS_CVT else 256.0
        result *= tl.load(scale_ptr + outs, mask=is_out, other=0.0) * UNIT
        if IS_GATED:
            up_result *= tl.load(scale_ptr + num_out + outs, mask=is_out, other=0.0) * UNIT
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
    x_ptr,  # [width]; with HAS_SCALE these three are words of four values, x and norm unless they are float32
    norm_ptr,  # [width], with HAS_NORM
    weight_ptr,  # [num_out, width], with IS_GATED [2 * num_out, width]: gate, then up
    bias_ptr,  # as many as the weight has rows, with HAS_BIAS
    scale_ptr,  # float32, as many as the weight has rows, with HAS_SCALE
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
    HAS_SCALE: tl.constexpr,
    HAS_CVT: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    if HAS_PDL:
        gdc_launch_dependents()
    num_values = width
    width = width // 4 if HAS_SCALE else width
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
        sums, up_sums, squares = _add(
            sums, up_sums, squares, weight, up, x_ptr, norm_ptr, at, width, HAS_NORM, IS_GATED, HAS_SCALE, HAS_CVT
        )
        weight, up = _load_tile(weight_at, up_offset, start + 2 * BLOCK_IN, columns, width, is_out, IS_GATED)
        at += BLOCK_IN
        sums, up_sums, squares = _add(
            sums, up_sums, squares, weight_2, up_2, x_ptr, norm_ptr, at, width, HAS_NORM, IS_GATED, HAS_SCALE, HAS_CVT
        )
        weight_2, up_2 = _load_tile(weight_at, up_offset, start + 3 * BLOCK_IN, columns, width, is_out, IS_GATED)
    result, up_result = tl.sum(sums, axis=1), tl.sum(up_sums, axis=1)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / num_values + eps)
        result *= scale
        up_result *= scale
    result = _finish(
        result, up_result, scale_ptr, bias_ptr, out_ptr, outs, num_out, is_out,
        IS_GATED, ADDS, HAS_BIAS, HAS_SCALE, HAS_CVT,
    )  # fmt: skip
    tl.store(out_ptr + outs, result.to(out_ptr.dtype.element_ty), mask=is_out)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """A program computes `block_out` outputs, and reads `block_in` weights, or words of weights, of each at a time."""

    block_out: int
    block_in: int
    num_warps: int


SCALED_BEHIND_NORM, SCALED_OTHER = LaunchConfig(1, 128, 1), LaunchConfig(1, 256, 1)
"""For weights of 8-bit floats: the fastest on an H200 at the 8B shape, each beside another (tests/gpu/bench_fp8.py)."""


@dataclass(frozen=True, slots=True)
class TritonGemv:
    """An ops.GemvKernels, for any width and number of outputs.

    The launch configs are those that were the fastest on an H100 at the 1B shape (tests/gpu/bench_gemv.py).
    """

    has_pdl: bool
    behind_norm: LaunchConfig = LaunchConfig(2, 512, 2)
    """Outputs a program, for GEMVs over a hidden state: with more there would be too few programs."""
    other: LaunchConfig = LaunchConfig(8, 1024, 8)
    scale: torch.Tensor | None = None
    """[out] float32: the factor of each output, for the weights of one linear layer that are 8-bit floats."""
    has_cvt: bool = False
    """Whether an instruction converts these."""

    @classmethod
    def for_capability(cls, capability: int) -> Self:
        """`capability` of the device, as 90."""
        return cls(has_pdl=capability >= DEPENDENT_LAUNCH_CAPABILITY)

    @classmethod
    def for_scaled(cls, capability: int, scale: torch.Tensor) -> Self:
        """Make kernels for weights [out, in] of 8-bit floats with the scales [out] float32."""
        return cls(
            capability >= DEPENDENT_LAUNCH_CAPABILITY,
            SCALED_BEHIND_NORM,
            SCALED_OTHER,
            scale,
            capability >= FP8_CAPABILITY,
        )

    def norm_gemv(
        self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See ops.GemvKernels."""
        out = residual.new_empty((1, weight.shape[0]))
        return self._launch(self.behind_norm, residual, weight, bias, out, norm=norm, eps=eps)

    def norm_gated_gemv(
        self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See ops.GemvKernels."""
        out = residual.new_empty((1, weight.shape[0] // 2))
        return self._launch(self.behind_norm, residual, weight, bias, out, norm=norm, eps=eps, is_gated=True)

    def gemv_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> None:
        """See ops.GemvKernels."""
        self._launch(self.other, x, weight, bias, residual, adds=True)

    def gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ops.GemvKernels."""
        return self._launch(self.behind_norm, x, weight, bias, x.new_empty((1, weight.shape[0])))

    def gated_gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ops.GemvKernels."""
        return self._launch(self.behind_norm, x, weight, bias, x.new_empty((1, weight.shape[0] // 2)), is_gated=True)

    def partial_gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ops.GemvKernels."""
        return self._launch(self.other, x, weight, bias, x.new_empty((1, weight.shape[0])))

    def head_gemv(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See ops.GemvKernels."""
        out = x.new_empty((1, weight.shape[0]), dtype=torch.float32)
        return self._launch(self.other, x, weight, None, out)

    def _launch(
        self,
        config: LaunchConfig,
        x: torch.Tensor,  # [1, width]
        weight: torch.Tensor,  # [num_out, width], gated [2 * num_out, width]
        bias: torch.Tensor | None,
        out: torch.Tensor,  # [1, num_out], written
        norm: torch.Tensor | None = None,  # [width]
        eps: float = 0.0,
        is_gated: bool = False,
        adds: bool = False,
    ) -> torch.Tensor:
        num_out, width = out.shape[1], weight.shape[1]
        if self.scale is not None:
            weight = weight.view(torch.int32)
            if x.dtype == torch.bfloat16:
                x, norm = x.view(torch.int64), None if norm is None else norm.view(torch.int64)
        _gemv_kernel[(triton.cdiv(num_out, config.block_out),)](
            x, x if norm is None else norm, weight, x if bias is None else bias,
            x if self.scale is None else self.scale, out, num_out, width, eps,
            BLOCK_OUT=config.block_out, BLOCK_IN=config.block_in,
            HAS_NORM=norm is not None, IS_GATED=is_gated, ADDS=adds, HAS_BIAS=bias is not None,
            HAS_SCALE=self.scale is not None, HAS_CVT=self.has_cvt,
            HAS_PDL=self.has_pdl, num_warps=config.num_warps, launch_pdl=self.has_pdl,
        )  # fmt: skip
        return out
