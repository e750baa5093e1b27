"""The ways that tests/gpu/bench_gemv.py times compute the same thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.gpu import bench_gemv
from tests.gpu.bench_gemv import (
    EPS,
    Candidate,
    Layer,
    list_candidates,
    list_head_candidates,
    run_fp32,
    run_single_row,
    run_today,
)


def test_chains_of_both_kinds_of_kernels_give_what_plain_torch_gives(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toka_engine.model.kernels.gemv import LaunchConfig

    for name, size in (("HIDDEN", 80), ("QKV", 96), ("MIXED", 64), ("INNER", 176)):
        monkeypatch.setattr(bench_gemv, name, size)
    torch.manual_seed(1)
    layers = [Layer.random(device, torch.float32, 0.2) for _ in range(2)]
    start = torch.randn(1, 80, device=device)
    expected = run_fp32(layers, start)
    few_programs = Candidate(LaunchConfig(16, 32, 2), LaunchConfig(16, 64, 4), has_pdl=False).kernels
    torch.testing.assert_close(run_single_row(few_programs, layers, start.clone()), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run_today(layers, start.clone()), expected, atol=1e-4, rtol=1e-4)


def test_heads_of_both_kinds_of_kernels_give_what_plain_torch_gives(device: torch.device) -> None:
    from toka_engine.model.kernels.gemv import LaunchConfig

    torch.manual_seed(1)
    row, norm, weight = (torch.randn(*shape, device=device) for shape in ((1, 80), (80,), (40, 80)))
    expected = F.linear(F.rms_norm(row, (80,), norm, EPS), weight)
    few_programs = Candidate(other=LaunchConfig(16, 32, 2), has_pdl=False).kernels
    torch.testing.assert_close(bench_gemv.head_today(row, norm, weight), expected, atol=1e-4, rtol=1e-4)
    found = bench_gemv.head_of_single_row(few_programs, row, norm, weight)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_candidates_are_the_engines_kernels_and_others_each_once_with_dependent_launches_and_once_without() -> None:
    for candidates, num_cuts in ((list_candidates(), 7), (list_head_candidates(), 5)):
        kernels = [each.kernels for each in candidates]
        assert kernels[0] == bench_gemv.ENGINE
        assert len(set(kernels)) == len(set(map(str, candidates))) == 2 * num_cuts
        assert {each for each in candidates if each.has_pdl} == {
            replace(each, has_pdl=True) for each in candidates if not each.has_pdl
        }
