"""Times decode attention of many rows over few own tokens: one program a KV head against several heads a program.

Prints microseconds a layer, and bytes of keys and values per second, of 16 layers with caches of their own in one CUDA
graph: between two visits of a layer its cache leaves L2, as a model's weights would see to. Beside each cut of
model/kernels/decode_attention_short.py stands by how much its result differs from that of decode_attention's kernel,
which all launches took before. ShortLaunchConfig.of is to be chosen from what is fastest here.

Usage: python -m tests.gpu.bench_suffix_attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from toka_engine.model.kernels.decode_attention import LaunchConfig, SuffixPart, Workspace, attend_decode
from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig
from toka_engine.output import run_command

from tests.gpu.bench_gemv import compile_together, time_graph

DEVICE = torch.device("cuda")
LAYERS, PAGE_SIZE = 16, 16
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
SHARED = 256
"""Tokens before a row's own ones, where rows share any."""
PART_CASES = [(rows, own) for rows in (512, 1024, 4096) for own in (16, 32, 96)]
ALONE_CASES = [(1024, 96), (1024, 320), (4096, 96), (4096, 320)]
MOST_PAGES = max(rows * (own // PAGE_SIZE + 1) for rows, own in PART_CASES + ALONE_CASES) + 1


def make_short_config(heads: int, block_tokens: int, num_warps: int, most_registers: int) -> ShortLaunchConfig:
    """The launch config of so many heads a program, however many rows there are."""
    return ShortLaunchConfig(heads, heads, 1, 1, block_tokens, num_warps, most_registers)


def list_configs(is_part: bool) -> dict[str, LaunchConfig]:
    """The launch configs by name, the first to compare with. Each block, warps and registers is one compilation."""
    usual = replace(LaunchConfig.of(HEAD_DIM), short=None)
    configs = {f"one head, splits: block {usual.block_tokens}, warps {usual.num_warps}": usual}
    sizes = [(32, 1, 255), (32, 2, 168)] if is_part else [(32, 1, 255), (64, 2, 255)]
    for size in sizes:
        for heads in (1, 2, 4, 8) if size == sizes[0] else (2, 8):
            name = "block {}, warps {}, registers {}".format(*size)
            configs[f"heads {heads}: {name}"] = replace(usual, short=make_short_config(heads, *size))
    return configs


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's decode rows, each with `own` tokens before its new one, and what every launch writes."""

    own: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor
    out: torch.Tensor
    part: SuffixPart | None

    @classmethod
    def random(cls, rows: int, own: int, is_part: bool) -> Rows:
        """Pages before the own ones are page 0: nothing may read them."""
        shared, columns = SHARED if is_part else 0, own // PAGE_SIZE + 1
        pages = 1 + torch.randperm(MOST_PAGES - 1, device=DEVICE)[: rows * columns].int().view(rows, columns)
        packed = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        part = SuffixPart(
            torch.full((rows,), shared, device=DEVICE, dtype=torch.int32),
            torch.zeros(rows, HEADS, device=DEVICE),
            torch.zeros(rows, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16),
        )
        return cls(
            own,
            *packed.split([HEADS, KV_HEADS, KV_HEADS], dim=1),
            torch.arange(rows, device=DEVICE, dtype=torch.int32),
            torch.full((rows,), shared + own, device=DEVICE, dtype=torch.int32),
            torch.cat((pages.new_zeros(rows, shared // PAGE_SIZE), pages), dim=1),
            torch.zeros(rows, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16),
            part if is_part else None,
        )

    @property
    def num_bytes(self) -> int:
        """The bytes of keys and values that one layer reads."""
        return int(self.q.shape[0]) * self.own * 2 * KV_HEADS * HEAD_DIM * 2

    def launch(self, caches: torch.Tensor, cos_sin: torch.Tensor, work: Workspace) -> None:
        """All layers, one after the other."""
        for cache in caches:
            keys, values = cache.transpose(2, 3)
            attend_decode(
                self.q, self.k, self.v, cos_sin, self.slots, self.positions, self.table, keys, values, self.out, work,
                HEAD_DIM**-0.5, self.part,
            )  # fmt: skip

    def take_results(self, launch: Callable[[], None]) -> list[torch.Tensor]:
        """The results of the last layer: the outputs, and of a part the log-sum-exp and q rotated."""
        written = [self.out] if self.part is None else [self.out, self.part.lse, self.part.rotated]
        for tensor in written:
            tensor.fill_(float("nan"))  # what is not written differs from all
        launch()
        return [tensor.to(torch.float32, copy=True) for tensor in written]


def bench_case(rows: Rows, works: dict[str, Workspace], caches: torch.Tensor, cos_sin: torch.Tensor) -> None:
    expected: list[torch.Tensor] = []
    title = f"{rows.q.shape[0]} x {rows.own}" + (" own" if rows.part is not None else "")
    for name, work in works.items():

        def launch(work: Workspace = work) -> None:
            rows.launch(caches, cos_sin, work)

        results = rows.take_results(launch)
        expected = expected or results
        differences = [(one - other).abs().max() for one, other in zip(results, expected, strict=True)]
        difference = float(torch.stack(differences).max())  # NaN if any is
        seconds = time_graph(launch, repeats=3) / LAYERS
        print(
            f"{title:14s} {seconds * 1e6:8.2f} us a layer {rows.num_bytes / seconds / 1e12:6.2f} TB/s "
            f"difference {difference:.1e}  {name}",
            flush=True,
        )


@torch.inference_mode()
def main() -> None:
    page = (KV_HEADS, PAGE_SIZE, HEAD_DIM)
    caches = torch.empty(LAYERS, 2, MOST_PAGES, *page, device=DEVICE, dtype=torch.bfloat16)
    for cache in caches:
        cache.normal_()
    longest = max(own for _, own in PART_CASES + ALONE_CASES)
    cos_sin = torch.randn(SHARED + longest + 1, HEAD_DIM, device=DEVICE)
    works = {
        is_part: {
            name: Workspace.allocate(HEADS, KV_HEADS, HEAD_DIM, DEVICE, config)
            for name, config in list_configs(is_part).items()
        }
        for is_part in (True, False)
    }

    def launch_all() -> None:
        for is_part, group in works.items():
            rows = Rows.random(*PART_CASES[0], is_part)
            for work in group.values():
                rows.launch(caches[:1], cos_sin, work)

    compile_together(launch_all)
    for is_part, cases in ((True, PART_CASES), (False, ALONE_CASES)):
        for case in cases:
            bench_case(Rows.random(*case, is_part), works[is_part], caches, cos_sin)


if __name__ == "__main__":
    run_command(main)
