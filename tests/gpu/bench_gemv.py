"""Times the GEMVs of a step of one row: kernels of more rows against fused kernels, by launch config.

Prints microseconds per layer without attention, and bytes of weights per second, of many layers in one CUDA graph: at
the end, fastest first, the chain of all four GEMVs; before it each GEMV alone, and the LM head after the kernel of the
final norm. The launch configs of model/kernels/gemv.py should be the fastest here, and dependent launches (P) should
pay: all is measured without them too. A chain must be as near to fp32 as today's is, and replays must give the same
bits: a kernel that did not wait would not.

Ends with code 1 if it is not so. Usage: python tests/gpu/bench_gemv.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from toka_engine.model.kernels.activation import silu_mul
from toka_engine.model.kernels.gemv import LaunchConfig, TritonGemv
from toka_engine.model.kernels.norm import add_rms_norm, rms_norm
from toka_engine.output import run_command
from triton import knobs

LAYERS = 16
HIDDEN, QKV, MIXED, INNER = 2048, 3072, 2048, 8192
VOCAB = 128256
EPS = 1e-5
ENGINE = TritonGemv.for_capability(90)
BEHIND_NORM = [LaunchConfig(1, 512, 1), LaunchConfig(4, 512, 4), LaunchConfig(2, 1024, 4)]
OTHER = [LaunchConfig(4, 1024, 8), LaunchConfig(8, 512, 4), LaunchConfig(4, 2048, 8)]
"""Neighbours, in place of the engine's one at a time."""
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
    """Computes one row with the kernels of more rows."""
    x = rms_norm(residual, layers[0].qkv_norm, EPS)
    for layer, following in itertools.zip_longest(layers, layers[1:]):
        mixed = F.linear(x, layer.qkv)[:, :MIXED]
        x = add_rms_norm(F.linear(mixed, layer.out), residual, layer.mlp_norm, EPS)
        pending = F.linear(silu_mul(F.linear(x, layer.gate_up)), layer.down)
        x = add_rms_norm(pending, residual, layer.qkv_norm if following is None else following.qkv_norm, EPS)
    return residual


def run_single_row(kernels: TritonGemv, layers: list[Layer], residual: torch.Tensor) -> torch.Tensor:
    """Computes one row with one kernel a product."""
    for layer in layers:
        mixed = kernels.norm_gemv(residual, layer.qkv_norm, EPS, layer.qkv, None)[:, :MIXED]
        kernels.gemv_add(mixed, layer.out, None, residual)
        inner = kernels.norm_gated_gemv(residual, layer.mlp_norm, EPS, layer.gate_up, None)
        kernels.gemv_add(inner, layer.down, None, residual)
    return residual


def list_parts_today(mixed: torch.Tensor, inner: torch.Tensor) -> dict[str, Part]:
    """The kernels of run_today between the products: the sum with the residual is at the next product's norm."""
    pending = mixed
    return {
        "qkv": lambda layer, residual: F.linear(add_rms_norm(pending, residual, layer.qkv_norm, EPS), layer.qkv),
        "out": lambda layer, residual: F.linear(mixed, layer.out),
        "gate_up": lambda layer, residual: silu_mul(
            F.linear(add_rms_norm(pending, residual, layer.mlp_norm, EPS), layer.gate_up)
        ),
        "down": lambda layer, residual: F.linear(inner, layer.down),
    }


def list_parts(kernels: TritonGemv, mixed: torch.Tensor, inner: torch.Tensor) -> dict[str, Part]:
    return {
        "qkv": lambda layer, residual: kernels.norm_gemv(residual, layer.qkv_norm, EPS, layer.qkv, None),
        "out": lambda layer, residual: kernels.gemv_add(mixed, layer.out, None, residual),
        "gate_up": lambda layer, residual: kernels.norm_gated_gemv(residual, layer.mlp_norm, EPS, layer.gate_up, None),
        "down": lambda layer, residual: kernels.gemv_add(inner, layer.down, None, residual),
    }


@dataclass(frozen=True, slots=True)
class Candidate:
    """Kernels to compare."""

    behind_norm: LaunchConfig = ENGINE.behind_norm
    other: LaunchConfig = ENGINE.other
    has_pdl: bool = True

    @property
    def kernels(self) -> TritonGemv:
        return TritonGemv(self.has_pdl, self.behind_norm, self.other)

    def __str__(self) -> str:
        return f"{'P' if self.has_pdl else '-'} {name_of(self.behind_norm)} {name_of(self.other)}"


def name_of(cut: LaunchConfig) -> str:
    return f"({cut.block_out},{cut.block_in},{cut.num_warps})"


def list_candidates() -> list[Candidate]:
    """The engine's first."""
    with_pdl = [Candidate(), *(Candidate(behind_norm=cut) for cut in BEHIND_NORM)]
    with_pdl += [Candidate(other=cut) for cut in OTHER]
    return with_pdl + [replace(each, has_pdl=False) for each in with_pdl]


def list_head_candidates() -> list[Candidate]:
    """The head's launch configs, the engine's first; the cut behind a norm means nothing to it."""
    configs = [ENGINE.other, *OTHER, ENGINE.behind_norm]
    return [Candidate(other=config, has_pdl=has_pdl) for has_pdl in (True, False) for config in configs]


Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Residual stream, the final norm's weights, the head's -> logits."""


def head_today(residual: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(rms_norm(residual, norm, EPS), weight)


def head_of_single_row(
    kernels: TritonGemv, residual: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return kernels.head_gemv(rms_norm(residual, norm, EPS), weight)


def run_head(head: Head, residual: torch.Tensor, norm: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """`weights`, each as large as a head, in turn: the L2 cache may hold the end of the one before, not of this one."""
    for weight in weights * HEAD_ROUNDS:
        head(residual, norm, weight)


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
    """Tells how near a chain is to fp32, and whether its bits are always the same."""

    error: float
    is_same: bool

    @classmethod
    def of(cls, kernels: TritonGemv, layers: list[Layer], start: torch.Tensor, expected: torch.Tensor) -> Check:
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


def time_heads(start: torch.Tensor) -> bool:
    """Say whether each is as near to fp32 as today's is."""
    norm = torch.ones_like(start[0])
    weights = [torch.randn(VOCAB, HIDDEN, device=start.device).to(start.dtype) for _ in range(2)]
    num_products = HEAD_ROUNDS * len(weights)
    expected = F.linear(F.rms_norm(start.float(), (HIDDEN,), None, EPS), weights[0].float())
    heads: dict[str, Head] = {TODAY: head_today}
    for each in list_head_candidates():
        heads[f"{'P' if each.has_pdl else '-'} {name_of(each.other)}"] = partial(head_of_single_row, each.kernels)
    compile_together(lambda: [head(start, norm, weights[0]) for head in heads.values()])
    errors = {name: error_of(head(start, norm, weights[0]), expected) for name, head in heads.items()}
    for name, head in heads.items():
        seconds = time_graph(partial(run_head, head, start, norm, weights))
        verdict = f"error {errors[name]:.2e}{'' if errors[name] < MOST_ERROR * errors[TODAY] else ' FAILED'}"
        num_bytes = num_products * weights[0].nbytes
        print(describe("head", seconds, num_products, num_bytes, f"{name} {verdict}"), flush=True)
    return all(error < MOST_ERROR * errors[TODAY] for error in errors.values())


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
    has_passed &= time_heads(start)
    print(*(line for _, line in sorted(chains)), sep="\n")
    return 0 if has_passed else 1


if __name__ == "__main__":
    run_command(main)
