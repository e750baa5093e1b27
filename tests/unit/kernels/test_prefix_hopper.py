"""The kernel for Hopper adds to each row's own part what the definition gives, however the work is cut.

On a GPU of that kind; elsewhere its own code runs on the CPU (`gluon_simulator`), copies and products as late as they
may come, in bfloat16 too, as its products are of nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.marks import rest_is_slow
from tests.unit.kernels.gluon_simulator import Simulated
from tests.unit.kernels.test_prefix_attention import Case, Group, assert_equals, lay, make_case


@pytest.fixture(autouse=True)
def kernel(generator, monkeypatch) -> None:
    from toka_engine.model.kernels import prefix_hopper

    if generator.device.type != "cuda":
        monkeypatch.setattr(prefix_hopper, "_hopper_kernel", Simulated(prefix_hopper._hopper_kernel))
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.fail("this GPU is no Hopper")


def make_work(case: Case, num_programs: int, **changes: Any) -> Any:
    from toka_engine.model.kernels.prefix_groups import PrefixLaunchConfig, PrefixWorkspace

    heads, kv_heads, head_dim = case.q.shape[1], case.cache.shape[3], case.q.shape[2]
    config = replace(PrefixLaunchConfig.for_hopper(head_dim), **changes)
    return PrefixWorkspace.allocate(heads, kv_heads, head_dim, case.q.device, config, num_programs)


def make(generator, rows: int, heads: int = 4, kv_heads: int = 1, head_dim: int = 64, columns: int = 40) -> Case:
    return make_case(generator, rows, heads, kv_heads, head_dim, columns, dtype=torch.bfloat16)


def check(
    case: Case, work: Any, *levels: list[Group], capacity: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    found = case.run(work, *levels, capacity=capacity)
    assert_equals(found, case.expect([group for groups in levels for group in groups]))
    assert int(work.arrived.count_nonzero()) == 0
    return found


@pytest.mark.parametrize(
    ("head_dim", "page_size", "is_heads_first", "capability", "is_chosen"),
    [
        (64, 16, True, 90, True),
        (128, 8, True, 90, True),
        (128, 64, True, 90, True),
        (64, 16, True, 80, False),
        (64, 16, True, 100, False),
        (64, 16, False, 90, False),
        (64, 1, True, 90, False),  # a copy's rows are as many as the swizzle's, at least
        (128, 128, True, 90, False),  # a page is part of one block
        (256, 16, True, 90, False),
    ],
)
def test_it_is_chosen_where_its_copies_fit(
    monkeypatch, head_dim, page_size, is_heads_first, capability, is_chosen
) -> None:
    from toka_engine.model.kernels import prefix_groups

    monkeypatch.setattr(prefix_groups, "find_capability", lambda: capability)
    config = prefix_groups.PrefixLaunchConfig.choose(head_dim, page_size, is_heads_first)
    assert bool(config.num_warpgroups) == is_chosen
    if not is_chosen:
        assert config == prefix_groups.PrefixLaunchConfig.of(head_dim)


@pytest.mark.parametrize("head_dim", rest_is_slow([128], [64, 128]))
@pytest.mark.parametrize("num_rows", [2, 20, 48, 97])
@pytest.mark.parametrize(("num_columns", "num_programs"), [(1, 2), (8, 1), (37, 3), (40, 5)])
def test_a_group_of_any_size_over_any_prefix_gives_the_definition(
    generator, head_dim, num_rows, num_columns, num_programs
) -> None:
    case = make(generator, num_rows, head_dim=head_dim)
    check(case, make_work(case, num_programs), [Group(0, num_rows, 1, num_columns)])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_programs", [1, 4, 9])
def test_groups_with_gaps_give_the_definition_and_other_rows_keep_every_bit(generator, head_dim, num_programs) -> None:
    case = make(generator, 90, kv_heads=2, head_dim=head_dim)
    groups = [Group(3, 2, 2, 40), Group(10, 33, 0, 7, first_column=30), Group(43, 40, 1, 1), Group(85, 3, 0, 40)]
    out, lse = check(case, make_work(case, num_programs), groups, capacity=8)
    is_alone = torch.ones(90, dtype=torch.bool, device=out.device)
    for group in groups:
        is_alone[group.first_row : group.first_row + group.num_rows] = False
    assert torch.equal(out[is_alone], case.out[is_alone])
    assert torch.equal(lse[is_alone], case.lse[is_alone])


@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [(64, {"block_tokens": 64}), (64, {"num_stages": 3}), (128, {"num_stages": 2}), (64, {"tile_cost": 0})],
)
def test_other_cuts_give_the_definition(generator, head_dim, changes) -> None:
    case = make(generator, 130, head_dim=head_dim)
    groups = [Group(0, 101, 1, 39), Group(101, 3, 0, 24), Group(105, 20, 2, 8)]
    check(case, make_work(case, 3, **changes), groups)


@pytest.mark.parametrize("num_programs", rest_is_slow([1, 4, 11], range(1, 12)))
def test_shares_that_begin_and_end_in_what_else_a_tile_costs_give_the_definition(generator, num_programs) -> None:
    case = make(generator, 130)
    groups = [Group(0, 101, 1, 39), Group(101, 3, 0, 24), Group(105, 20, 2, 8)]
    check(case, make_work(case, num_programs, tile_cost=5), groups)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (5, 1, 64), (14, 2, 64), (7, 1, 128)])
def test_any_number_of_query_heads_to_a_kv_head_gives_the_definition(generator, heads, kv_heads, head_dim) -> None:
    case = make(generator, 40, heads, kv_heads, head_dim)
    check(case, make_work(case, 4), [Group(1, 20, 0, 5), Group(31, 8, 1, 9)])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_that_no_group_has_are_not_read(generator, head_dim) -> None:
    case = make(generator, 9, head_dim=head_dim)
    groups = [Group(0, 4, 2, 5, first_column=35), Group(5, 3, 0, 6, first_column=2)]
    is_shared = torch.zeros(case.cache.shape[1], dtype=torch.bool, device=case.q.device)
    for group in groups:
        is_shared[case.table[group.slot, group.first_column : group.first_column + group.num_columns].long()] = True
    case.cache[:, ~is_shared] = float("nan")  # 0 times this were this
    check(case, make_work(case, 3), groups)


def test_groups_within_a_group_are_a_call_behind_it(generator) -> None:
    case = make(generator, 70)
    levels = [Group(0, 64, 0, 21)], [Group(2, 30, 0, 19, first_column=21), Group(32, 20, 1, 10, first_column=21)]
    check(case, make_work(case, 5), *levels)


def test_one_tile_in_many_programs_gives_the_same_bits_in_any_order_of_arrival(generator) -> None:
    case = make(generator, 40, columns=160)
    groups = [Group(0, 40, 0, 157)]
    work = make_work(case, 5)
    first = check(case, work, groups)
    for _ in range(3):
        assert all(map(torch.equal, case.run(work, groups), first))


def test_a_workspace_serves_launches_of_other_groups_one_after_the_other(generator) -> None:
    case = make(generator, 100)
    work = make_work(case, 6)
    for groups in ([Group(0, 40, 0, 40)], [Group(7, 3, 1, 3)], [Group(0, 50, 1, 13), Group(50, 50, 2, 8)]):
        check(case, work, groups, capacity=4)


def test_no_groups_change_nothing(generator) -> None:
    case = make(generator, 10)
    out, lse = case.run(make_work(case, 2), [], capacity=16)
    assert torch.equal(out, case.out)
    assert torch.equal(lse, case.lse)


@pytest.mark.slow
def test_more_groups_than_are_searched_at_once_give_the_definition(generator, monkeypatch) -> None:
    from toka_engine.model.kernels import prefix_hopper

    monkeypatch.setattr(prefix_hopper, "_SEARCHED_AT_ONCE", 128)
    case = make(generator, 140, heads=1)
    check(case, make_work(case, 4), [Group(row, 1, row % 3, 1 + row % 2) for row in range(140)])


def test_only_this_kernel_counts_what_else_a_tile_costs(generator) -> None:
    with pytest.raises(ValueError, match="tile_cost: 1, but"):
        make_work(make(generator, 2), 1, num_warpgroups=0)


def test_a_program_that_begins_more_tiles_gets_fewer_blocks(generator) -> None:
    case = make(generator, 1024, heads=32, kv_heads=8)  # 22 tiles of 192 pairs to a KV head
    group = Group(0, 1024, 0, 40)  # 640 tokens: 5 blocks
    assert lay(make_work(case, 132, tile_cost=0), [group])[1:3].tolist() == [22 * 8 * 5, 7]
    assert lay(make_work(case, 132, tile_cost=1), [group])[1:3].tolist() == [22 * 8 * 6, 8]
