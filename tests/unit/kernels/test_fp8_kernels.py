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
def scaled(kernels: Any) -> Any:
    """scaled(scale): the kernels for weights with these scales."""
    from toka_engine.model.kernels.gemv import SCALED_BEHIND_NORM, SCALED_OTHER

    return lambda scale: replace(
        kernels, behind_norm=SCALED_BEHIND_NORM, other=SCALED_OTHER, scale=scale, has_cvt=ON_GPU
    )


WIDTHS = [(48, 6), (1024 + 16, 5), (3 * 1024, 9)]


def test_every_8_bit_float_is_unpacked_to_its_value(device, scaled) -> None:
    """One weight of each row is not zero, so that each sum is one value."""
    from toka_engine.model.kernels.gemv import LaunchConfig

    values = torch.arange(256, dtype=torch.uint8, device=device)
    values = torch.cat([values[:0x7F], values[0x80:0xFF]])  # without the two that are not numbers
    kernels = replace(scaled(torch.ones(254, device=device)), behind_norm=LaunchConfig(256, 16, 4))
    for column in range(5):
        weight = torch.zeros(254, 16, dtype=torch.uint8, device=device)
        weight[:, column] = values
        out = kernels.gemv(torch.ones(1, 16, device=device), weight.view(E4M3), None)
        assert torch.equal(out[0], values.view(E4M3).float())


@pytest.mark.parametrize("has_bias", rest_is_slow([True], [False, True]))
@pytest.mark.parametrize(("width", "num_out"), WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), rest_is_slow([(BF16, 1e-2)], [(torch.float32, 1e-5), (BF16, 1e-2)]))
def test_products_of_one_row_are_scaled_before_bias_activation_and_residual(
    device, draw, scaled, dtype, tolerance, width, num_out, has_bias
) -> None:
    weight = draw(torch.float32, 2 * num_out, width) * torch.logspace(-2, 2, 2 * num_out, device=device)[:, None]
    stored = quantise_weight(weight)
    exact = stored.values.double() * stored.scale.double()[:, None]
    bias = draw(dtype, 2 * num_out) if has_bias else None
    x, norm, residual = draw(dtype, 1, width), draw(dtype, width), draw(dtype, 1, 2 * num_out)
    kernels, added = scaled(stored.scale), residual.clone()
    kernels.gemv_add(x, stored.values, bias, added)
    plain = F.linear(x.double(), exact, None if bias is None else bias.double())
    normed = F.linear(norm_of(x, norm), exact, None if bias is None else bias.double())
    assert relative_error(added, residual.double() + plain) < tolerance
    assert relative_error(kernels.gemv(x, stored.values, bias), plain) < tolerance
    assert relative_error(kernels.partial_gemv(x, stored.values, bias), plain) < tolerance
    assert relative_error(kernels.norm_gemv(x, norm, EPS, stored.values, bias), normed) < tolerance
    for out, sums in (
        (kernels.gated_gemv(x, stored.values, bias), plain),
        (kernels.norm_gated_gemv(x, norm, EPS, stored.values, bias), normed),
    ):
        gate, up = sums.chunk(2, dim=1)
        assert relative_error(out, F.silu(gate) * up) < tolerance


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


@pytest.mark.parametrize("left", rest_is_slow(["layers.0.self_attn"], ["none", "layers.1.", "layers.0.self_attn"]))
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen3ForCausalLM", {}),
    ],
)
def test_a_model_in_fp8_gives_nearly_what_it_gives_with_rows_that_are_not_rounded(
    device, kernels, architecture, fields, left
) -> None:
    from toka_engine.model.cuda.backend import make_fp8_ops, make_linear, make_ops
    from toka_engine.model.kernels.gemv import LaunchConfig

    few = LaunchConfig(32, 64, 4)
    config = parse_model_config(ConfigFields({"architectures": [architecture], **FIELDS, **fields}, Path()))
    kernels = replace(kernels, behind_norm=few, other=few)
    plain = replace(make_ops(0), gemv=kernels, make_head=lambda weight: make_linear(weight, None))
    fp8 = replace(
        make_fp8_ops(0), make_linear=multiply, make_gemv=lambda scale: replace(kernels, scale=scale, has_cvt=ON_GPU)
    )
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
