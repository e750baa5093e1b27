"""The kernels of linear layers in fp8 give what their definition in float64 gives, with the values that are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toka_engine.model.architectures.registry import build_model
from toka_engine.model.config_fields import ConfigFields
from toka_engine.model.model_config import parse_model_config
from toka_engine.model.quantization import QuantisedWeight, quantise_weight
from toka_engine.model.ranks import SingleRank

from tests.marks import rest_is_slow
from tests.unit.kernels.conftest import ON_GPU
from tests.unit.kernels.gluon_simulator import Simulated
from tests.unit.kernels.test_gemv import FIELDS, FirstTokens, RandomWeights, draw, kernels, norm_of, relative_error

__all__ = ["draw", "kernels"]
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
EPS = 1e-5
ERROR = 2.0**-4
"""The largest relative error of a value that is rounded to e4m3's three bits of mantissa."""
LEAST_ERROR = 2.0**-10 / 448
"""The same for e4m3's smallest values, in units of a row's largest one."""


def check_rows(rows: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor, before: float = 0.0) -> None:
    """`before`: the relative error that the values may have before they are quantised."""
    values, scales = rows
    assert values.dtype == E4M3
    assert values.shape == expected.shape
    assert scales.shape == (expected.shape[0], 1)
    assert scales.dtype == torch.float32
    largest = expected.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales.double(), largest / 448, rtol=1e-5 + before, atol=1e-30)
    error = (values.double() * scales.double() - expected).abs()
    allowed = (ERROR + before) * expected.abs() + LEAST_ERROR * largest
    assert bool((error <= allowed * 1.001).all()), float((error - allowed).max())


@pytest.mark.parametrize("width", [16, 96, 576, 2048])
def test_each_row_has_its_own_scale(device, generator, width) -> None:
    from toka_engine.model.kernels.quantised_rows import quantise_rows

    x = torch.randn(7, width + 48, generator=generator, device=device)
    x *= torch.logspace(-6, 6, 7, device=device)[:, None]
    x = x.to(BF16)[:, 16 : 16 + width]
    check_rows(quantise_rows(x), x.double())


def test_a_row_of_zeros_stays_zeros_and_one_that_is_not_finite_does_not_become_finite(device) -> None:
    from toka_engine.model.kernels.quantised_rows import quantise_rows

    x = torch.zeros(3, 64, device=device, dtype=BF16)
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    values, scales = quantise_rows(x)
    products = values.float() * scales
    assert torch.equal(products[0], torch.zeros_like(products[0]))
    assert not bool(products[1, 5].isfinite())
    assert not bool(products[2, 5].isfinite())
    assert quantise_rows(x[:0])[0].shape == (0, 64)


@pytest.mark.parametrize("width", [96, 576])
def test_a_norm_is_quantised_without_a_rounding_before(device, generator, width) -> None:
    from toka_engine.model.kernels.quantised_rows import quantised_rms_norm

    x = torch.randn(5, width + 32, generator=generator, device=device)[:, :width]
    weight = torch.randn(width, generator=generator, device=device)
    check_rows(quantised_rms_norm(x, weight, EPS), norm_of(x, weight))
    low, low_weight = x.to(BF16), weight.to(BF16)  # the norm is rounded before the weight, as in bf16
    check_rows(quantised_rms_norm(low, low_weight, EPS), norm_of(low, low_weight), before=2.0**-7)


def test_the_sum_that_is_normed_becomes_the_residual(device, generator) -> None:
    from toka_engine.model.kernels.quantised_rows import quantised_add_rms_norm

    x, residual = torch.randn(2, 7, 320, generator=generator, device=device).to(BF16)
    weight = torch.randn(320, generator=generator, device=device).to(BF16)
    total = residual.double() + x.double()
    rows = quantised_add_rms_norm(x, residual, weight, EPS)
    assert relative_error(residual, total) < 1e-2
    check_rows(rows, norm_of(residual, weight), before=2.0**-7)


