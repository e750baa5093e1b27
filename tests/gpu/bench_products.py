"""What the products of a step of one row cost: kernels of more rows against one kernel a product, cut in several ways.

Microseconds a layer without attention, and bytes of weights per second, of many layers in one CUDA graph: at the end,
fastest first, the chain of all four products; before it each product alone, and the LM head behind the final norm. The
cuts of model/kernels/single_row.py are to be the fastest here, and its dependent launches (P) to be worth it: they are
measured without. With each go the candidates of LOADS. A chain must be as near to fp32 as today's is, and replays must
give the same bits: a kernel that did not wait would not.

Ends with code 1 if it is not so. Usage: python tests/gpu/bench_products.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.norm import add_rms_norm, rms_norm
from toka_engine.model.kernels.single_row import Cut, SingleRowKernels
from triton import knobs

LAYERS = 16
HIDDEN, QKV, MIXED, INNER = 2048, 3072, 2048, 8192
VOCAB = 128256
EPS = 1e-5
ENGINE = SingleRowKernels.for_capability(90)
BEHIND_NORM = [Cut(2, 512, 2), Cut(2, 1024, 4), Cut(8, 512, 4)]
ONTO_RESIDUAL = [Cut(4, 1024, 8), Cut(4, 2048, 8), Cut(8, 2048, 16)]
"""In place of the engine's, one at a time."""
LOADS: dict[str, dict[str, Any]] = {
    "-": {},
    "a": {"repeats_x": True},
    "b": {"tiles_ahead": 2},
    "a+b": {"repeats_x": True, "tiles_ahead": 2},
    "c": {"evicts_first": False},
}
"""By a name for the table, what is set: x as the weights lie, two tiles ahead, both, and weights that L2 may keep."""
LOADS_OF_ALL_CUTS = ("-", "a", "b", "a+b")
"""The others with the engine's cuts alone."""
HEAD_CUTS = [Cut(4, 512, 4), Cut(8, 512, 4), Cut(2, 2048, 4), Cut(8, 1024, 8)]
HEAD_ROUNDS = 2
REPLAYS = 50
TODAY = "today"
MOST_ERROR = 1.2
"""In units of today's."""


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """Kernels to compare; `loads`: a key of LOADS."""

    behind_norm: Cut = ENGINE.behind_norm
    onto_residual: Cut = ENGINE.onto_residual
    loads: str = "-"
    has_pdl: bool = True

    @property
    def kernels(self) -> SingleRowKernels:
        return SingleRowKernels(self.has_pdl, self.behind_norm, self.onto_residual, **LOADS[self.loads])

    def __str__(self) -> str:
        cuts = f"{name_of(self.behind_norm)} {name_of(self.onto_residual)}"
        return f"{'P' if self.has_pdl else '-'} {self.loads:4s} {cuts}"


def name_of(cut: Cut) -> str:
    return f"({cut.block_out},{cut.block_in},{cut.num_warps})"


def list_candidates() -> list[Candidate]:
    """The engine's first, and without dependent launches last."""
    others = [Candidate(behind_norm=cut) for cut in BEHIND_NORM]
    others += [Candidate(onto_residual=cut) for cut in ONTO_RESIDUAL]
    return [
        *(Candidate(loads=loads) for loads in LOADS),
        *(replace(other, loads=loads) for other, loads in itertools.product(others, LOADS_OF_ALL_CUTS)),
        Candidate(has_pdl=False),
    ]


def run_head(
    head: Callable[[torch.Tensor, torch.Tensor], object], weights: list[torch.Tensor], row: torch.Tensor
) -> None:
    """`weights`, each as large as a head, in turn: the L2 cache may hold the end of the one before, not of this one."""
    for weight in weights * HEAD_ROUNDS:
        head(row, weight)


