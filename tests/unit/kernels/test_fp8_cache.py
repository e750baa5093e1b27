"""Kernels over a KV cache of 8-bit floats give what the definition gives for the numbers that it holds.

A new token is read from registers by the step that computes it, unrounded, and as it is stored by later ones.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.marks import rest_is_slow
from tests.unit.kernels.test_decode_attention import (
    CONTEXTS,
    Case,
    allocate_for_several_heads,
    assert_equals,
    make_case,
)

E4M3 = torch.float8_e4m3fn


def in_fp8(case: Case) -> tuple[Case, Case]:
    """The case with a cache of 8-bit floats, and with the same numbers in the model's dtype."""
    stored = case.cache.to(E4M3)
    return replace(case, cache=stored), replace(case, cache=stored.to(case.q.dtype))


def bits_of(cache: torch.Tensor) -> torch.Tensor:
    return cache.contiguous().view(torch.uint8)


def append_by_definition(case: Case) -> torch.Tensor:
    """The cache of 8-bit floats after the step, by torch: the new tokens rounded to the nearest."""
    from toka_engine.model.kernels.rope_append import rope_append

    wide = case.cache.to(case.q.dtype)
    q = torch.empty_like(case.q).contiguous()
    rope_append(case.q, case.k, case.v, case.cos_sin, case.slots, case.positions, case.table, wide[0], wide[1], q)
    return wide.float().clamp(-448, 448).to(E4M3)


def test_appended_keys_and_values_are_the_nearest_8_bit_floats_and_the_largest_beyond_them(generator) -> None:
    from toka_engine.model.kernels.rope_append import rope_append

    case = make_case(generator, [0, 5, 40])
    sizes = torch.logspace(-4, 3.5, case.k.shape[2], device=case.k.device).to(case.k.dtype)
    stored, _ = in_fp8(replace(case, k=case.k * sizes, v=case.v * sizes))
    cache = stored.cache.clone()
    rope_append(
        stored.q, stored.k, stored.v, stored.cos_sin, stored.slots, stored.positions, stored.table, cache[0], cache[1],
        torch.empty_like(stored.q).contiguous(),
    )  # fmt: skip
    assert torch.equal(bits_of(cache), bits_of(append_by_definition(stored)))
    assert float(cache.float().abs().max()) == 448, "no number is NaN, and some are beyond the range"


@pytest.mark.parametrize(("splits", "is_heads_first"), rest_is_slow([(4, True)], [(1, True), (4, True), (4, False)]))
def test_decode_rows_read_the_numbers_that_the_cache_holds(generator, splits, is_heads_first) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig

    stored, wide = in_fp8(make_case(generator, CONTEXTS, is_heads_first=is_heads_first))
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=len(CONTEXTS) * 2 * splits)
    expected, *_ = wide.expect()
    out, cache, work = stored.run(config)
    assert_equals(out, expected)
    assert torch.equal(bits_of(cache), bits_of(append_by_definition(stored)))
    again, cache_again = stored.run_in(work)
    assert torch.equal(again, out)
    assert torch.equal(bits_of(cache_again), bits_of(cache))


@pytest.mark.parametrize("is_part", rest_is_slow([True], [False, True]))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "most_heads"), rest_is_slow([(14, 2, 128, 2)], [(8, 4, 64, 4), (14, 2, 128, 2)])
)
def test_programs_of_several_kv_heads_read_the_numbers_that_the_cache_holds(
    generator, monkeypatch, heads, kv_heads, head_dim, most_heads, is_part
) -> None:
    from toka_engine.model.kernels import decode_attention

    starts, contexts = [0, 16, 0, 48], [0, 17, 16, 63]
    stored, wide = in_fp8(make_case(generator, contexts, heads, kv_heads, head_dim))
    expected, _, expected_lse, expected_q = wide.expect(starts if is_part else None)
    lse, rotated = (
        torch.full(stored.q.shape[:2], math.nan, device=stored.q.device),
        torch.empty_like(stored.q).contiguous(),
    )
    part = decode_attention.SuffixPart(stored.slots.new_tensor(starts), lse, rotated)
    work = allocate_for_several_heads(stored, most_heads)
    monkeypatch.setattr(decode_attention, "_attend_kernel", None)  # the other one
    out, cache = stored.run_in(work, part if is_part else None)
    assert_equals(out, expected)
    assert torch.equal(bits_of(cache), bits_of(append_by_definition(stored)))
    if is_part:
        torch.testing.assert_close(rotated, expected_q)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2e-2 if out.is_cuda else 1e-5, rtol=1e-3)


def test_pages_are_widened_to_the_numbers_that_they_hold(generator) -> None:
    from toka_engine.model.kernels.pages import widen_pages

    device = generator.device
    cache = (torch.randn(2, 9, 3000, generator=generator, device=device) * 50).to(E4M3)
    out = torch.full((2, 6, 3000), math.nan, device=device)
    pages = torch.tensor([8, 0, 3, 3], dtype=torch.int32, device=device)
    widen_pages(cache, pages, out)
    assert torch.equal(out[:, :4], cache.float()[:, pages.long()])
    assert bool(out[:, 4:].isnan().all())
