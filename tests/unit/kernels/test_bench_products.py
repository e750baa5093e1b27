"""The chains that tests/gpu/bench_products.py times compute the same thing."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import bench_products
from tests.gpu.bench_products import Layer, run_fp32, run_single_row, run_today


def test_chains_of_both_kinds_of_kernels_give_what_plain_torch_gives(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toka_engine.model.kernels.single_row import Cut, SingleRowKernels

    for name, size in (("HIDDEN", 64), ("QKV", 96), ("MIXED", 64), ("INNER", 128)):
        monkeypatch.setattr(bench_products, name, size)
    torch.manual_seed(1)
    layers = [Layer.random(device, torch.float32, 0.2) for _ in range(2)]
    start = torch.randn(1, 64, device=device)
    expected = run_fp32(layers, start)
    few_programs = SingleRowKernels(False, Cut(16, 32, 2), Cut(16, 64, 4))
    for found in (run_single_row(few_programs, layers, start.clone()), run_today(layers, start.clone())):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