def test_an_activation_is_quantised(device, generator) -> None:
    from toka_engine.model.kernels.quantised_rows import quantised_silu_mul

    gate_up = torch.randn(6, 2 * 2512, generator=generator, device=device).to(BF16) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    check_rows(quantised_silu_mul(gate_up), F.silu(gate) * up, before=2.0**-7)


@pytest.fixture
def scaled(device, monkeypatch) -> Any:
    """scaled(scale): the kernels for weights with these scales."""
    from toka_engine.model.kernels import fp8_gemv

    if not ON_GPU:
        monkeypatch.setattr(fp8_gemv, "_fp8_gemv_kernel", Simulated(fp8_gemv._fp8_gemv_kernel))
    return lambda scale, **changes: replace(fp8_gemv.Fp8Gemv.for_capability(90, scale), **changes)


WIDTHS = [(48, 6, 264), (2048 + 16, 41, 2), (5 * 2048, 9, 1)]
"""Width, number of outputs, and of programs that share them: one chunk, two and five, the last not always whole."""


def test_every_8_bit_float_is_multiplied_as_its_value(device, scaled) -> None:
    """One weight of each row is not zero, so that each sum is one value."""
    values = torch.arange(256, dtype=torch.uint8, device=device)
    values = torch.cat([values[:0x7F], values[0x80:0xFF]])  # without the two that are not numbers
    kernels = scaled(torch.ones(254, device=device))
    for column in (0, 1, 2, 3, 15):
        weight = torch.zeros(254, 16, dtype=torch.uint8, device=device)
        weight[:, column] = values
        out = kernels.gemv(torch.ones(1, 16, device=device), weight.view(E4M3), None)
        assert torch.equal(out[0], values.view(E4M3).float())


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
def test_a_row_of_any_size_is_multiplied_as_it_is(device, draw, scaled, size) -> None:
    """float16, in which it is multiplied, ends at 65,504."""
    stored = quantise_weight(draw(torch.float32, 9, 4096))
    x = (draw(torch.float32, 1, 4096) * size).to(BF16)
    x[0, 7], x[0, 2050] = size * 300, size * 3000  # of one chunk each
    expected = F.linear(x.double(), stored.values.double() * stored.scale.double()[:, None])
    found = scaled(stored.scale).head_gemv(x, stored.values)
    assert relative_error(found, expected) < 1e-5


def test_an_infinity_and_what_is_no_number_stay_such(device, scaled) -> None:
    stored = quantise_weight(torch.ones(3, 32, device=device))
    for value in (float("inf"), float("nan")):
        x = torch.ones(1, 32, device=device, dtype=BF16)
        x[0, 9] = value
        assert not bool(scaled(stored.scale).gemv(x, stored.values, None).isfinite().any())


@pytest.mark.parametrize("has_bias", rest_is_slow([True], [False, True]))
@pytest.mark.parametrize(("width", "num_out", "max_programs"), WIDTHS)
def test_products_of_one_row_are_scaled_before_bias_activation_and_residual(
    device, draw, scaled, width, num_out, max_programs, has_bias
) -> None:
    weight = draw(torch.float32, 2 * num_out, width) * torch.logspace(-2, 2, 2 * num_out, device=device)[:, None]
    stored = quantise_weight(weight)
    exact = stored.values.double() * stored.scale.double()[:, None]
    bias = draw(BF16, 2 * num_out) if has_bias else None
    x, norm, residual = draw(BF16, 1, width), draw(BF16, width), draw(BF16, 1, 2 * num_out)
    kernels, added = scaled(stored.scale, max_programs=max_programs), residual.clone()
    kernels.gemv_add(x, stored.values, bias, added)
    plain = F.linear(x.double(), exact, None if bias is None else bias.double())
    normed = F.linear(norm_of(x, norm), exact, None if bias is None else bias.double())
    assert relative_error(added, residual.double() + plain) < 1e-2
    assert relative_error(kernels.gemv(x, stored.values, bias), plain) < 1e-2
    assert relative_error(kernels.partial_gemv(x, stored.values, bias), plain) < 1e-2
    assert relative_error(kernels.norm_gemv(x, norm, EPS, stored.values, bias), normed) < 1e-2
    for out, sums in (
        (kernels.gated_gemv(x, stored.values, bias), plain),
        (kernels.norm_gated_gemv(x, norm, EPS, stored.values, bias), normed),
    ):
        gate, up = sums.chunk(2, dim=1)
        assert relative_error(out, F.silu(gate) * up) < 1e-2


