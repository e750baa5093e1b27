"""Attention of few rows gives what its definition gives, and writes what rope_append writes.

On the GPU in bfloat16; the interpreter's products are of float32 alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from tests.marks import rest_is_slow

PAGE_SIZE = 16
CONTEXTS = [0, 1, 15, 16, 17, 63, 64, 65, 333]


@dataclass(frozen=True, slots=True)
class Case:
    """A step of decode rows over a cache full of earlier tokens; row i has slot rows - 1 - i."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor
    cache: torch.Tensor  # [2, pages, page_size, num_kv_heads, head_dim], perhaps a view of heads first

    def run(self, config):
        """Results and cache afterwards; the case's own cache stays as it is."""
        from toka_engine.model.kernels.decode_attention import Workspace

        heads, kv_heads, head_dim = self.q.shape[1], self.k.shape[1], self.q.shape[2]
        work = Workspace.allocate(heads, kv_heads, head_dim, self.q.device, config)
        return *self.run_in(work), work

    def run_in(self, work, part=None):
        from toka_engine.model.kernels.decode_attention import attend_decode

        cache, out = self.cache.clone(), torch.full_like(self.q, float("nan")).contiguous()
        attend_decode(
            self.q, self.k, self.v, self.cos_sin, self.slots, self.positions, self.table, cache[0], cache[1], out, work,
            self.q.shape[2] ** -0.5, part,
        )  # fmt: skip
        return out, cache

    def expect(self, starts=None):
        """Results in fp64, over the tokens from `starts` on, and cache afterwards: by rope_append and the definition of
        attention. Then the log-sum-exp, base 2, and q rotated."""
        from toka_engine.model.kernels.rope_append import rope_append

        cache, q = self.cache.clone(), torch.empty_like(self.q).contiguous()
        rope_append(
            self.q, self.k, self.v, self.cos_sin, self.slots, self.positions, self.table, cache[0], cache[1], q
        )  # fmt: skip
        out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
        lse = out.new_empty(q.shape[:2])
        starts = [0] * len(q) if starts is None else starts
        for row, (slot, position) in enumerate(zip(self.slots.tolist(), self.positions.tolist(), strict=True)):
            group = q.shape[1] // self.k.shape[1]
            keys, values = (
                part[self.table[slot].long()]
                .flatten(0, 1)[starts[row] : position + 1]
                .double()
                .repeat_interleave(group, dim=1)
                for part in cache
            )
            scores = torch.einsum("hd,nhd->hn", q[row].double(), keys) * q.shape[2] ** -0.5
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
            lse[row] = scores.logsumexp(-1) / math.log(2)
        return out, cache, lse, q


