"""Times attention over a KV cache of 8-bit floats, by launch config, beside one of bfloat16 with the same numbers.

Prints microseconds a layer of CUDA graphs, and by how much a result differs from that over bfloat16: decode rows with
the kernel that splits them and with the one for many rows, the widening of pages for prefill, and shared prefixes.
`LaunchConfig.of` and `PrefixLaunchConfig.choose` are to give what is fastest here.

Usage: python -m tests.gpu.bench_fp8_cache [HEAD_DIM ...]
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import torch
from toka_engine.model.kernels.decode_attention import LaunchConfig, Workspace, attend_decode
from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig
from toka_engine.model.kernels.pages import widen_pages
from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace
from toka_engine.output import run_command

from tests.gpu import bench_prefix_attention
from tests.gpu.bench_decode_attention import DEVICE, HEADS, KV_HEADS, LAYERS, MOST_PAGES, PAGE_SIZE, Rows
from tests.gpu.bench_gemv import compile_together, time_graph

CASES = [(1, 512), (1, 8192), (64, 512), (64, 8192), (256, 512), (1024, 300), (4096, 96)]
SPLIT_CONFIGS = {
    64: [(64, 2, True), (128, 2, True), (64, 4, True), (64, 2, False)],
    128: [(64, 4, True), (32, 2, True), (128, 4, True), (32, 2, False)],
}
SHORT_CONFIGS = {
    64: [(32, 1, 128, True), (32, 1, 255, True), (64, 1, 255, True), (32, 1, 255, False)],
    128: [(32, 1, 255, True), (16, 1, 255, True), (32, 2, 128, True), (16, 1, 255, False)],
}
"""Block, warps, registers of the kernel for many rows, and whether heads are columns."""
PREFIX_SIZES = [(1024, 1024, 1), (1024, 4096, 1), (2048, 768, 16), (2048, 1024, 128)]
PREFIX_CONFIGS = {
    head_dim: [
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=8, num_stages=2, residency=2, max_registers=128),
        PrefixLaunchConfig(block_rows=128, block_tokens=64, num_warps=8, num_stages=3, residency=1),
        PrefixLaunchConfig(block_rows=128, block_tokens=128, num_warps=8, num_stages=2, residency=1),
        PrefixLaunchConfig(block_rows=64, block_tokens=64, num_warps=4, num_stages=3, residency=2),
    ]
    for head_dim in (64, 128)
}
NUM_WIDENED = 2048


class DecodeBench:
    """Two caches of the same numbers, and the inputs that all cases share."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        page = (KV_HEADS, PAGE_SIZE, head_dim)
        self.stored = torch.empty(LAYERS, 2, MOST_PAGES, *page, device=DEVICE, dtype=torch.float8_e4m3fn)
        self.wide = torch.empty(self.stored.shape, device=DEVICE, dtype=torch.bfloat16)
        for stored, wide in zip(self.stored, self.wide, strict=True):
            stored.copy_(wide.normal_())
            wide.copy_(stored)
        self.cos_sin = torch.randn(max(context for _, context in CASES) + 1, head_dim, device=DEVICE)

    def run(self, rows: Rows, cache: torch.Tensor, work: Workspace) -> tuple[float, torch.Tensor]:
        """Seconds a layer, and the result of the last one."""
        out = torch.empty_like(rows.q).contiguous()

        def run_layer(layer: int, table: torch.Tensor) -> None:
            keys, values = cache[layer].transpose(2, 3)
            attend_decode(
                rows.q, rows.k, rows.v, self.cos_sin, rows.slots, rows.positions, table, keys, values, out, work,
                self.head_dim**-0.5,
            )  # fmt: skip

        return rows.time_layer(run_layer), out

    def list_configs(self) -> list[LaunchConfig]:
        usual = LaunchConfig.of(self.head_dim, has_fp8_cache=True)
        splits = [
            replace(usual, block_tokens=block, num_warps=warps, by_columns=columns, short=None)
            for block, warps, columns in SPLIT_CONFIGS[self.head_dim]
        ]
        short = [ShortLaunchConfig(1, 1, 1, 1, *each) for each in SHORT_CONFIGS[self.head_dim]]
        return splits + [replace(usual, short=each) for each in short]

    def compare(self) -> None:
        allocate = HEADS, KV_HEADS, self.head_dim, DEVICE
        works = [Workspace.allocate(*allocate, config) for config in self.list_configs()]
        usual = Workspace.allocate(*allocate, LaunchConfig.of(self.head_dim))
        first = Rows.random(*CASES[0], self.head_dim)

        def launch_all() -> None:
            for cache, some in ((self.wide, [usual]), (self.stored, works)):
                for work in some:
                    keys, values = cache[0].transpose(2, 3)
                    attend_decode(
                        first.q, first.k, first.v, self.cos_sin, first.slots, first.positions, first.tables[0], keys,
                        values, torch.empty_like(first.q).contiguous(), work, 1.0,
                    )  # fmt: skip

        compile_together(launch_all)
        for case in CASES:
            rows = Rows.random(*case, self.head_dim)
            seconds, expected = self.run(rows, self.wide, usual)
            self.report(rows, "bfloat16", seconds, 2)
            for work in works:
                short = work.config.short
                if (case[0] < 256) if short else (case[0] == 4096):
                    continue
                seconds, found = self.run(rows, self.stored, work)
                name = f"short {short}" if short else f"split {work.config}"
                error = float((found - expected).float().norm() / expected.float().norm())
                self.report(rows, f"{name} error {error:.1e}", seconds, 1)

    def report(self, rows: Rows, name: str, seconds: float, itemsize: int) -> None:
        rate = rows.num_bytes / 2 * itemsize / seconds / 1e12
        name = re.sub(r"\w*Config|\w+=", "", name)
        print(f"{rows.q.shape[0]:5d} x {rows.context:5d} {seconds * 1e6:8.2f} us {rate:5.2f} TB/s  {name}", flush=True)

    def time_widening(self) -> None:
        pages = torch.randperm(MOST_PAGES, device=DEVICE)[:NUM_WIDENED].int()
        out = torch.empty(2, NUM_WIDENED, *self.wide.shape[3:], device=DEVICE, dtype=torch.bfloat16)

        def run() -> None:
            for stored in self.stored:
                widen_pages(stored.flatten(2), pages, out.flatten(2))

        seconds = time_graph(run) / LAYERS
        print(f"widening {NUM_WIDENED * PAGE_SIZE} tokens {seconds * 1e6:.1f} us", flush=True)