class RoundedWeights(RandomWeights):
    """The same as 8-bit floats, or the values that these stand for."""

    def __init__(self, device: torch.device, is_kept: bool, left: str = "none") -> None:
        super().__init__(device)
        self._is_kept, self._left = is_kept, left

    def is_quantised(self, name: str) -> bool:
        return self._is_kept and self._left not in name

    def take_quantised(self, name: str, shape: tuple[int, int], shard: Any = None) -> QuantisedWeight:
        return quantise_weight(super().take(name, shape, shard))

    def take(self, name: str, shape: tuple[int, ...], shard: Any = None) -> torch.Tensor:
        if not name.endswith("_proj.weight") or self._left in name:
            return super().take(name, shape, shard)
        rounded = quantise_weight(super().take(name, shape, shard))
        return rounded.values.float() * rounded.scale[:, None]


def multiply(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """The GEMM's definition: torch has it for GPUs alone."""
    return lambda rows: F.linear(rows[0].float() * rows[1], weight.float() * scale[:, None], bias)


BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("left", rest_is_slow(["layers.0.self_attn"], ["none", "layers.1.", "layers.0.self_attn"]))
@pytest.mark.parametrize(
    ("architecture", "fields"),
    rest_is_slow(
        [("LlamaForCausalLM", BIASED), ("Qwen3ForCausalLM", {})],
        [("LlamaForCausalLM", {}), ("LlamaForCausalLM", BIASED), ("Qwen3ForCausalLM", {})],
    ),
)
def test_a_model_in_fp8_gives_nearly_what_it_gives_with_rows_that_are_not_rounded(
    device, kernels, scaled, architecture, fields, left
) -> None:
    from toka_engine.model.cuda.backend import make_fp8_ops, make_linear, make_ops
    from toka_engine.model.kernels.gemv import LaunchConfig

    few = LaunchConfig(32, 64, 4)
    config = parse_model_config(ConfigFields({"architectures": [architecture], **FIELDS, **fields}, Path()))
    kernels = replace(kernels, behind_norm=few, other=few)
    plain = replace(make_ops(0), gemv=kernels, make_head=lambda weight: make_linear(weight, None))
    fp8 = replace(make_fp8_ops(90), make_linear=multiply, make_gemv=scaled)
    rounded = build_model(config, RoundedWeights(device, False, left), plain, SingleRank())
    model = build_model(config, RoundedWeights(device, True, left), replace(plain, fp8=fp8), SingleRank())
    ids = torch.tensor([3, 30, 44], dtype=torch.int32, device=device)
    expected, together = (each.forward(ids, FirstTokens()) for each in (rounded, model))
    assert 0 < relative_error(together, expected) < 0.15
    alone = torch.cat([model.forward(ids[row : row + 1], FirstTokens()) for row in range(3)])
    torch.testing.assert_close(alone, expected, atol=1e-3, rtol=1e-3)  # one row is not rounded
    wanted = torch.tensor([0, 2], device=device)
    some = model.forward(ids, FirstTokens(), wanted)
    torch.testing.assert_close(some, together[wanted], atol=1e-4, rtol=1e-4)
    (last,) = model.forward(ids, FirstTokens(), wanted[1:])
    assert relative_error(last, expected[2]) < 0.15
    assert model.forward(ids, FirstTokens(), wanted[:0]).shape == (0, 64)
