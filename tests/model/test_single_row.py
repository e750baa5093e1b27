"""A device's kernels for a step of one row are used for that step alone, and change nothing but its speed.

They are written in plain torch here; those of GPUs are in tests/unit/kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toka_engine.config import EngineConfig
from toka_engine.model import worker
from toka_engine.model.cpu import backend
from toka_engine.model.devices import select_backend
from toka_engine.model.linear import Linear, LinearParameters, LmHead, ResidualLinear
from toka_engine.model.ops import Ops
from toka_engine.model.ranks import Ranks, SingleRank
from toka_engine.model.residual import Norm

from tests.model.driving import Driver, load
from tests.model.test_logits import IDS, VARIANTS, check_parity
from tests.model.thread_ranks import run_ranks


class PlainGemv:
    """An ops.GemvKernels that notes its calls and the weights that it is given."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: list[torch.Tensor] = []

    def _note(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        assert x.shape == (1, weight.shape[1])
        self.calls.append(name)
        self.weights.append(weight)

    def norm_gemv(
        self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        self._note("norm_gemv", residual, weight)
        return F.linear(F.rms_norm(residual, norm.shape, norm, eps), weight, bias)

    def norm_gated_gemv(
        self, residual: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        self._note("norm_gated_gemv", residual, weight)
        gate, up = F.linear(F.rms_norm(residual, norm.shape, norm, eps), weight, bias).chunk(2, dim=1)
        return F.silu(gate) * up

    def gemv_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> None:
        self._note("gemv_add", x, weight)
        residual += F.linear(x, weight, bias)

    def gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._note("gemv", x, weight)
        return F.linear(x, weight, bias)

    def gated_gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._note("gated_gemv", x, weight)
        gate, up = F.linear(x, weight, bias).chunk(2, dim=1)
        return F.silu(gate) * up

    def partial_gemv(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._note("partial_gemv", x, weight)
        return F.linear(x, weight, bias)

    def head_gemv(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self._note("head_gemv", x, weight)
        return F.linear(x, weight)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> PlainGemv:
    """The CPU's table of operators for a step of one row, for this test."""
    kernels, make_ops = PlainGemv(), backend.make_ops
    monkeypatch.setattr(backend, "make_ops", lambda: replace(make_ops(), gemv=kernels))
    return kernels


@pytest.mark.parametrize("name", list(VARIANTS))
def test_steps_of_one_row_use_the_kernels_and_give_the_reference_logits(
    name: str, kernels: PlainGemv, drive_tiny: Callable[..., tuple[Any, Driver]]
) -> None:
    family, overrides = VARIANTS[name]
    model, driver = drive_tiny(family, num_hidden_layers=3, **overrides)
    check_parity(model, driver, prompt_len=7, total=11)
    gemvs = [call.replace("gated_", "") for call in kernels.calls]  # an activation of its own comes behind
    step = [*["norm_gemv", "gemv_add"] * 2 * 3, "head_gemv"]  # blocks, layers; the head
    # Of a prompt what follows the last attention: one row of it is sampled.
    assert gemvs == ["gemv_add", "norm_gemv", "gemv_add", "head_gemv", *step * 4]


def test_other_steps_do_not_use_the_kernels_and_have_the_same_bits(
    kernels: PlainGemv, drive_tiny: Callable[..., tuple[Any, Driver]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate() -> torch.Tensor:
        _, driver = drive_tiny(settings={"dtype": "bfloat16"})
        driver.prefill({0: IDS[:9], 1: IDS[3:20]})
        for _ in range(4):
            driver.decode([0, 1])
        return driver.logits

    found = generate()
    monkeypatch.undo()
    assert torch.equal(found, generate())
    assert kernels.calls == []


def test_the_kernels_get_the_weights_that_the_product_of_more_rows_has(
    kernels: PlainGemv, drive_tiny: Callable[..., tuple[Any, Driver]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []
    ops = replace(
        backend.make_ops(),
        make_linear=lambda weight, bias: made.append(weight) or (lambda x: x),
        make_head=lambda weight: made.append(weight) or (lambda x: x),
    )
    monkeypatch.setattr(backend, "make_ops", lambda: ops)
    _, driver = drive_tiny("Llama", num_hidden_layers=1)
    driver.prefill({0: [5]})
    assert kernels.calls == ["norm_gemv", "gemv_add", "norm_gated_gemv", "gemv_add", "head_gemv"]
    assert all(ours is theirs for ours, theirs in zip(kernels.weights, made, strict=True))


def make_linear(ops: Ops) -> tuple[Linear, weakref.ref[torch.Tensor]]:
    weight = torch.randn(24, 16)
    return Linear(ops, LinearParameters(weight, None)), weakref.ref(weight)


def test_packed_weights_are_the_only_copy_where_there_are_no_such_kernels() -> None:
    linear, weight = make_linear(backend.make_ops())
    assert weight() is None
    assert linear(torch.randn(1, 16)).shape == (1, 24)


def test_what_other_blocks_left_to_add_is_added_once_to_a_step_of_one_row(kernels: PlainGemv) -> None:
    ops = backend.make_ops()
    norm, (linear, _) = Norm(ops, torch.randn(16), 1e-5, SingleRank()), make_linear(ops)
    start, added = torch.randn(2, 1, 16)
    x, residual = norm(added, start.clone())
    found = linear(x)
    assert torch.equal(residual, start + added)
    assert kernels.calls == ["gemv"]
    x, residual = norm(residual, None)
    torch.testing.assert_close(linear(x), found)
    assert torch.equal(residual, start + added)
    assert kernels.calls == ["gemv", "norm_gemv"]


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_step_of_one_row_on_two_ranks_uses_the_kernels_and_adds_the_stream_once(
    is_fused: bool, make_tiny: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases and residuals would count twice if each rank's GEMV added the whole stream."""
    _, folder = make_tiny("Llama", attention_bias=True, mlp_bias=True)
    kernels = [PlainGemv(), PlainGemv()]

    def select(device: torch.device, config: EngineConfig, ranks: Ranks, *others: Any) -> backend.CpuBackend:
        def all_reduce_add_rms_norm(
            x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
        ) -> torch.Tensor:
            return plain.add_rms_norm(ranks.all_reduce(x), residual, weight, eps)

        chosen, plain = backend.CpuBackend(ranks), backend.make_ops()
        fused = all_reduce_add_rms_norm if is_fused else None
        chosen.ops = replace(plain, gemv=kernels[ranks.rank], all_reduce_add_rms_norm=fused)
        return chosen

    def generate(ranks: Ranks) -> torch.Tensor:
        driver = Driver(load(folder, ranks))
        driver.prefill({0: IDS[:9]})
        driver.decode([0])
        return driver.logits

    [whole] = run_ranks(1, generate)
    monkeypatch.setattr(worker, "select_backend", select)
    parts = run_ranks(2, generate)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    step = [*["gemv", "partial_gemv", "gated_gemv", "partial_gemv"] * 2, "head_gemv"]
    for each in kernels:
        assert each.calls[-len(step) :] == step


@pytest.mark.parametrize(("rows", "wanted"), [(1, None), (3, None), (3, [1]), (3, [2, 0])])
def test_a_blocks_output_is_in_the_stream_once_a_norm_has_read_it(
    rows: int, wanted: list[int] | None, kernels: PlainGemv
) -> None:
    ops, weight, bias = backend.make_ops(), torch.randn(16, 24), torch.randn(16)
    norm, last = Norm(ops, torch.randn(16), 1e-5, SingleRank()), ResidualLinear(ops, LinearParameters(weight, bias))
    x, start = torch.randn(rows, 24), torch.randn(rows, 16)
    rows_that_go_on = list(range(rows)) if wanted is None else wanted
    expected = (start + F.linear(x, weight, bias))[rows_that_go_on]
    _, residual = norm(last(x, None if wanted is None else torch.tensor(wanted)), start.clone())
    torch.testing.assert_close(residual, expected)
    finished = norm.finish(last(x, None if wanted is None else torch.tensor(wanted)), start.clone())
    torch.testing.assert_close(finished, F.rms_norm(expected, (16,), norm.weight, 1e-5))
    assert kernels.calls == ["gemv_add"] * 2 * (len(rows_that_go_on) == 1)


@pytest.mark.parametrize(("rows", "calls"), [(1, ["head_gemv"]), (2, [])])
def test_the_head_uses_the_kernels_for_one_row_alone(rows: int, calls: list[str], kernels: PlainGemv) -> None:
    weight, x = torch.randn(24, 16), torch.randn(rows, 16)
    torch.testing.assert_close(LmHead(backend.make_ops(), weight)(x), F.linear(x, weight))
    assert kernels.calls == calls


def test_a_model_that_is_compiled_gets_no_such_kernels(kernels: PlainGemv) -> None:
    cpu = torch.device("cpu")
    assert select_backend(cpu, EngineConfig(), SingleRank()).ops.gemv is kernels
    assert select_backend(cpu, EngineConfig(torch_compile=True), SingleRank()).ops.gemv is None
