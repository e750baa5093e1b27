"""Times attention to shared prefixes by launch config of our kernel, from which PrefixLaunchConfig's are chosen.

Prints microseconds a layer, the FLOPs of both products per second, and the greatest difference from the first cut's
result, of CUDA graphs of 16 layers with a cache each.

Usage: python -m tests.gpu.bench_prefix_attention [HEAD_DIM ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from toka_engine.model.kernels.prefix_attention import attend_prefix
from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace, pack_groups
from toka_engine.output import run_command

from tests.gpu.bench_gemv import compile_together, time_graph

DEVICE = torch.device("cuda")
LAYERS, PAGE_SIZE = 16, 16
HEADS, KV_HEADS = 32, 8
Size: TypeAlias = tuple[int, int, int]
"""Rows, tokens that each group shares, groups of equal size."""
SIZES: dict[int, list[Size]] = {
    64: [
        (1024, 1024, 1),
        (1024, 4096, 1),
        (1024, 16384, 1),
        (4096, 1024, 1),
        (4096, 4096, 1),
        (4096, 768, 16),
        (512, 2048, 4),
        (2048, 1024, 128),
    ],
    128: [(1024, 1024, 1), (1024, 4096, 1), (1024, 16384, 1), (4096, 768, 16), (2048, 1024, 128)],
}
CONFIGS = {
    64: [
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=8, num_stages=3, residency=2, max_registers=128),
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=8, num_stages=2, residency=2, max_registers=128),
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=4, num_stages=3, residency=2),
        PrefixLaunchConfig.for_hopper(64),
    ],
    128: [
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=8, num_stages=3, residency=1),
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=8, num_stages=2, residency=2, max_registers=128),
        PrefixLaunchConfig(block_rows=128, block_tokens=32, num_warps=8, num_stages=3, residency=2, max_registers=128),
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=4, num_stages=2, residency=2),
        PrefixLaunchConfig.for_hopper(128),
    ],
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows of groups that follow each other, with their own parts; group i's pages are those of slot i."""

    size: Size
    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    table: torch.Tensor

    @classmethod
    def random(cls, size: Size, head_dim: int, num_pages: int) -> Inputs:
        rows, shared, groups = size
        q, out = torch.randn(2, rows, HEADS, head_dim, device=DEVICE).bfloat16()
        pages = torch.randperm(num_pages, device=DEVICE)[: groups * shared // PAGE_SIZE].int()
        return cls(size, q, out, torch.randn(rows, HEADS, device=DEVICE) + 5, pages.view(groups, -1))

    @property
    def num_flops(self) -> int:
        rows, shared, _ = self.size
        return 4 * rows * shared * HEADS * int(self.q.shape[2])


Layer: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], object]
"""Adds a layer's shared part to `out` and `lse`, in place."""


class Bench:
    """The settings that all sizes of a head share."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self.num_pages = max(shared * groups for _, shared, groups in SIZES[head_dim]) // PAGE_SIZE
        self.cache = torch.empty(
            LAYERS, 2, self.num_pages, KV_HEADS, PAGE_SIZE, head_dim, device=DEVICE, dtype=torch.bfloat16
        ).normal_()
        self.scale = head_dim**-0.5
        self.works = {
            config: PrefixWorkspace.allocate(HEADS, KV_HEADS, head_dim, DEVICE, config) for config in CONFIGS[head_dim]
        }

    def make_candidate(self, inputs: Inputs, work: PrefixWorkspace) -> Layer:
        rows, _, groups = inputs.size
        index, ones = np.arange(groups, dtype=np.int32), np.ones(groups, np.int32)
        count, columns = rows // groups, inputs.table.shape[1]
        words = pack_groups(work, PAGE_SIZE, index * count, ones * count, index, 0 * ones, ones * columns, capacity=256)
        uploaded = torch.from_numpy(words).to(DEVICE)

        def run(layer: int, out: torch.Tensor, lse: torch.Tensor) -> None:
            keys, values = self.cache[layer].transpose(2, 3)
            attend_prefix(inputs.q, uploaded, inputs.table, keys, values, out, lse, work, self.scale)

        return run

    def compile(self) -> None:
        inputs = Inputs.random(SIZES[self.head_dim][0], self.head_dim, self.num_pages)

        def run() -> None:
            for work in self.works.values():
                self.make_candidate(inputs, work)(0, inputs.out, inputs.lse)

        compile_together(run)

    def time(self, inputs: Inputs, name: str, run: Layer, expected: torch.Tensor | None) -> torch.Tensor:
        """Print a line; returns what the first layer gives."""
        found, again = inputs.out.clone(), inputs.out.clone()
        for out in (found, again):
            run(0, out, inputs.lse.clone())
        out, lse = inputs.out.clone(), inputs.lse.clone()
        seconds = time_graph(lambda: [run(layer, out, lse) for layer in range(LAYERS)]) / LAYERS
        words = "" if expected is None else f"differs by {float((found.float() - expected.float()).abs().max()):.4f}"
        words += "" if torch.equal(found, again) else ", OTHER BITS WHEN RUN AGAIN"
        rows, shared, groups = inputs.size
        print(
            f"{rows:5d} x {shared:5d} in {groups:2d} {seconds * 1e6:8.2f} us a layer "
            f"{inputs.num_flops / seconds / 1e12:5.0f} TFLOP/s  {name}  {words}",
            flush=True,
        )
        return found

    def compare(self, size: Size) -> None:
        inputs = Inputs.random(size, self.head_dim, self.num_pages)
        expected = None
        for config, work in self.works.items():
            found = self.time(inputs, str(config), self.make_candidate(inputs, work), expected)
            expected = found if expected is None else expected


@torch.inference_mode()
def main() -> None:
    for head_dim in [int(word) for word in sys.argv[1:]] or list(SIZES):
        bench = Bench(head_dim)
        bench.compile()
        print(f"{HEADS}/{KV_HEADS} heads of {head_dim}, chosen {PrefixLaunchConfig.of(head_dim)}", flush=True)
        for size in SIZES[head_dim]:
            bench.compare(size)
        del bench
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_command(main)
