"""Times attention of decode rows: rope_append and flashinfer's decode without tensor cores against attend_decode.

Prints microseconds a layer, and bytes of keys and values per second, of CUDA graphs of a few layers. Each layer has a
cache of its own, and a graph goes through the layers again, over other tokens, until the L2 cache holds none when it
comes back to them: in a model the weights see to that. What planning costs flashinfer's host is not in its time. Then
other configs of the kernel, from which LaunchConfig.of is chosen.

Usage: python -m tests.gpu.bench_decode_attention [HEAD_DIM ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import flashinfer
import torch
from toka_engine.model.kernels.decode_attention import LaunchConfig, Workspace, attend_decode
from toka_engine.model.kernels.rope_append import rope_append
from toka_engine.output import run_command

from tests.gpu.bench_gemv import time_graph

DEVICE = torch.device("cuda")
LAYERS, PAGE_SIZE = 4, 16
HEADS, KV_HEADS = 32, 8
CASES = [
    (1, 512),
    (1, 8192),
    (1, 32768),
    (16, 512),
    (64, 512),
    (64, 8192),
    (256, 512),
    (1024, 512),
    (4096, 320),
    (4096, 96),
]
CONFIG_CASES = [(1, 512), (1, 8192), (64, 512), (64, 8192), (1024, 512), (4096, 96)]
MOST_PAGES = max(rows * (context // PAGE_SIZE + 1) for rows, context in CASES)
L2_BYTES = 50 << 20
MOST_ROUNDS = 32


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

    @classmethod
    def random(cls, rows: int, context: int, head_dim: int) -> Rows:
        columns = context // PAGE_SIZE + 1
        num_bytes = LAYERS * rows * context * 2 * KV_HEADS * head_dim * 2
        rounds = min(MOST_ROUNDS, MOST_PAGES // (rows * columns), -(-2 * L2_BYTES // num_bytes))
        tables = torch.randperm(MOST_PAGES, device=DEVICE)[: rounds * rows * columns].int()
        packed = torch.randn(rows, HEADS + 2 * KV_HEADS, head_dim, device=DEVICE).bfloat16()
        return cls(
            context,
            *packed.split([HEADS, KV_HEADS, KV_HEADS], dim=1),
            torch.arange(rows, device=DEVICE, dtype=torch.int32),
            torch.full((rows,), context, device=DEVICE, dtype=torch.int32),
            tables.view(rounds, rows, columns),
        )

    @property
    def num_bytes(self) -> int:
        """The bytes of keys and values that one layer reads."""
        return int(self.q.shape[0]) * self.context * 2 * KV_HEADS * int(self.q.shape[2]) * 2

    def time_layer(self, run_layer: Callable[[int, torch.Tensor], None]) -> float:
        """Seconds of one of the graph's layers; `run_layer` takes a layer and its block table."""

        def run() -> None:
            for table in self.tables:
                for layer in range(LAYERS):
                    run_layer(layer, table)

        return time_graph(run, repeats=10) / (LAYERS * len(self.tables))


class Bench:
    """The settings that all cases share."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        page = (KV_HEADS, PAGE_SIZE, head_dim)
        self.cache = torch.empty(LAYERS, 2, MOST_PAGES, *page, device=DEVICE, dtype=torch.bfloat16)
        for layer in self.cache:
            layer.normal_()
        self.cos_sin = torch.randn(max(context for _, context in CASES) + 1, head_dim, device=DEVICE)
        self.scratch = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)

    def plan(self, rows: Rows, table: torch.Tensor) -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
        count, columns = table.shape
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.scratch, "HND", use_tensor_cores=False)
        wrapper.plan(
            torch.arange(count + 1, dtype=torch.int32) * columns, table.view(-1),
            torch.full((count,), rows.context % PAGE_SIZE + 1, dtype=torch.int32),
            HEADS, KV_HEADS, self.head_dim, PAGE_SIZE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        return wrapper

    def time_flashinfer(self, rows: Rows) -> tuple[float, torch.Tensor]:
        """Seconds a layer, and the result of the last one."""
        out, rotated = torch.empty_like(rows.q).contiguous(), torch.empty_like(rows.q).contiguous()
        wrappers = {table.data_ptr(): self.plan(rows, table) for table in rows.tables}

        def run_layer(layer: int, table: torch.Tensor) -> None:
            keys, values = self.cache[layer]
            rope_append(
                rows.q, rows.k, rows.v, self.cos_sin, rows.slots, rows.positions, table,
                keys.transpose(1, 2), values.transpose(1, 2), rotated,
            )  # fmt: skip
            wrappers[table.data_ptr()].run(rotated, (keys, values), out=out)

        return rows.time_layer(run_layer), out

    def time_candidate(self, rows: Rows, work: Workspace) -> tuple[float, torch.Tensor]:
        """The same of attend_decode."""
        out = torch.empty_like(rows.q).contiguous()

        def run_layer(layer: int, table: torch.Tensor) -> None:
            keys, values = self.cache[layer].transpose(2, 3)
            attend_decode(
                rows.q, rows.k, rows.v, self.cos_sin, rows.slots, rows.positions, table, keys, values, out, work,
                self.head_dim**-0.5,
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
        """Print flashinfer's time and each workspace's, with the relative error of its result."""
        seconds, expected = self.time_flashinfer(rows)
        self.report(rows, "rope_append, flashinfer", seconds, 0.0)
        for name, work in works.items():
            seconds, found = self.time_candidate(rows, work)
            error = float((found - expected).float().norm() / expected.float().norm())
            self.report(rows, name, seconds, error)


def bench_head_dim(head_dim: int) -> None:
    bench, usual = Bench(head_dim), LaunchConfig.of(head_dim)
    blocks = (32, 64) if head_dim <= 64 else (16, 32, 64)
    configs = {
        str(config): Workspace.allocate(HEADS, KV_HEADS, head_dim, DEVICE, config)
        for config in (replace(usual, block_tokens=block, num_warps=warps) for block, warps in product(blocks, (2, 4)))
    }
    print(f"{HEADS}/{KV_HEADS} heads of {head_dim}, chosen {usual}")
    for case in CASES:
        works = configs if case in CONFIG_CASES else {str(usual): configs[str(usual)]}
        bench.compare(Rows.random(*case, head_dim), works)


@torch.inference_mode()
def main() -> None:
    for head_dim in [int(word) for word in sys.argv[1:]] or [64, 128]:
        bench_head_dim(head_dim)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_command(main)
