"""Times the linear layers of an 8B layer in bf16 and in fp8, with norms, activation and quantisation between them.

Prints microseconds a layer without attention, by rows, as the engine runs it; then the parts of it: each GEMM with fast
accumulation and without, and the kernels that quantise, or each GEMV. Many layers are in one CUDA graph, so that no
weights stay in the L2 cache. Usage: python3 -m tests.gpu.bench_fp8 [ROWS,...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from toka_engine.model.cuda.backend import make_fp8_linear
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.fp8_gemv import Fp8Gemv
from toka_engine.model.kernels.gemv import TritonGemv
from toka_engine.model.kernels.norm import add_rms_norm
from toka_engine.model.kernels.quantised_rows import quantise_rows, quantised_add_rms_norm, quantised_silu_mul
from toka_engine.model.ops import GemvKernels, QuantisedRows
from toka_engine.model.quantization import QuantisedWeight, quantise_weight
from toka_engine.output import run_command

from tests.gpu.bench_gemv import compile_together, time_graph

HIDDEN, QKV, INNER = 4096, 6144, 14336
EPS = 1e-5
NUM_LAYERS = 6
ROWS = (1, 64, 256, 1024, 8192)


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
Run = Callable[[], object]


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


def make_gemv(kernels: Sequence[GemvKernels], weights: Sequence[torch.Tensor], norm: torch.Tensor) -> Layer:
    """`kernels` of qkv, out, gate and up, down."""

    def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        mixed = kernels[0].norm_gemv(residual, norm, EPS, weights[0], None)[:, :HIDDEN]
        kernels[1].gemv_add(mixed, weights[1], None, residual)
        kernels[3].gemv_add(
            kernels[2].norm_gated_gemv(residual, norm, EPS, weights[2], None), weights[3], None, residual
        )
        return x

    return run


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


def list_products(
    kernels: Sequence[GemvKernels], weights: Sequence[torch.Tensor], norm: torch.Tensor
) -> dict[str, Run]:
    """The four GEMVs of a layer, each alone."""
    residual, inner = (torch.zeros(1, width, device="cuda").bfloat16() for width in (HIDDEN, INNER))
    return {
        "qkv": lambda: kernels[0].norm_gemv(residual, norm, EPS, weights[0], None),
        "out": lambda: kernels[1].gemv_add(residual, weights[1], None, residual),
        "gate_up": lambda: kernels[2].norm_gated_gemv(residual, norm, EPS, weights[2], None),
        "down": lambda: kernels[3].gemv_add(inner, weights[3], None, residual),
    }


def time_single_row(all_weights: Sequence[Weights], norm: torch.Tensor) -> None:
    stored = [list(map(quantise_weight, each.all)) for each in all_weights]
    plain = TritonGemv.for_capability(90)
    ways = {
        "bf16": [([plain] * 4, each.all) for each in all_weights],
        "fp8": [
            ([Fp8Gemv.for_capability(90, one.scale) for one in each], [one.values for one in each]) for each in stored
        ],
    }
    x = torch.zeros(1, HIDDEN, device="cuda").bfloat16()
    compile_together(lambda: [make_gemv(*way[0], norm)(x, x.clone()) for way in ways.values()])
    for name, way in ways.items():
        took, num_bytes = (
            time_layers([make_gemv(*each, norm) for each in way], 1),
            sum(each.nbytes for each in way[0][1]),
        )
        parts = [list_products(*each, norm) for each in way]
        runs = {part: [each[part] for each in parts] for part in parts[0]}
        alone = [time_graph(lambda part=part: [run() for run in part]) / len(way) * 1e6 for part in runs.values()]
        words = ", ".join(f"{part} {each:.1f}" for part, each in zip(runs, alone, strict=True))
        print(f"rows 1: {name} {took:.1f} us ({num_bytes / took / 1e6:.2f} TB/s): {words}", flush=True)


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