def make_case(generator, contexts, heads=4, kv_heads=2, head_dim=64, is_heads_first=True, num_padding=0) -> Case:
    """`contexts`: the tokens before each row; padding rows at the end share the last slot, of one page."""
    device, rows = generator.device, len(contexts)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    def make_int32s(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    columns = max(contexts) // PAGE_SIZE + 1
    pages = torch.randperm(rows * columns, generator=generator, device=device).int().view(rows, columns)
    table = torch.full((rows + 1, columns + 3), rows * columns, dtype=torch.int32, device=device)
    table[:rows, :columns] = pages
    page = (kv_heads, PAGE_SIZE) if is_heads_first else (PAGE_SIZE, kv_heads)
    cache = draw(2, rows * columns + 1, *page, head_dim).to(dtype)
    packed = draw(rows + num_padding, (heads + 2 * kv_heads) * head_dim).to(dtype)
    q, k, v = packed.view(len(packed), -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    return Case(
        q, k, v, draw(max(contexts) + 1, head_dim),
        make_int32s([*range(rows - 1, -1, -1), *[rows] * num_padding]),
        make_int32s([*contexts, *[0] * num_padding]),
        table[:, : columns + 1],
        cache.transpose(2, 3) if is_heads_first else cache,
    )  # fmt: skip


def assert_equals(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Each head within an error of its own: one that is wrong is not lost among many."""
    errors = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.max()) < (1e-2 if out.dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("splits", "is_heads_first"), rest_is_slow([(2, False)], [(1, True), (2, False), (8, True)]))
def test_any_context_in_any_number_of_splits_gives_the_definition_and_rope_appends_cache(
    generator, splits, is_heads_first
) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig

    case = make_case(generator, CONTEXTS, is_heads_first=is_heads_first)
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=len(CONTEXTS) * 2 * splits)
    assert config.count_splits(len(CONTEXTS), 2) == splits
    expected, expected_cache, *_ = case.expect()
    out, cache, _ = case.run(config)
    assert_equals(out, expected)
    assert torch.equal(cache, expected_cache)  # every bit: nothing beside the new tokens has changed
    assert int((cache != case.cache).any(dim=-1).sum()) == 2 * len(CONTEXTS) * 2


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(2, 2, 64), (8, 2, 64), (5, 1, 64), (14, 2, 64), (7, 1, 128), (20, 1, 128), (4, 1, 256)],
)
def test_any_group_of_query_heads_gives_the_definition(generator, heads, kv_heads, head_dim) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig

    case = make_case(generator, [0, 170], heads, kv_heads, head_dim)
    expected, expected_cache, *_ = case.expect()
    for num_programs in (16, 1):
        out, cache, _ = case.run(replace(LaunchConfig.of(head_dim), num_programs=num_programs))
        assert_equals(out, expected)
        assert torch.equal(cache, expected_cache)


def test_one_row_in_as_many_splits_as_there_can_be_gives_the_definition(generator) -> None:
    from toka_engine.model.kernels.decode_attention import MAX_SPLITS, LaunchConfig

    case = make_case(generator, [16 * MAX_SPLITS], 4, 1, 128)
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=512)
    assert config.count_splits(1, 1) == MAX_SPLITS
    out, cache, _ = case.run(config)
    expected, expected_cache, *_ = case.expect()
    assert_equals(out, expected)
    assert torch.equal(cache, expected_cache)


def test_a_second_launch_in_the_same_workspace_gives_the_same_bits(generator) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig

    case = make_case(generator, [100, 3, 47])
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=24)
    assert (config.count_splits(3, 2), config.count_splits(4, 2)) == (4, 2)
    out, cache, work = case.run(config)
    assert int(work.arrived.count_nonzero()) == 0
    again, cache_again = case.run_in(work)
    assert torch.equal(again, out)
    assert torch.equal(cache_again, cache)
    others = make_case(generator, [33, 0, 71, 90])  # other rows, other splits
    expected, *_ = others.expect()
    assert_equals(others.run_in(work)[0], expected)


def test_the_order_in_which_splits_arrive_changes_no_bit(generator, monkeypatch) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig
    from triton.runtime.interpreter import interpreter_builder

    case = make_case(generator, [170], 16, 1, 128)  # 11 splits, of which 4 are merged at once
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=16)
    out, cache, _ = case.run(config)
    # The interpreter runs one program after the other, here from the last split to the first; a GPU in its own order.
    set_program = interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: set_program(x, y, 15 - z))
    again, cache_again, work = case.run(config)
    assert torch.equal(again, out)
    assert torch.equal(cache_again, cache)
    assert int(work.arrived.count_nonzero()) == 0


def test_padding_rows_write_to_their_page_alone_and_change_no_other_row(generator) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig

    case = make_case(generator, [37, 0, 100], num_padding=5)
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=32)
    out, cache, _ = case.run(config)
    real = replace(case, **{name: getattr(case, name)[:3] for name in ("q", "k", "v", "slots", "positions")})
    expected, expected_cache, *_ = real.expect()
    assert_equals(out[:3], expected)
    assert torch.equal(cache[:, :-1], expected_cache[:, :-1])  # the last page is the padding rows'
    assert torch.equal(cache[:, -1, 1:], case.cache[:, -1, 1:])
    assert_equals(out[3:], case.v[3:].repeat_interleave(2, dim=1).double())  # each sees itself alone


@pytest.mark.parametrize(("rows", "kv_heads", "splits"), [(1, 8, 64), (1, 1, 64), (3, 8, 16), (16, 8, 4), (65, 8, 1)])
def test_rows_are_split_as_far_as_programs_are_allowed(rows, kv_heads, splits) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig

    config = LaunchConfig(block_tokens=64, num_warps=4, num_programs=512)
    assert config.count_splits(rows, kv_heads) == splits
    assert config.count_splits(100_000, kv_heads) == 1


@pytest.mark.parametrize("splits", [1, 4])
def test_the_part_over_a_rows_own_tokens_comes_with_its_log_sum_exp(generator, splits) -> None:
    from toka_engine.model.kernels.decode_attention import LaunchConfig, SuffixPart, Workspace

    starts, contexts = [0, 16, 16, 112, 320, 0], [0, 16, 40, 333, 333, 100]
    case = make_case(generator, contexts, heads=6, kv_heads=2)
    expected, expected_cache, expected_lse, expected_q = case.expect(starts)
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=len(contexts) * 2 * splits)
    work = Workspace.allocate(6, 2, 64, case.q.device, config)
    lse, rotated = torch.full(case.q.shape[:2], math.nan, device=case.q.device), torch.empty_like(case.q).contiguous()
    part = SuffixPart(case.slots.new_tensor(starts), lse, rotated)
    out, cache = case.run_in(work, part)
    assert_equals(out, expected)
    assert torch.equal(cache, expected_cache)
    assert torch.equal(rotated, expected_q)
    torch.testing.assert_close(part.lse.double(), expected_lse, atol=2e-2 if out.is_cuda else 1e-5, rtol=1e-3)


def allocate_for_several_heads(case: Case, most_heads: int, min_programs: int = 1):
    from toka_engine.model.kernels.decode_attention import LaunchConfig, Workspace
    from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig

    rows = ShortLaunchConfig(
        most_heads, most_heads, min_programs, min_programs, block_tokens=16, num_warps=2, most_registers=168
    )
    config = LaunchConfig(block_tokens=16, num_warps=4, num_programs=16, short=rows)
    return Workspace.allocate(*case.q.shape[1:2], *case.k.shape[1:], case.q.device, config)


@pytest.mark.parametrize("is_part", rest_is_slow([True], [False, True]))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "most_heads"),
    [(8, 8, 64, 8), (16, 4, 64, 2), (7, 1, 64, 8), (40, 8, 128, 8), (14, 2, 64, 2), (6, 3, 128, 8)],
)
def test_programs_of_several_kv_heads_give_the_definition_and_rope_appends_cache(
    generator, monkeypatch, heads, kv_heads, head_dim, most_heads, is_part
) -> None:
    from toka_engine.model.kernels import decode_attention

    starts, contexts, padding = [0, 16, 0, 48, 80, 0], [0, 17, 16, 48, 90, 63], 2
    case = make_case(generator, contexts, heads, kv_heads, head_dim, heads != 16, padding)
    names = ("q", "k", "v", "slots", "positions")
    real = replace(case, **{name: getattr(case, name)[: len(contexts)] for name in names})
    expected, expected_cache, expected_lse, expected_q = real.expect(starts if is_part else None)
    lse, rotated = torch.full(case.q.shape[:2], math.nan, device=case.q.device), torch.empty_like(case.q).contiguous()
    part = decode_attention.SuffixPart(case.slots.new_tensor(starts + [0] * padding), lse, rotated)
    work = allocate_for_several_heads(case, most_heads)
    monkeypatch.setattr(decode_attention, "_attend_kernel", None)  # the other one
    out, cache = case.run_in(work, part if is_part else None)
    assert_equals(out[: len(contexts)], expected)
    assert torch.equal(cache[:, :-1], expected_cache[:, :-1])  # the last page is the padding rows'
    assert torch.equal(cache[:, -1, 1:], case.cache[:, -1, 1:])
    assert_equals(out[len(contexts) :], case.v[len(contexts) :].repeat_interleave(heads // kv_heads, dim=1).double())
    if is_part:
        assert torch.equal(rotated[: len(contexts)], expected_q)
        atol = 2e-2 if out.is_cuda else 1e-5
        torch.testing.assert_close(lse[: len(contexts)].double(), expected_lse, atol=atol, rtol=1e-3)


def test_programs_of_several_kv_heads_give_the_same_bits_again(generator) -> None:
    case = make_case(generator, [40, 3, 17], 8, 4)
    work = allocate_for_several_heads(case, 4)
    out, cache = case.run_in(work)
    again, cache_again = case.run_in(work)
    assert torch.equal(again, out)
    assert torch.equal(cache_again, cache)


@pytest.mark.parametrize(
    ("rows", "kv_heads", "is_part", "heads"),
    [
        (1024, 8, True, 8), (1023, 8, True, 4), (256, 8, True, 2), (255, 8, True, 1), (127, 8, True, 0),
        (4096, 32, True, 8), (4096, 9, True, 3), (4096, 5, True, 5), (4096, 1, True, 1),
        (4096, 8, False, 2), (511, 8, False, 1), (255, 8, False, 0),
    ],
)  # fmt: skip
def test_a_program_has_as_many_kv_heads_as_leave_enough_programs(rows, kv_heads, is_part, heads) -> None:
    from toka_engine.model.kernels.decode_attention_short import ShortLaunchConfig

    config = ShortLaunchConfig(
        8, 2, min_programs=1024, min_programs_alone=2048, block_tokens=32, num_warps=2, most_registers=168
    )
    assert config.count_heads(rows, kv_heads, 16, is_part) == heads
    assert config.count_heads(rows, kv_heads, 17, is_part) == 0


def test_rows_that_are_too_few_for_programs_of_several_heads_are_split(generator, monkeypatch) -> None:
    from toka_engine.model.kernels import decode_attention

    case = make_case(generator, [40, 3, 17], 8, 4)
    few = allocate_for_several_heads(case, 4, min_programs=13)
    expected, expected_cache, *_ = case.expect()
    monkeypatch.setattr(decode_attention, "attend_rows_kernel", None)
    out, cache = case.run_in(few)
    assert_equals(out, expected)
    assert torch.equal(cache, expected_cache)