def head_today(norm: torch.Tensor, row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(rms_norm(row, norm, EPS), weight)


def head_of_single_row(
    kernels: SingleRowKernels, norm: torch.Tensor, row: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return kernels.product(row, norm, EPS, weight, None)


def compile_together(run: Callable[[], object]) -> None:
    """Compile what `run` launches, in as many threads as there are cores; the launches are left out."""
    found: dict[str, Callable[[], object]] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        found[key] = partial(fn.jit_function.preload, compile["specialization_data"])
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        run()
    finally:
        knobs.runtime.jit_cache_hook = None
    with ThreadPoolExecutor() as pool:
        for compiled in [pool.submit(each) for each in found.values()]:
            compiled.result()


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def time_graph(run: Callable[[], object], repeats: int = 10, rounds: int = 5) -> float:
    """Seconds of one replay, in the fastest round."""
    graph = capture(run)
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    seconds = []
    for _ in range(rounds):
        began.record()
        for _ in range(repeats):
            graph.replay()
        ended.record()
        torch.cuda.synchronize()
        seconds.append(float(began.elapsed_time(ended)) / 1e3 / repeats)
    return min(seconds)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@dataclass(frozen=True, slots=True)
class Check:
    """How near a chain is to fp32, and whether its bits are always the same."""

    error: float
    is_same: bool

    @classmethod
    def of(cls, kernels: SingleRowKernels, layers: list[Layer], start: torch.Tensor, expected: torch.Tensor) -> Check:
        residual = start.clone()
        graph = capture(lambda: run_single_row(kernels, layers, residual.copy_(start)))
        graph.replay()
        first, is_same = residual.clone(), True
        for _ in range(REPLAYS):
            graph.replay()
            is_same &= torch.equal(residual, first)
        return cls(error_of(first, expected), is_same)

    def is_passed(self, error_today: float) -> bool:
        return self.is_same and self.error < MOST_ERROR * error_today


def describe(what: str, seconds: float, num_products: int, num_bytes: int, name: object) -> str:
    """`num_products`: how many products, or layers of them, took `seconds` and read `num_bytes`."""
    return f"{what:8s}{seconds / num_products * 1e6:6.1f} us {num_bytes / seconds / 1e12:5.2f} TB/s  {name}"


def run_part(part: Part, layers: list[Layer], residual: torch.Tensor) -> None:
    for layer in layers:
        part(layer, residual)


def time_parts(name: object, parts: dict[str, Part], layers: list[Layer], residual: torch.Tensor) -> None:
    for what, part in parts.items():
        seconds = time_graph(partial(run_part, part, layers, residual))
        print(describe(what, seconds, LAYERS, sum(getattr(layer, what).nbytes for layer in layers), name), flush=True)


def time_heads(loads: set[str], start: torch.Tensor) -> bool:
    """Say whether each is as near to fp32 as today's is."""
    norm = torch.ones_like(start[0])
    weights = [torch.randn(VOCAB, HIDDEN, device=start.device).to(start.dtype) for _ in range(2)]
    num_products = HEAD_ROUNDS * len(weights)
    expected = F.linear(F.rms_norm(start.float(), (HIDDEN,), None, EPS), weights[0].float())
    heads = {TODAY: partial(head_today, norm)}
    for each, cut in itertools.product(sorted(loads), HEAD_CUTS):
        kernels = Candidate(behind_norm=cut, loads=each).kernels
        heads[f"P {each:4s} {name_of(cut)}"] = partial(head_of_single_row, kernels, norm)
    errors = {name: error_of(head(start, weights[0]), expected) for name, head in heads.items()}
    for name, head in heads.items():
        seconds = time_graph(partial(run_head, head, weights, start))
        verdict = f"error {errors[name]:.2e}{'' if errors[name] < MOST_ERROR * errors[TODAY] else ' FAILED'}"
        print(
            describe("head", seconds, num_products, num_products * weights[0].nbytes, f"{name} {verdict}"), flush=True
        )
    return max(errors.values()) < MOST_ERROR * errors[TODAY]


def main() -> int:
    device = torch.device("cuda")
    torch.manual_seed(1)
    layers = [Layer.random(device, torch.bfloat16) for _ in range(LAYERS)]
    start = torch.randn(1, HIDDEN, device=device).bfloat16()
    mixed, inner = (torch.randn(1, width, device=device).bfloat16() * 0.01 for width in (MIXED, INNER))
    expected = run_fp32(layers, start)
    error_today = error_of(run_today(layers, start.clone()), expected)
    candidates = list_candidates()
    compile_together(lambda: [run_single_row(each.kernels, layers[:1], start.clone()) for each in candidates])
    num_bytes = sum(getattr(layer, what).nbytes for layer in layers for what in ("qkv", "out", "gate_up", "down"))
    seconds = time_graph(partial(run_today, layers, start.clone()))
    chains = [(seconds, describe("chain", seconds, LAYERS, num_bytes, f"{TODAY} error {error_today:.2e}"))]
    timed, has_passed = [], True
    for each in candidates:
        check = Check.of(each.kernels, layers, start, expected)
        seconds = time_graph(partial(run_single_row, each.kernels, layers, start.clone()))
        verdict = f"error {check.error:.2e}{'' if check.is_same else ', other bits'}"
        if not check.is_passed(error_today):
            verdict, has_passed = f"{verdict} FAILED", False
        timed.append((seconds, each))
        chains.append((seconds, describe("chain", seconds, LAYERS, num_bytes, f"{each} {verdict}")))
    best = [each for _, each in sorted(timed, key=itemgetter(0))[:3]]
    time_parts(TODAY, list_parts_today(mixed, inner), layers, start.clone())
    for each in best:
        time_parts(each, list_parts(each.kernels, mixed, inner), layers, start.clone())
    has_passed &= time_heads({"-", best[0].loads}, start)
    print(*(line for _, line in sorted(chains)), sep="\n")
    return 0 if has_passed else 1


if __name__ == "__main__":
    sys.exit(main())
