"""Attention over shared tokens adds to each row's own part what the definition gives, however the work is cut.

On the GPU in bfloat16; the interpreter's products are of float32 alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Group:
    first_row: int
    num_rows: int
    slot: int
    num_columns: int
    first_column: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """Rows that have attended to their own tokens, over a cache full of earlier ones."""

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    table: torch.Tensor
    cache: torch.Tensor  # [2, pages, page_size, num_kv_heads, head_dim], perhaps a view of heads first

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def make_work(self, num_programs, block_rows=64, block_tokens=64):
        from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace

        config = PrefixLaunchConfig(
            block_rows=block_rows, block_tokens=block_tokens, num_warps=4, num_stages=2, residency=1
        )
        heads, kv_heads, head_dim = self.q.shape[1], self.cache.shape[3], self.q.shape[2]
        return PrefixWorkspace.allocate(heads, kv_heads, head_dim, self.q.device, config, num_programs)

    def run(self, work, *levels, capacity=None):
        """`out` and `lse` after a call for each list of groups."""
        from toka_engine.model.kernels.prefix_attention import attend_prefix

        out, lse = self.out.clone(), self.lse.clone()
        for groups in levels:
            words = torch.from_numpy(lay(work, groups, capacity)).to(out.device)
            attend_prefix(
                self.q, words, self.table, self.cache[0], self.cache[1], out, lse, work, self.scale
            )  # fmt: skip
        return out, lse

    def expect(self, groups):
        """The same in fp64, by the definition of attention; rows without a group as they are."""
        out, lse = self.out.double(), self.lse.double()
        per_kv = self.q.shape[1] // self.cache.shape[3]
        for group in groups:
            rows = slice(group.first_row, group.first_row + group.num_rows)
            pages = self.table[group.slot, group.first_column : group.first_column + group.num_columns].long()
            keys, values = (part[pages].flatten(0, 1).double().repeat_interleave(per_kv, dim=1) for part in self.cache)
            scores = torch.einsum("rhd,nhd->rhn", self.q[rows].double(), keys) * self.scale
            part, part_lse = torch.einsum("rhn,nhd->rhd", scores.softmax(-1), values), scores.logsumexp(-1)
            own_lse = lse[rows] * math.log(2)
            both = torch.logaddexp(part_lse, own_lse)
            weights = (own_lse - both).exp()[..., None], (part_lse - both).exp()[..., None]
            out[rows] = out[rows] * weights[0] + part * weights[1]
            lse[rows] = both / math.log(2)
        return out, lse


def lay(work, groups, capacity=None):
    from toka_engine.model.kernels.prefix_groups import pack_groups

    fields = ("first_row", "num_rows", "slot", "first_column", "num_columns")
    arrays = [np.array([getattr(group, field) for group in groups], np.int32) for field in fields]
    return pack_groups(work, PAGE_SIZE, *arrays, capacity=capacity)


def make_case(
    generator, rows, heads=4, kv_heads=2, head_dim=64, columns=40, is_heads_first=True, dtype=torch.float32
) -> Case:
    """Three slots of `columns` pages each. On a GPU in bfloat16."""
    device = generator.device
    dtype = torch.bfloat16 if device.type == "cuda" else dtype

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    table = torch.randperm(3 * columns, generator=generator, device=device).int().view(3, columns)
    page = (kv_heads, PAGE_SIZE) if is_heads_first else (PAGE_SIZE, kv_heads)
    cache = draw(2, 3 * columns, *page, head_dim).to(dtype)
    return Case(
        draw(rows, heads, head_dim).to(dtype), draw(rows, heads, head_dim).to(dtype), draw(rows, heads) + 5, table,
        cache.transpose(2, 3) if is_heads_first else cache,
    )  # fmt: skip


def assert_equals(found, expected) -> None:
    """Each head within an error of its own: one that is wrong is not lost among many."""
    (out, lse), (expected_out, expected_lse) = found, expected
    is_coarse = out.dtype is torch.bfloat16
    errors = (out.double() - expected_out).norm(dim=-1) / expected_out.norm(dim=-1)
    assert float(errors.max()) < (1e-2 if is_coarse else 1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-2 if is_coarse else 1e-5, rtol=1e-3)


@pytest.mark.parametrize("num_rows", [2, 33, 200])
@pytest.mark.parametrize(("num_columns", "num_programs"), [(1, 5), (5, 3), (40, 7)])
def test_a_group_of_any_size_over_any_prefix_gives_the_definition(
    generator, num_rows, num_columns, num_programs
) -> None:
    case = make_case(generator, num_rows, heads=2 if num_rows > 100 else 4)
    groups = [Group(0, num_rows, 1, num_columns)]
    work = case.make_work(num_programs)
    assert_equals(case.run(work, groups), case.expect(groups))
    assert int(work.arrived.count_nonzero()) == 0


@pytest.mark.parametrize(("is_heads_first", "num_programs"), [(True, 1), (False, 6), (True, 40)])
def test_groups_with_gaps_between_them_give_the_definition_and_other_rows_keep_every_bit(
    generator, is_heads_first, num_programs
) -> None:
    case = make_case(generator, 90, is_heads_first=is_heads_first)
    groups = [Group(3, 2, 2, 40), Group(10, 33, 0, 7, first_column=30), Group(43, 40, 1, 1), Group(85, 3, 0, 40)]
    work = case.make_work(num_programs)
    out, lse = case.run(work, groups, capacity=8)
    assert_equals((out, lse), case.expect(groups))
    is_alone = torch.ones(90, dtype=torch.bool, device=out.device)
    for group in groups:
        is_alone[group.first_row : group.first_row + group.num_rows] = False
    assert int(is_alone.sum()) == 12
    assert torch.equal(out[is_alone], case.out[is_alone])
    assert torch.equal(lse[is_alone], case.lse[is_alone])
    assert int(work.arrived.count_nonzero()) == 0


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(2, 2, 64), (4, 1, 64), (5, 1, 64), (14, 2, 64), (16, 1, 64), (7, 1, 128), (4, 2, 128), (4, 1, 256)],
)
def test_any_number_of_query_heads_to_a_kv_head_gives_the_definition(generator, heads, kv_heads, head_dim) -> None:
    case = make_case(generator, 40, heads, kv_heads, head_dim)
    groups = [Group(1, 20, 0, 5), Group(31, 8, 1, 9)]
    assert_equals(case.run(case.make_work(4), groups), case.expect(groups))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_usual_cut_gives_the_definition(generator, head_dim) -> None:
    from toka_engine.model.kernels.prefix_groups import PrefixWorkspace

    case = make_case(generator, 40, head_dim=head_dim)
    groups = [Group(1, 30, 0, 21), Group(31, 9, 1, 40)]
    work = PrefixWorkspace.allocate(4, 2, head_dim, case.q.device, num_programs=5)
    assert_equals(case.run(work, groups), case.expect(groups))


def test_pages_that_no_group_has_are_not_read(generator) -> None:
    case = make_case(generator, 9)
    groups = [Group(0, 4, 2, 5, first_column=35), Group(5, 3, 0, 6, first_column=2)]
    is_shared = torch.zeros(case.cache.shape[1], dtype=torch.bool, device=case.q.device)
    for group in groups:
        columns = slice(group.first_column, group.first_column + group.num_columns)
        is_shared[case.table[group.slot, columns].long()] = True
    assert int(is_shared.sum()) == 11
    case.cache[:, ~is_shared] = float("nan")  # 0 times this were this
    assert_equals(case.run(case.make_work(5), groups), case.expect(groups))


def test_groups_within_a_group_are_a_call_behind_it(generator) -> None:
    case = make_case(generator, 70)
    levels = [Group(0, 64, 0, 21)], [Group(2, 30, 0, 19, first_column=21), Group(32, 20, 1, 10, first_column=21)]
    work = case.make_work(9)
    assert_equals(case.run(work, *levels), case.expect([*levels[0], *levels[1]]))


def test_one_tile_in_many_programs_gives_the_definition_and_the_same_bits_in_any_order_of_arrival(
    generator, monkeypatch
) -> None:
    case = make_case(generator, 5, heads=2, kv_heads=1)
    groups = [Group(0, 5, 0, 40)]
    work = case.make_work(5, block_tokens=16)
    assert lay(work, groups)[:3].tolist() == [1, 40, 8]  # one tile of 40 blocks, 8 of them to a program
    found = case.run(work, groups)
    assert_equals(found, case.expect(groups))
    assert int(work.arrived.count_nonzero()) == 0
    again = case.run(work, groups)
    assert all(map(torch.equal, again, found))
    if not case.q.is_cuda:  # the interpreter runs one program after the other; a GPU in its own order
        from triton.runtime.interpreter import interpreter_builder

        set_program = interpreter_builder.set_grid_idx
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: set_program(4 - x, y, z))
        again = case.run(work, groups)
        assert all(map(torch.equal, again, found))
        assert int(work.arrived.count_nonzero()) == 0


def test_a_workspace_serves_launches_of_other_groups_one_after_the_other(generator) -> None:
    case = make_case(generator, 100)
    work = case.make_work(11)
    for groups in ([Group(0, 40, 0, 40)], [Group(7, 3, 1, 3)], [Group(0, 50, 1, 13), Group(50, 50, 2, 8)]):
        first = case.run(work, groups, capacity=4)
        assert_equals(first, case.expect(groups))
        again = case.run(work, groups, capacity=4)
        assert all(map(torch.equal, again, first))


def test_no_groups_change_nothing(generator) -> None:
    case = make_case(generator, 10)
    out, lse = case.run(case.make_work(3), [], capacity=16)
    assert torch.equal(out, case.out)
    assert torch.equal(lse, case.lse)


def test_more_groups_than_are_searched_at_once_give_the_definition(generator, monkeypatch) -> None:
    from toka_engine.model.kernels import prefix_attention

    monkeypatch.setattr(prefix_attention, "_SEARCHED_AT_ONCE", 8)
    case = make_case(generator, 20, heads=1, kv_heads=1)
    groups = [Group(row, 1, row % 3, 1 + row % 2) for row in range(20)]
    assert_equals(case.run(case.make_work(4), groups), case.expect(groups))


@pytest.mark.parametrize(
    ("rows", "columns", "num_programs", "total", "share"),
    [
        (256, 64, 66, 64 * 64, 64),  # 64 tiles of 64 blocks: a tile each, though 63 were equal
        (256, 64, 136, 64 * 64, 32),  # halves of tiles, though 31 were equal
        (256, 64, 100, 64 * 64, 41),  # an equal share, whatever it cuts
        (256, 64, 10, 64 * 64, 410),
        (2, 64, 100, 8 * 64, 6),  # not so few that merging takes longer
        (2, 1, 100, 8, 4),
    ],
)
def test_programs_have_equal_shares_or_a_little_more_if_then_tiles_are_not_cut(
    rows, columns, num_programs, total, share
) -> None:
    from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace

    config = PrefixLaunchConfig(block_rows=128, block_tokens=16, num_warps=4, num_stages=2, residency=1)
    work = PrefixWorkspace.allocate(32, 8, 64, torch.device("cpu"), config, num_programs)
    assert lay(work, [Group(0, rows, 0, columns)])[:3].tolist() == [1, total, share]
    assert share * num_programs >= total


def test_groups_beyond_the_capacity_are_refused() -> None:
    from toka_engine.model.kernels.prefix_groups import PrefixWorkspace

    work = PrefixWorkspace.allocate(4, 2, 64, torch.device("cpu"), num_programs=1)
    with pytest.raises(ValueError, match="first_rows: 3 groups, but capacity=2"):
        lay(work, [Group(row, 1, 0, 1) for row in range(3)], capacity=2)
