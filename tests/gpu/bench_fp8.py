"""Times the linear layers of an 8B layer in bf16 and in fp8, with norms, activation and quantisation between them.

Prints microseconds a layer without attention, by rows, as the engine runs it; then the parts of it: each GEMM with fast
accumulation and without, the kernels that quantise, and GEMVs by launch config. Many layers are in one CUDA graph, so
that no weights stay in the L2 cache. Usage: python3 -m tests.gpu.bench_fp8 [ROWS,...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from toka_engine.model.cuda.backend import make_fp8_linear
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.gemv import SCALED_BEHIND_NORM, SCALED_OTHER, LaunchConfig, TritonGemv
from toka_engine.model.kernels.norm import add_rms_norm
from toka_engine.model.kernels.quantised_rows import quantise_rows, quantised_add_rms_norm, quantised_silu_mul
from toka_engine.model.ops import QuantisedRows
from toka_engine.model.quantization import QuantisedWeight, quantise_weight
from toka_engine.output import run_command

from tests.gpu.bench_gemv import compile_together, time_graph

HIDDEN, QKV, INNER = 4096, 6144, 14336
EPS = 1e-5
NUM_LAYERS = 6
ROWS = (1, 64, 256, 1024, 8192)
_BEHIND_NORM = ((2, 128, 1), (1, 256, 1), (2, 128, 2), (4, 128, 2), (2, 256, 2), (1, 256, 2), (8, 128, 4), (2, 256, 1))
_OTHER = ((1, 128, 1), (1, 512, 2), (4, 128, 2), (2, 256, 2), (1, 512, 1), (8, 128, 4), (2, 256, 1), (4, 256, 4))
BEHIND_NORM, OTHER = ([LaunchConfig(*each) for each in configs] for configs in (_BEHIND_NORM, _OTHER))
"""Others than the engine's."""


