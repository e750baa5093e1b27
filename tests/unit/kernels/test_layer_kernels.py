"""The fused kernels of a layer give what plain torch gives."""

from __future__ import annotations

import pytest
import torch

BF16 = torch.bfloat16
DTYPES = [(torch.float32, 1e-6), (BF16, 1e-2)]
"""The relative error allowed, by dtype; the interpreter truncates to bf16 where a GPU rounds."""


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def reference_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("width", [96, 576])
def test_rms_norm_equals_torch(device, generator, dtype, tolerance, width) -> None:
    from toka_engine.model.kernels.norm import rms_norm

    x = torch.randn(5, width + 32, generator=generator, device=device).to(dtype)[:, :width]
    weight = torch.randn(width, generator=generator, device=device).to(dtype)
    assert relative_error(rms_norm(x, weight, 1e-5), reference_norm(x, weight, 1e-5)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_add_rms_norm_keeps_the_sum_and_norms_it(device, generator, dtype, tolerance) -> None:
    from toka_engine.model.kernels.norm import add_rms_norm

    x, residual = torch.randn(2, 7, 320, generator=generator, device=device).to(dtype)
    weight = torch.randn(320, generator=generator, device=device).to(dtype)
    total = residual.double() + x.double()
    out = add_rms_norm(x, residual, weight, 1e-6)
    assert relative_error(residual, total) < tolerance
    assert relative_error(out, reference_norm(residual, weight, 1e-6)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_silu_mul_equals_torch(device, generator, dtype, tolerance) -> None:
    from toka_engine.model.kernels.activation import silu_mul

    gate_up = torch.randn(6, 2 * 2500, generator=generator, device=device).to(dtype) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert relative_error(silu_mul(gate_up), torch.nn.functional.silu(gate) * up) < tolerance


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = (part[:, None, :] for part in cos_sin.double().chunk(2, dim=-1))
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.parametrize("is_heads_first", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (9, 3, 64), (7, 1, 16)])
def test_rope_append_rotates_q_and_fills_the_right_page(
    device, generator, is_heads_first, num_heads, num_kv_heads, head_dim
) -> None:
    from toka_engine.model.kernels.rope_append import rope_append

    rows, page_size, num_pages = 6, 4, 12
    packed = torch.randn(rows, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator, device=device)
    q, k, v = packed.view(rows, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos_sin = torch.randn(16, head_dim, generator=generator, device=device)
    slots = torch.tensor([2, 0, 1, 1, 1, 3], dtype=torch.int32, device=device)
    positions = torch.tensor([0, 9, 3, 4, 5, 15], dtype=torch.int32, device=device)
    table = torch.randperm(num_pages * 4, generator=generator, device=device)[:16].view(4, 4).int()
    table = table % num_pages
    table[1, 0], table[1, 1], table[0, 2], table[2, 0], table[3, 3] = 5, 7, 1, 9, 11
    shape = (2, num_pages, num_kv_heads, page_size, head_dim)
    if not is_heads_first:
        shape = (2, num_pages, page_size, num_kv_heads, head_dim)
    cache = torch.full(shape, float("nan"), device=device)
    k_cache, v_cache = cache.transpose(2, 3) if is_heads_first else cache
    out = torch.full((rows, num_heads, head_dim), float("nan"), device=device)
    rope_append(q, k, v, cos_sin, slots, positions, table, k_cache, v_cache, out)

    angles = cos_sin[positions.long()]
    assert relative_error(out, rotate(q, angles)) < 1e-6
    pages = table[slots.long(), positions.long() // page_size].long()
    offsets = positions.long() % page_size
    assert relative_error(k_cache[pages, offsets], rotate(k, angles)) < 1e-6
    assert torch.equal(v_cache[pages, offsets], v)
    assert int((~cache.isnan()).sum()) == 2 * rows * num_kv_heads * head_dim  # nothing else was written
