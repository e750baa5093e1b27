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


def test_norm_and_activation_of_a_row_are_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 576).bfloat16(), torch.randn(576).bfloat16()
    gates = torch.randn(64, 3072).bfloat16()
    for rows in (1, 2, 7, 33):
        part = backend.rms_norm(x[:rows].clone(), weight, 1e-5)
        assert torch.equal(part, backend.rms_norm(x, weight, 1e-5)[:rows])
        assert torch.equal(backend.silu_mul(gates[:rows].clone()), backend.silu_mul(gates)[:rows])
