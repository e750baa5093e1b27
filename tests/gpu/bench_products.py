"""What the products of a decode step of few rows could cost: ours of today against one kernel a product.

One row waits for weights alone, so all that counts is how little lies between two reads of them. Today a layer has
seven kernels around its attention: norm, qkv, out, norm, gate and up, activation, down. The candidate has four: the
norm in front of a product, the activation behind it and the sum with the residual are part of it, and with `launch_pdl`
the next kernel reads its first weights while the one before still ends (programmatic dependent launch). Prints
microseconds a layer and bytes per second, for a chain of layers in one CUDA graph, without attention.

Usage: python tests/gpu/bench_products.py [ROWS ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.norm import add_rms_norm, rms_norm
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LAYERS = 16
HIDDEN, QKV, MIXED, INNER = 2048, 3072, 2048, 8192
EPS = 1e-5


@triton.jit
def few_rows_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    num_out,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column, row = tl.arange(0, BLOCK_IN), tl.arange(0, ROWS)
    is_out = outs < num_out
    weight_at = weight_ptr + outs.to(tl.int64)[:, None] * width + column[None, :]
    inside = is_out[:, None] & (column < width)[None, :]
    up_offset = num_out.to(tl.int64) * width
    weight = tl.load(weight_at, mask=inside, other=0.0, eviction_policy="evict_first")
    up = weight
    if IS_GATED:
        up = tl.load(weight_at + up_offset, mask=inside, other=0.0, eviction_policy="evict_first")
    if HAS_PDL:
        gdc_wait()  # nothing of the kernels before may be read or written above this line
        gdc_launch_dependents()
    sums = tl.zeros((ROWS, BLOCK_OUT, BLOCK_IN), tl.float32)
    up_sums = tl.zeros((ROWS, BLOCK_OUT, BLOCK_IN), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_IN), tl.float32)
    for start in range(0, width, BLOCK_IN):
        here = (start + column) < width
        x_at = x_ptr + row[:, None] * x_stride + start + column[None, :]
        x = tl.load(x_at, mask=here[None, :], other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + column, mask=here, other=0.0).to(tl.float32)[None, :]
        sums += weight.to(tl.float32)[None, :, :] * x[:, None, :]
        if IS_GATED:
            up_sums += up.to(tl.float32)[None, :, :] * x[:, None, :]
        following = start + BLOCK_IN
        inside = is_out[:, None] & (following + column < width)[None, :]
        weight = tl.load(weight_at + following, mask=inside, other=0.0, eviction_policy="evict_first")
        if IS_GATED:
            up = tl.load(weight_at + up_offset + following, mask=inside, other=0.0, eviction_policy="evict_first")
    result, up_result = tl.sum(sums, axis=2), tl.sum(up_sums, axis=2)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / width + eps)
        result *= scale[:, None]
        up_result *= scale[:, None]
    if IS_GATED:
        result = result / (1.0 + tl.exp(-result)) * up_result
    out_at = out_ptr + row[:, None] * num_out + outs[None, :]
    if ADDS:
        result += tl.load(out_at, mask=is_out[None, :], other=0.0).to(tl.float32)
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=is_out[None, :])


@dataclass(frozen=True, slots=True)
class Shape:
    """How a launch is cut."""

    block_out: int
    block_in: int
    num_warps: int
    has_pdl: bool


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    shape: Shape,
    norm: torch.Tensor | None = None,
    is_gated: bool = False,
    adds: bool = False,
) -> torch.Tensor:
    """Product of x [rows, width] and weight [outs, width] into `out`. Rows: a power of 2 of them, may be strided."""
    rows, width = x.shape
    num_out = weight.shape[0] // 2 if is_gated else weight.shape[0]
    few_rows_kernel[(triton.cdiv(num_out, shape.block_out),)](
        x,
        x if norm is None else norm,
        weight,
        out,
        x.stride(0),
        num_out,
        width,
        EPS,
        ROWS=rows,
        BLOCK_OUT=shape.block_out,
        BLOCK_IN=shape.block_in,
        HAS_NORM=norm is not None,
        IS_GATED=is_gated,
        ADDS=adds,
        HAS_PDL=shape.has_pdl,
        num_warps=shape.num_warps,
        **({"launch_pdl": True} if shape.has_pdl else {}),
    )
    return out


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer's products, and of the two norms."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def random(cls, device: torch.device, dtype: torch.dtype, scale: float = 0.02) -> Layer:
        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        norms = (1 + draw(HIDDEN), 1 + draw(HIDDEN))
        return cls(draw(QKV, HIDDEN), draw(HIDDEN, MIXED), draw(2 * INNER, HIDDEN), draw(HIDDEN, INNER), norms)

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in (self.qkv, self.out, self.gate_up, self.down))


def run_today(layers: list[Layer], residual: torch.Tensor) -> torch.Tensor:
    """The kernels of the engine as it is, the first values of qkv in the place of the attention's result."""
    x = rms_norm(residual, layers[0].norms[0], EPS)
    for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        mixed = F.linear(x, layer.qkv)[:, :MIXED]
        x = add_rms_norm(F.linear(mixed, layer.out), residual, layer.norms[1], EPS)
        x = add_rms_norm(F.linear(silu_mul(F.linear(x, layer.gate_up)), layer.down), residual, following.norms[0], EPS)
    return residual


def run_candidate(layers: list[Layer], residual: torch.Tensor, shape: Shape) -> torch.Tensor:
    """One kernel a product."""
    rows = residual.shape[0]
    qkv, inner = residual.new_empty(rows, QKV), residual.new_empty(rows, INNER)
    for layer in layers:
        mixed = few_rows(residual, layer.qkv, qkv, shape, layer.norms[0])[:, :MIXED]
        few_rows(mixed, layer.out, residual, shape, adds=True)
        few_rows(residual, layer.gate_up, inner, shape, layer.norms[1], is_gated=True)
        few_rows(inner, layer.down, residual, shape, adds=True)
    return residual


def time_graph(run: Callable[[], object], repeats: int = 50) -> float:
    """Seconds of one replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    began.record()
    for _ in range(repeats):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / repeats


def main() -> None:
    device = torch.device("cuda")
    layers = [Layer.random(device, torch.bfloat16) for _ in range(LAYERS)]
    num_bytes = sum(layer.num_bytes for layer in layers)
    shapes = [
        Shape(block_out, block_in, num_warps, has_pdl)
        for has_pdl in (False, True)
        for block_out, block_in, num_warps in (
            (4, 512, 4),
            (8, 512, 4),
            (4, 1024, 4),
            (8, 256, 4),
            (8, 1024, 8),
            (16, 512, 8),
        )
    ]
    for rows in [int(word) for word in sys.argv[1:]] or [1, 2, 4]:
        start = torch.randn(rows, HIDDEN, device=device).bfloat16()
        expected = run_today(layers, start.clone())
        for shape in [None, *shapes]:
            residual = start.clone()
            if shape is None:
                name, seconds = "today", time_graph(lambda residual=residual: run_today(layers, residual))
            else:
                found = run_candidate(layers, start.clone(), shape)
                error = float((found - expected).float().norm() / expected.float().norm())
                name = f"{shape} error {error:.1e}"
                seconds = time_graph(lambda residual=residual, shape=shape: run_candidate(layers, residual, shape))
            print(
                f"{rows} rows: {seconds / LAYERS * 1e6:6.1f} us a layer, {num_bytes / seconds / 1e12:.2f} TB/s  {name}",
                flush=True,
            )


if __name__ == "__main__":
    main()
