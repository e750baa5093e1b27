"""A row's bits do not depend on the rows beside it: what seeded requests on a CPU rest on."""

from __future__ import annotations

import pytest
import torch
from toka_engine.model.cpu import backend

SHAPES = [(576, 960), (576, 3072), (1536, 576), (1024, 64), (1040, 64), (4096, 64)]


@pytest.mark.parametrize(("width", "out_width"), SHAPES)
def test_a_row_of_a_bfloat16_product_is_the_same_in_any_batch(width: int, out_width: int) -> None:
    torch.manual_seed(0)
    linear = backend.make_linear((torch.randn(out_width, width) * 0.05).bfloat16(), None)
    x = torch.randn(256, width).bfloat16()
    full = linear(x)
    for rows in (1, 2, 3, 8, 31, 128):
        parts = [linear(x[begin : begin + rows].clone()) for begin in range(0, 256, rows)]
        assert torch.equal(torch.cat(parts), full), f"{rows} rows at once"


def test_a_bfloat16_layer_on_a_cpu_without_it_rounds_what_float32_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "can_pack_bfloat16", lambda: False)
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape).bfloat16() for shape in ((64, 96), (64,), (5, 96)))
    output = backend.make_linear(weight, bias)(x)
    assert output.dtype == torch.bfloat16
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(output.double(), exact, rtol=2**-8, atol=1e-3)


def test_norm_and_activation_of_a_row_are_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 576).bfloat16(), torch.randn(576).bfloat16()
    gates = torch.randn(64, 3072).bfloat16()
    for rows in (1, 2, 7, 33):
        part = backend.rms_norm(x[:rows].clone(), weight, 1e-5)
        assert torch.equal(part, backend.rms_norm(x, weight, 1e-5)[:rows])
        assert torch.equal(backend.silu_mul(gates[:rows].clone()), backend.silu_mul(gates)[:rows])
