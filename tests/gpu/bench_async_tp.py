"""Times a layer of an 8B model on two ranks, with sums exchanged behind the GEMMs and while they run.

Usage: python3 -m tests.gpu.bench_async_tp. First, on one GPU: what it costs to cut the GEMMs of o and down into chunks.
Then two ranks: milliseconds a layer, causal attention of one prompt included, and the host's milliseconds to launch it.
Two ranks that share one GPU take turns on it: of theirs the host's times alone mean something.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from toka_engine.model.cuda.backend import make_ops
from toka_engine.model.cuda.overlapped_sums import OverlappedSums, StreamQueue, cut_rows
from toka_engine.model.cuda.peer_links import LinkSizes, connect_peers
from toka_engine.model.cuda.rendezvous import Rendezvous
from toka_engine.model.cuda.tensor_parallel import PeerParallel
from toka_engine.model.linear import GatedLinear, Linear, LinearParameters, ResidualLinear
from toka_engine.model.ops import Ops
from toka_engine.model.residual import Norm
from toka_engine.model.sharding import Sharding

ROWS = (1024, 2048, 4096, 8192)
NUM_RANKS, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM = 2, 4096, 14336, 32, 8, 128
CAPABILITY, BF16 = 90, torch.bfloat16
PASSES, TIMINGS = 8, 7


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * 0.02).to(BF16)


@dataclass
class Weights:
    """The matrices of one rank's part of a layer."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def make() -> Weights:
        heads = (HEADS + 2 * KV_HEADS) // NUM_RANKS
        inner = INNER // NUM_RANKS
        return Weights(
            random(heads * HEAD_DIM, WIDTH),
            random(WIDTH, HEADS // NUM_RANKS * HEAD_DIM),
            random(2 * inner, WIDTH),
            random(WIDTH, inner),
        )


class Layer:
    """A decoder layer of one rank, of the parts that models are made of."""

    def __init__(self, ops: Ops, weights: Weights, rank: int) -> None:
        ranks: Any = SimpleNamespace(rank=rank, size=NUM_RANKS)
        self._norms = [Norm(ops, torch.ones(WIDTH, device="cuda", dtype=BF16), 1e-5, ranks) for _ in range(2)]
        self._qkv, self._gate_up = (
            Linear(ops, LinearParameters(weights.qkv, None)),
            GatedLinear(ops, LinearParameters(weights.gate_up, None)),
        )
        self._out, self._down = (
            ResidualLinear(ops, LinearParameters(weight, None), is_partial=True)
            for weight in (weights.out, weights.down)
        )

    def __call__(self, x: Any, residual: torch.Tensor) -> tuple[Any, torch.Tensor]:
        x, residual = self._norms[0](x, residual)
        heads, kv_heads = HEADS // NUM_RANKS, KV_HEADS // NUM_RANKS
        qkv = self._qkv(x).view(1, residual.shape[0], -1, HEAD_DIM).transpose(1, 2)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = self._out(mixed.transpose(1, 2).reshape(residual.shape[0], -1))
        x, residual = self._norms[1](x, residual)
        return self._down(self._gate_up(x)), residual


def time_passes(layer: Layer, rows: int, meet: Callable[[], object]) -> tuple[float, float, torch.Tensor]:
    """Milliseconds a layer on the device, those of the host, both medians, and the residual stream at the end."""
    partial, start = random(rows, WIDTH), random(rows, WIDTH)
    device_ms, host_ms = [], []
    residual = start
    for _ in range(TIMINGS + 1):
        x, residual = partial, start.clone()
        torch.cuda.synchronize()
        meet()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began_s = time.perf_counter()
        begin.record()
        for _ in range(PASSES):
            x, residual = layer(x, residual)
        end.record()
        host_ms.append((time.perf_counter() - began_s) / PASSES * 1e3)
        # The last sum is taken, too: ranks begin and end the same ones.
        layer._norms[0](x, residual)
        torch.cuda.synchronize()
        device_ms.append(begin.elapsed_time(end) / PASSES)
    return median(device_ms[1:]), median(host_ms[1:]), residual


def bench(rank: int, meeting: str) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    guard = torch.inference_mode()
    with guard:
        sharding, rendezvous = Sharding(rank, NUM_RANKS), Rendezvous(Path(meeting), rank, NUM_RANKS)
        sizes = LinkSizes(WIDTH, max(ROWS), 8, 1024, max(ROWS))
        links = connect_peers(sharding, sizes, CAPABILITY, rendezvous.gather)
        assert links.boxes is not None
        sums = OverlappedSums(links.boxes, 1, StreamQueue())
        parallel, weights = PeerParallel(links, 1024, rendezvous.agree_min, sums), Weights.make()
        plain, overlapped = (
            Layer(replace(make_ops(CAPABILITY, each), fp8=None), weights, rank)
            for each in (replace(parallel, sums=None), parallel)
        )
        for rows in ROWS if torch.cuda.device_count() >= NUM_RANKS else ROWS[-1:]:
            found = []
            for layer in (plain, overlapped, plain, overlapped):
                torch.manual_seed(rows)
                found.append(time_passes(layer, rows, lambda: rendezvous.gather(b"")))
            error = float((found[0][2] - found[1][2]).norm() / found[0][2].norm())
            if rank == 0:
                behind, beside = (min(found[n][0], found[n + 2][0]) for n in (0, 1))
                print(
                    f"rows {rows:5d}: behind {behind:.3f} ms (again within {abs(found[0][0] - found[2][0]):.3f}), "
                    f"overlapped {beside:.3f} ms: {behind / beside:.3f} x; host {found[2][1]:.2f} and "
                    f"{found[3][1]:.2f} ms; difference {error:.1e}",
                    flush=True,
                )
        torch.cuda.synchronize()
        rendezvous.gather(b"")


def time_gemms(rows: int, depth: int) -> tuple[float, float]:
    """Microseconds of a GEMM to WIDTH outputs: of all rows at once, and in the chunks of `cut_rows`."""
    x, matrix = random(rows, depth), random(WIDTH, depth)
    ways = ([slice(0, rows)], cut_rows(rows))
    times: list[list[float]] = [[], []]
    for _ in range(TIMINGS + 1):
        for way, chunks in enumerate(ways):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            for _ in range(PASSES):
                for chunk in chunks:
                    F.linear(x[chunk], matrix)
            end.record()
            torch.cuda.synchronize()
            times[way].append(begin.elapsed_time(end) / PASSES * 1e3)
    return median(times[0][1:]), median(times[1][1:])


def main() -> None:
    for name, depth in (("o", HEADS // NUM_RANKS * HEAD_DIM), ("down", INNER // NUM_RANKS)):
        for rows in ROWS:
            whole, cut = time_gemms(rows, depth)
            print(f"{name:4s} rows {rows:5d}: whole {whole:.0f} us, in {len(cut_rows(rows))} chunks {cut:.0f} us")
    if torch.cuda.device_count() < NUM_RANKS:
        print("two ranks share this GPU: only the host's times mean something")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(bench, (f"{folder}/meeting",), nprocs=NUM_RANKS)


if __name__ == "__main__":
    main()