def compare_prefixes(head_dim: int) -> None:
    bench_prefix_attention.SIZES[head_dim] = PREFIX_SIZES
    bench_prefix_attention.CONFIGS[head_dim] = [PrefixLaunchConfig.for_hopper(head_dim), *PREFIX_CONFIGS[head_dim]]
    bench = bench_prefix_attention.Bench(head_dim)
    stored = bench.cache.to(torch.float8_e4m3fn)
    wide = bench.cache.copy_(stored)
    inputs = [bench_prefix_attention.Inputs.random(size, head_dim, bench.num_pages) for size in PREFIX_SIZES]
    for each in inputs:
        expected = None
        for config, work in bench.works.items():
            bench.cache = wide if config.num_warpgroups else stored
            expected = _time_prefix(bench, each, config, work, expected)


def _time_prefix(
    bench: bench_prefix_attention.Bench,
    inputs: bench_prefix_attention.Inputs,
    config: PrefixLaunchConfig,
    work: PrefixWorkspace,
    expected: torch.Tensor | None,
) -> torch.Tensor:
    names = "block_rows", "block_tokens", "num_warps", "num_stages", "residency"
    name = "bfloat16, for Hopper" if config.num_warpgroups else str([getattr(config, each) for each in names])
    found = bench.time(inputs, name, bench.make_candidate(inputs, work), expected)
    return found if expected is None else expected


@torch.inference_mode()
def main() -> None:
    for head_dim in [int(word) for word in sys.argv[1:]] or [128, 64]:
        print(f"{HEADS}/{KV_HEADS} heads of {head_dim}", flush=True)
        bench = DecodeBench(head_dim)
        bench.compare()
        bench.time_widening()
        del bench
        torch.cuda.empty_cache()
        compare_prefixes(head_dim)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_command(main)
