"""The candidate of tests/gpu/bench_products.py computes what the kernels of today compute."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import bench_products
from tests.gpu.bench_products import Layer, Shape, run_candidate, run_today


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_one_kernel_a_product_gives_what_norm_product_activation_and_sum_give(
    rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("HIDDEN", 64), ("QKV", 96), ("MIXED", 64), ("INNER", 128)):
        monkeypatch.setattr(bench_products, name, size)
    torch.manual_seed(1)
    layers = [Layer.random(device, torch.float32, 0.2) for _ in range(2)]
    start = torch.randn(rows, 64, device=device)
    found = run_candidate(layers, start.clone(), Shape(block_out=8, block_in=32, num_warps=4, has_pdl=False))
    torch.testing.assert_close(found, run_today(layers, start.clone()), atol=1e-4, rtol=1e-4)
