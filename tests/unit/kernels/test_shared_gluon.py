"""The candidate for attention over shared tokens, which ran right on an H100, gives the definition in the simulator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.unit.kernels import gluon_simulator


class Simulated:
    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            gluon_simulator.launch(self._kernel, grid, *arguments, **constants)

        return launch


@pytest.fixture
def bench(monkeypatch) -> Any:
    from tests.gpu import bench_shared_gluon

    monkeypatch.setattr(bench_shared_gluon, "specialised_kernel", Simulated(bench_shared_gluon.specialised_kernel))
    return bench_shared_gluon


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [rows, heads, head_dim] over [heads, tokens, head_dim]: weighted values, and the scores' sum in base 2."""
    scores = torch.einsum("rhd,hnd->rhn", q, keys) * q.shape[2] ** -0.5
    return torch.einsum("rhn,hnd->rhd", scores.softmax(-1), values), scores.logsumexp(-1) / math.log(2)


@pytest.mark.parametrize(
    ("head_dim", "name"), [(64, "3x64-wide"), (64, "3x64-overlap"), (64, "3x64-overlap-q"), (128, "3x64-overlap")]
)
@pytest.mark.parametrize(("num_rows", "num_pages", "num_programs"), [(20, 8, 9), (50, 16, 40), (33, 24, 5)])
def test_the_candidate_gives_the_definition(bench, head_dim, name, num_rows, num_pages, num_programs) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads, kv_heads, page_size = bench.HEADS, bench.KV_HEADS, bench.PAGE_SIZE
    q, out = draw(2, num_rows, heads, head_dim).bfloat16()
    lse, cache = draw(num_rows, heads) + 3, draw(2, num_pages, kv_heads, page_size, head_dim).bfloat16()
    table = torch.randperm(num_pages, generator=generator).int()
    tokens = cache[:, table.long()].transpose(1, 2).flatten(2, 3).repeat_interleave(heads // kv_heads, dim=1).float()
    part, part_lse = attend(q.float(), *tokens)
    expected_lse = torch.logaddexp2(part_lse, lse)
    expected = part * torch.exp2(part_lse - expected_lse)[..., None] + out * torch.exp2(lse - expected_lse)[..., None]

    work = bench.Work(bench.CANDIDATES[head_dim][name], num_rows, table, head_dim, q.device)
    work.num_programs = num_programs
    work.share = -(-work.num_units // num_programs)
    work.launch(q, *map(bench.describe, cache), out, lse)
    work.merge(out, lse)
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)
