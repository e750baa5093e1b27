"""What the products of a step of one row cost: kernels of more rows against one kernel a product, cut in several ways.

Microseconds a layer without attention, and bytes of weights per second, of many layers in one CUDA graph: the chain of
all four products, then each alone. The cuts of model/kernels/single_row.py are to be the fastest here, and its
dependent launches (P) to be worth it: they are measured without. Before that, the chain must be as near to fp32 as
today's is, and replays must give the same bits: a kernel that did not wait would not.

Ends with code 1 if it is not so. Usage: python tests/gpu/bench_products.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.norm import add_rms_norm, rms_norm
from toka_engine.model.kernels.single_row import Cut, SingleRowKernels

LAYERS = 16
HIDDEN, QKV, MIXED, INNER = 2048, 3072, 2048, 8192
EPS = 1e-5
ENGINE = SingleRowKernels.for_capability(90)
BEHIND_NORM = [ENGINE.behind_norm, Cut(2, 512, 2), Cut(2, 1024, 4), Cut(8, 512, 4)]
ONTO_RESIDUAL = [ENGINE.onto_residual, Cut(4, 1024, 8), Cut(4, 2048, 8), Cut(8, 2048, 16)]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer's products, and of the norms before the first and the third."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_norm: torch.Tensor
    mlp_norm: torch.Tensor

    @classmethod
    def random(cls, device: torch.device, dtype: torch.dtype, scale: float = 0.02) -> Layer:
        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        products = draw(QKV, HIDDEN), draw(HIDDEN, MIXED), draw(2 * INNER, HIDDEN), draw(HIDDEN, INNER)
        return cls(*products, 1 + draw(HIDDEN), 1 + draw(HIDDEN))

    def float(self) -> Layer:
        return Layer(*(getattr(self, field.name).float() for field in fields(self)))


Part = Callable[[Layer, torch.Tensor], object]
"""A layer and the residual stream -> one product of it."""


def run_fp32(layers: list[Layer], residual: torch.Tensor) -> torch.Tensor:
    """The first values of qkv stand for the attention's result, here and below."""
    residual = residual.float()
    for each in layers:
        layer = each.float()
        mixed = F.linear(F.rms_norm(residual, (HIDDEN,), layer.qkv_norm, EPS), layer.qkv)[:, :MIXED]
        residual = residual + F.linear(mixed, layer.out)
        gate, up = F.linear(F.rms_norm(residual, (HIDDEN,), layer.mlp_norm, EPS), layer.gate_up).chunk(2, dim=1)
        residual = residual + F.linear(F.silu(gate) * up, layer.down)
    return residual


def run_today(layers: list[Layer], residual: torch.Tensor) -> torch.Tensor:
    """With the kernels of more rows."""
    x = rms_norm(residual, layers[0].qkv_norm, EPS)
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        mixed = F.linear(x, layer.qkv)[:, :MIXED]
        x = add_rms_norm(F.linear(mixed, layer.out), residual, layer.mlp_norm, EPS)
        pending = F.linear(silu_mul(F.linear(x, layer.gate_up)), layer.down)
        x = add_rms_norm(pending, residual, layer.qkv_norm if following is None else following.qkv_norm, EPS)
    return residual


def run_single_row(kernels: SingleRowKernels, layers: list[Layer], residual: torch.Tensor) -> torch.Tensor:
    """With one kernel a product."""
    for layer in layers:
        mixed = kernels.product(residual, layer.qkv_norm, EPS, layer.qkv, None)[:, :MIXED]
        kernels.add_product(mixed, layer.out, None, residual)
        inner = kernels.gated_product(residual, layer.mlp_norm, EPS, layer.gate_up, None)
        kernels.add_product(inner, layer.down, None, residual)
    return residual


def list_parts_today(mixed: torch.Tensor, inner: torch.Tensor) -> dict[str, Part]:
    """What between them are the kernels of run_today: the sum with the residual is at the next product's norm."""
    pending = mixed
    return {
        "qkv": lambda layer, residual: F.linear(add_rms_norm(pending, residual, layer.qkv_norm, EPS), layer.qkv),
        "out": lambda layer, residual: F.linear(mixed, layer.out),
        "gate_up": lambda layer, residual: silu_mul(
            F.linear(add_rms_norm(pending, residual, layer.mlp_norm, EPS), layer.gate_up)
        ),
        "down": lambda layer, residual: F.linear(inner, layer.down),
    }