@dataclass(frozen=True, slots=True)
class Weights:
    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def random(cls) -> Weights:
        shapes = (QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)
        return cls(*((torch.randn(*shape, device="cuda") * 0.02).bfloat16() for shape in shapes))

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def num_values(self) -> int:
        return sum(weight.numel() for weight in self.all)


Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A block's output and the residual stream, which grows -> the last block's output."""


def make_bf16(weights: Weights, norm: torch.Tensor) -> Layer:
    def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        mixed = F.linear(add_rms_norm(x, residual, norm, EPS), weights.qkv)[:, :HIDDEN]
        x = add_rms_norm(F.linear(mixed, weights.out), residual, norm, EPS)
        return F.linear(silu_mul(F.linear(x, weights.gate_up)), weights.down)

    return run


def make_fp8(weights: Weights, norm: torch.Tensor) -> Layer:
    qkv, out, gate_up, down = (
        make_fp8_linear(each.values, each.scale, None) for each in map(quantise_weight, weights.all)
    )

    def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        mixed = qkv(quantised_add_rms_norm(x, residual, norm, EPS))[:, :HIDDEN]
        x = out(quantise_rows(mixed))
        return down(quantised_silu_mul(gate_up(quantised_add_rms_norm(x, residual, norm, EPS))))

    return run


def make_gemv(kernels: Sequence[TritonGemv], weights: Sequence[torch.Tensor], norm: torch.Tensor) -> Layer:
    """`kernels` of qkv, out, gate and up, down."""

    def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        mixed = kernels[0].norm_gemv(residual, norm, EPS, weights[0], None)[:, :HIDDEN]
        kernels[1].gemv_add(mixed, weights[1], None, residual)
        kernels[3].gemv_add(
            kernels[2].norm_gated_gemv(residual, norm, EPS, weights[2], None), weights[3], None, residual
        )
        return x

    return run


def make_fp8_gemv(
    stored: Sequence[QuantisedWeight], norm: torch.Tensor, behind_norm: LaunchConfig, other: LaunchConfig
) -> Layer:
    kernels = [replace(TritonGemv.for_scaled(90, each.scale), behind_norm=behind_norm, other=other) for each in stored]
    return make_gemv(kernels, [each.values for each in stored], norm)


def time_layers(layers: Sequence[Layer], rows: int) -> float:
    """Microseconds of one layer."""
    x, residual = (torch.randn(rows, HIDDEN, device="cuda").bfloat16() for _ in range(2))

    def run() -> None:
        last = x
        for layer in layers:
            last = layer(last, residual)

    return time_graph(run, repeats=5 if rows < 2048 else 1) / len(layers) * 1e6


def time_parts(all_weights: Sequence[Weights], rows: int) -> None:
    """Print microseconds of each GEMM in both, of fp8 also without fast accumulation, and of what quantises."""

    def slow(weight: QuantisedWeight, x: QuantisedRows) -> torch.Tensor:
        return torch._scaled_mm(
            x[0], weight.values.t(), x[1], weight.scale[None], out_dtype=torch.bfloat16, use_fast_accum=False
        )

    words = []
    for name in ("qkv", "out", "gate_up", "down"):
        weights = [getattr(each, name) for each in all_weights]
        stored = list(map(quantise_weight, weights))
        x = torch.randn(rows, weights[0].shape[1], device="cuda").bfloat16()
        quantised = quantise_rows(x)
        ways = (
            [partial(F.linear, x, weight) for weight in weights],
            [partial(make_fp8_linear(each.values, each.scale, None), quantised) for each in stored],
            [partial(slow, each, quantised) for each in stored],
        )
        times = [time_graph(lambda way=way: [each() for each in way], 3) / len(way) * 1e6 for way in ways]
        words.append(f"{name} bf16 {times[0]:.0f} fp8 {times[1]:.0f} not fast {times[2]:.0f}")
    shapes = (rows, HIDDEN), (rows, HIDDEN), (HIDDEN,), (rows, 2 * INNER)
    x, residual, norm, gate_up = (torch.randn(*shape, device="cuda").bfloat16() for shape in shapes)
    arguments = x, residual, norm, EPS
    for name, kernels in (
        ("norm", (lambda: add_rms_norm(*arguments), lambda: quantised_add_rms_norm(*arguments))),
        ("silu", (lambda: silu_mul(gate_up), lambda: quantised_silu_mul(gate_up))),
        ("quantise", (lambda: quantise_rows(x),)),
    ):
        times = [time_graph(lambda kernel=kernel: [kernel() for _ in range(8)], 3) / 8 * 1e6 for kernel in kernels]
        words.append(f"{name} {' '.join(f'{each:.1f}' for each in times)}")
    print(f"  {rows} rows, us: {'; '.join(words)}", flush=True)


def time_single_row(all_weights: Sequence[Weights], norm: torch.Tensor) -> None:
    plain = TritonGemv.for_capability(90)
    stored = [list(map(quantise_weight, each.all)) for each in all_weights]
    engine = SCALED_BEHIND_NORM, SCALED_OTHER
    pairs = [engine, *((each, engine[1]) for each in BEHIND_NORM), *((engine[0], each) for each in OTHER)]
    chains = {pair: [make_fp8_gemv(each, norm, *pair) for each in stored] for pair in pairs}
    bf16 = [make_gemv([plain] * 4, each.all, norm) for each in all_weights]
    x, num_values = torch.zeros(1, HIDDEN, device="cuda").bfloat16(), all_weights[0].num_values
    compile_together(lambda: [layers[0](x, x.clone()) for layers in (*chains.values(), bf16)])
    took = time_layers(bf16, 1)
    print(f"rows 1: bf16 {took:.1f} us ({2 * num_values / took / 1e6:.2f} TB/s)", flush=True)
    for (behind_norm, other), layers in chains.items():
        fp8 = time_layers(layers, 1)
        rate = num_values / fp8 / 1e6
        print(f"  fp8 {fp8:.1f} us ({rate:.2f} TB/s) {took / fp8:.2f} x, {behind_norm} {other}", flush=True)


def main() -> None:
    rows_asked = [int(each) for each in sys.argv[1].split(",")] if len(sys.argv) > 1 else ROWS
    torch.manual_seed(1)
    all_weights, norm = [Weights.random() for _ in range(NUM_LAYERS)], torch.ones(HIDDEN, device="cuda").bfloat16()
    for rows in rows_asked:
        if rows == 1:
            time_single_row(all_weights, norm)
            continue
        bf16, fp8 = (time_layers([make(each, norm) for each in all_weights], rows) for make in (make_bf16, make_fp8))
        flops = 2 * rows * all_weights[0].num_values
        rates = ", ".join(f"{flops / each / 1e6:.0f} TFLOP/s" for each in (bf16, fp8))
        print(f"rows {rows}: bf16 {bf16:.0f} us, fp8 {fp8:.0f} us ({rates}) {bf16 / fp8:.2f} x", flush=True)
        time_parts(all_weights, rows)


if __name__ == "__main__":
    run_command(main)
