"""A model whose ranks exchange sums while a GEMM runs computes what it does without, in the steps that are meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toka_engine.config import EngineConfig
from toka_engine.model import worker
from toka_engine.model.cpu import backend
from toka_engine.model.linear import LinearParameters, ResidualLinear
from toka_engine.model.ops import BegunSum, Gemm
from toka_engine.model.quantization import quantise_weight
from toka_engine.model.ranks import Ranks, SingleRank

from tests.model.driving import Driver, load
from tests.model.plain_fp8 import PlainFp8
from tests.model.test_logits import IDS
from tests.model.thread_ranks import run_ranks

THRESHOLD = 5


class ChunkedSum(BegunSum):
    """The sum of two chunks, which ranks add up when the norm asks for it."""

    def __init__(self, ranks: Ranks, parts: list[torch.Tensor]) -> None:
        self._ranks, self._parts = ranks, parts

    def add_rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        total = torch.cat([self._ranks.all_reduce(part) for part in self._parts])
        return backend.make_ops().add_rms_norm(total, residual, weight, eps)


def test_only_steps_of_enough_rows_exchange_early_and_biases_and_residuals_count_once(
    make_tiny: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_tiny("Llama", attention_bias=True, mlp_bias=True)
    rows_begun: list[list[int]] = [[], []]

    def select(device: torch.device, config: EngineConfig, ranks: Ranks, *others: Any) -> backend.CpuBackend:
        def all_reduce_add_rms_norm(
            x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
        ) -> torch.Tensor:
            return plain.add_rms_norm(ranks.all_reduce(x), residual, weight, eps)

        def begin_sum(x: torch.Tensor, gemm: Gemm) -> BegunSum | None:
            if x.shape[0] < THRESHOLD:
                return None
            rows_begun[ranks.rank].append(x.shape[0])
            return ChunkedSum(ranks, [gemm(x[:3]), gemm(x[3:])])

        chosen, plain = backend.CpuBackend(ranks), backend.make_ops()
        chosen.ops = replace(plain, all_reduce_add_rms_norm=all_reduce_add_rms_norm, begin_sum=begin_sum)
        return chosen

    def generate(ranks: Ranks) -> list[torch.Tensor]:
        driver, seen = Driver(load(folder, ranks)), []
        for prompts in ({0: IDS[:9]}, {1: IDS[4:7]}, {slot: IDS[slot : slot + 4] for slot in range(2, 9)}):
            driver.prefill(prompts)
            seen.append(driver.logits)
        driver.decode(list(range(9)))
        return [*seen, driver.logits]

    [whole] = run_ranks(1, generate)
    monkeypatch.setattr(worker, "select_backend", select)
    parts = run_ranks(2, generate)
    for step, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[step] for part in parts], dim=1), expected, atol=1e-4, rtol=1e-4)
    # Of two layers: o and down of the first one; behind the last attention only the sampled rows go on: seven of the
    # third step, in the last down; all nine of the last step.
    expected_rows = [9, 9, 28, 28, 7, 9, 9, 9, 9]
    assert rows_begun == [expected_rows, expected_rows]


def test_a_layer_that_computes_in_fp8_leaves_its_sum_to_the_norm() -> None:
    begun: list[int] = []

    def begin_sum(x: torch.Tensor, gemm: Gemm) -> BegunSum | None:
        begun.append(x.shape[0])
        return ChunkedSum(SingleRank(), [gemm(x)])

    ops = replace(backend.make_ops(), fp8=PlainFp8().make_ops(), begin_sum=begin_sum)
    weight, x = torch.randn(32, 16), torch.randn(8, 16)
    assert isinstance(ResidualLinear(ops, LinearParameters(weight, None), is_partial=True)(x), BegunSum)
    assert begun == [8]
    quantised = quantise_weight(weight)
    in_fp8 = LinearParameters(quantised.values, None, quantised.scale)
    output = ResidualLinear(ops, in_fp8, is_partial=True)(x)
    assert isinstance(output, torch.Tensor)
    assert begun == [8]
    torch.testing.assert_close(output.float(), x @ weight.T, atol=0.5, rtol=0.1)
