"""The kernels of linear layers in fp8 give what their definition in float64 gives, with the values that are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toka_engine.model.quantization import quantise_weight

from tests.unit.kernels.test_gemv import draw, kernels, norm_of, relative_error

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

    return lambda scale: replace(kernels, behind_norm=SCALED_BEHIND_NORM, other=SCALED_OTHER, scale=scale)


WIDTHS = [(48, 6), (1024 + 16, 5), (3 * 1024, 9)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("width", "num_out"), WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (BF16, 1e-2)])
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