def list_parts(kernels: SingleRowKernels, mixed: torch.Tensor, inner: torch.Tensor) -> dict[str, Part]:
    return {
        "qkv": lambda layer, residual: kernels.product(residual, layer.qkv_norm, EPS, layer.qkv, None),
        "out": lambda layer, residual: kernels.add_product(mixed, layer.out, None, residual),
        "gate_up": lambda layer, residual: kernels.gated_product(residual, layer.mlp_norm, EPS, layer.gate_up, None),
        "down": lambda layer, residual: kernels.add_product(inner, layer.down, None, residual),
    }


def list_kernels() -> list[SingleRowKernels]:
    """All cuts with dependent launches, the engine's first; then those without."""
    pairs = itertools.product(BEHIND_NORM, ONTO_RESIDUAL)
    return [*(SingleRowKernels(True, *pair) for pair in pairs), replace(ENGINE, has_pdl=False)]


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graph(run: Callable[[], object], repeats: int = 40) -> float:
    """Seconds of one replay."""
    graph = capture(run)
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    began.record()
    for _ in range(repeats):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / repeats


def check(kernels: SingleRowKernels, layers: list[Layer], start: torch.Tensor, replays: int = 50) -> bool:
    """Print the error of the chain, and say whether it is as small as today's and its bits are always the same."""
    expected = run_fp32(layers, start)

    def error_of(found: torch.Tensor) -> float:
        return float((found.float() - expected).norm() / expected.norm())

    residual = start.clone()
    graph = capture(lambda: run_single_row(kernels, layers, residual.copy_(start)))
    graph.replay()
    first, is_same = residual.clone(), True
    for _ in range(replays):
        graph.replay()
        is_same &= torch.equal(residual, first)
    found, today = error_of(first), error_of(run_today(layers, start.clone()))
    passed = is_same and found < 1.2 * today
    print(
        f"{name_of(kernels)}: error {found:.2e} (today {today:.2e}), same bits: {is_same}{'' if passed else ' FAILED'}"
    )
    return passed


def name_of(kernels: SingleRowKernels) -> str:
    cuts = [f"({cut.block_out},{cut.block_in},{cut.num_warps})" for cut in (kernels.behind_norm, kernels.onto_residual)]
    return f"{'P' if kernels.has_pdl else '-'} {' '.join(cuts)}"


def report(name: str, what: str, run: Callable[[], object], num_bytes: int) -> None:
    seconds = time_graph(run)
    print(
        f"{what:8s}{seconds / LAYERS * 1e6:6.1f} us a layer {num_bytes / seconds / 1e12:5.2f} TB/s  {name}", flush=True
    )


def run_part(part: Part, layers: list[Layer], residual: torch.Tensor) -> None:
    for layer in layers:
        part(layer, residual)


def time_parts(name: str, parts: dict[str, Part], layers: list[Layer], residual: torch.Tensor) -> None:
    for what, part in parts.items():
        num_bytes = sum(getattr(layer, what).nbytes for layer in layers)
        report(name, what, partial(run_part, part, layers, residual), num_bytes)


def main() -> int:
    device = torch.device("cuda")
    torch.manual_seed(1)
    layers = [Layer.random(device, torch.bfloat16) for _ in range(LAYERS)]
    start = torch.randn(1, HIDDEN, device=device).bfloat16()
    mixed, inner = (torch.randn(1, width, device=device).bfloat16() * 0.01 for width in (MIXED, INNER))
    table = list_kernels()
    passed = [check(kernels, layers, start) for kernels in (table[0], table[-1])]
    num_bytes = sum(getattr(layer, what).nbytes for layer in layers for what in ("qkv", "out", "gate_up", "down"))
    report("today", "chain", partial(run_today, layers, start.clone()), num_bytes)
    for kernels in table:
        report(name_of(kernels), "chain", partial(run_single_row, kernels, layers, start.clone()), num_bytes)
    time_parts("today", list_parts_today(mixed, inner), layers, start.clone())
    for pair in zip(BEHIND_NORM, ONTO_RESIDUAL, strict=True):
        kernels = SingleRowKernels(True, *pair)
        time_parts(name_of(kernels), list_parts(kernels, mixed, inner), layers, start.clone())
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
