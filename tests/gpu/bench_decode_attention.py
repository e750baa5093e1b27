"""Times decode attention of few rows at the 1B shape: rope_append and flashinfer's decode against attend_decode.

Prints microseconds a layer, and bytes of keys and values per second, of CUDA graphs of 16 layers. Each layer has a
cache of its own, and a graph goes through the layers again, over other tokens, until the L2 cache holds none when it
comes back to them: in a model the weights see to that. flashinfer is planned for a graph, as the engine plans it; what
that costs the host is not in its time. Then other cuts of the kernel, from which Cut.of is to be chosen.

Usage: python -m tests.gpu.bench_decode_attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from toka_engine.model.attention.base import AttentionShape
from toka_engine.model.attention.paged_plan import PageLists, list_pages
from toka_engine.model.kernels.decode_attention import Cut, Workspace, attend_decode
from toka_engine.model.kernels.paged import HND, DevicePages, PagedKernels
from toka_engine.model.kernels.rope import rope_append

from tests.gpu.bench_products import time_graph

DEVICE = torch.device("cuda")
LAYERS, PAGE_SIZE = 16, 16
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
SHAPE = AttentionShape(LAYERS, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, torch.bfloat16, DEVICE)
CASES = [(rows, context) for rows in (1, 4, 16, 64) for context in (128, 512, 2048, 8192)] + [(1, 32768)]
MOST_PAGES = max(rows * (context // PAGE_SIZE + 1) for rows, context in CASES)
L2_BYTES = 50 << 20
MOST_ROUNDS = 32

USUAL = Cut.of(HEAD_DIM)
CUTS = [
    *(replace(USUAL, num_programs=programs) for programs in (128, 256, 512, 1024)),
    *(replace(USUAL, block_tokens=block, num_warps=warps) for block, warps in ((32, 2), (32, 4), (64, 2), (128, 4))),
]


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's decode rows, over `rounds` sets of pages."""

    context: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor  # [rounds, rows, columns]
    pages: PageLists

    @classmethod
    def random(cls, rows: int, context: int) -> Rows:
        columns = context // PAGE_SIZE + 1
        num_bytes = LAYERS * rows * context * 2 * KV_HEADS * HEAD_DIM * 2
        rounds = min(MOST_ROUNDS, MOST_PAGES // (rows * columns), -(-2 * L2_BYTES // num_bytes))
        tables = torch.randperm(MOST_PAGES, device=DEVICE)[: rounds * rows * columns].int()
        packed = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        slots, ends = np.arange(rows, dtype=np.int32), np.full(rows, context + 1, np.int32)
        return cls(
            context,
            *packed.split([HEADS, KV_HEADS, KV_HEADS], dim=1),
            torch.arange(rows, device=DEVICE, dtype=torch.int32),
            torch.full((rows,), context, device=DEVICE, dtype=torch.int32),
            tables.view(rounds, rows, columns),
            list_pages(slots, np.zeros(rows, np.int32), ends, PAGE_SIZE),
        )

    @property
    def num_bytes(self) -> int:
        """Of keys and values that one layer reads."""
        return int(self.q.shape[0]) * self.context * 2 * KV_HEADS * HEAD_DIM * 2

    def time_layer(self, run_layer: Callable[[int, torch.Tensor], None]) -> float:
        """Seconds of one of the graph's layers; `run_layer` takes a layer and its block table."""

        def run() -> None:
            for table in self.tables:
                for layer in range(LAYERS):
                    run_layer(layer, table)

        return time_graph(run, repeats=10) / (LAYERS * len(self.tables))


class Bench:
    """What all cases share."""

    def __init__(self) -> None:
        self.cache = torch.empty(
            LAYERS, 2, MOST_PAGES, KV_HEADS, PAGE_SIZE, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16
        )
        for layer in self.cache:
            layer.normal_()
        self.cos_sin = torch.randn(max(context for _, context in CASES) + 1, HEAD_DIM, device=DEVICE)
        self.kernels = PagedKernels(SHAPE, PAGE_SIZE, HND)

    def time_today(self, rows: Rows) -> tuple[float, torch.Tensor]:
        """Seconds a layer, and the result of the last one."""
        out, rotated = torch.empty_like(rows.q).contiguous(), torch.empty_like(rows.q).contiguous()
        num_rows = rows.q.shape[0]
        kv_indptr, last_page_lens = (
            torch.from_numpy(each).to(DEVICE) for each in (rows.pages.kv_indptr, rows.pages.last_page_lens)
        )
        q_indptr = torch.arange(num_rows + 1, device=DEVICE, dtype=torch.int32)
        plan = self.kernels.plan_decode(rows.pages, True)

        def run_layer(layer: int, table: torch.Tensor) -> None:
            cache = self.cache[layer]
            keys, values = cache.transpose(2, 3)
            rope_append(
                rows.q, rows.k, rows.v, self.cos_sin, rows.slots, rows.positions, table, keys, values, rotated
            )  # fmt: skip
            pages = DevicePages(kv_indptr, table.view(-1), last_page_lens)
            self.kernels.run_decode(plan, rotated, cache, pages, q_indptr, out, None)

        return rows.time_layer(run_layer), out

    def time_candidate(self, rows: Rows, work: Workspace) -> tuple[float, torch.Tensor]:
        """The same of attend_decode."""
        out = torch.empty_like(rows.q).contiguous()

        def run_layer(layer: int, table: torch.Tensor) -> None:
            keys, values = self.cache[layer].transpose(2, 3)
            attend_decode(
                rows.q, rows.k, rows.v, self.cos_sin, rows.slots, rows.positions, table, keys, values, out, work,
                SHAPE.scale,
            )  # fmt: skip

        return rows.time_layer(run_layer), out

    def report(self, rows: Rows, name: str, seconds: float, error: float) -> None:
        size = f"{rows.q.shape[0]} x {rows.context}"
        print(
            f"{size:10s} {seconds * 1e6:8.2f} us a layer {rows.num_bytes / seconds / 1e12:6.2f} TB/s "
            f"error {error:.1e}  {name}",
            flush=True,
        )

    def compare(self, rows: Rows, works: dict[str, Workspace]) -> None:
        """Print today's time and each workspace's, with the relative error of its result."""
        seconds, expected = self.time_today(rows)
        self.report(rows, "rope_append, flashinfer", seconds, 0.0)
        for name, work in works.items():
            seconds, found = self.time_candidate(rows, work)
            error = float((found - expected).float().norm() / expected.float().norm())
            self.report(rows, name, seconds, error)


def make_work(cut: Cut) -> Workspace:
    return Workspace.allocate(HEADS, KV_HEADS, HEAD_DIM, DEVICE, cut)


@torch.inference_mode()
def main() -> None:
    bench, usual = Bench(), make_work(USUAL)
    works = {"attend_decode": usual, "attend_decode, no dependent launch": replace(usual, has_pdl=False)}
    for num_rows, context in CASES:
        bench.compare(Rows.random(num_rows, context), works)
    for num_rows in (1, 64):
        for context in (512, 8192):
            bench.compare(Rows.random(num_rows, context), {str(cut): make_work(cut) for cut in CUTS})


if __name__ == "__main__":
    main()
