"""Groups of decode rows that share a prefix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toka_engine.config import EngineConfig
from toka_engine.manager import hydragen
from toka_engine.manager.hydragen import DecodeRows, GroupPolicy, Groups, find_groups
from toka_engine.manager.sharing import count_shared_columns, recount_shared_columns
from toka_engine.manager.slots import Slots, State
from toka_engine.messages import Int32s, Step

from tests.unit.manager.simulated import Harness, small_sizes

POLICY = GroupPolicy(page_size=16, min_rows=4, min_columns=8)


def tables(families: list[tuple[list[int], int]], num_columns: int = 64) -> tuple[Int32s, Int32s]:
    """families: (shared pages, number of rows). Return (table, shared columns by row), rows interleaved."""
    rows = [pages for pages, count in families for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(rows))
    table = np.full((len(rows), num_columns), -1, np.int32)
    shared = np.zeros(len(rows), np.int32)
    for row, source in enumerate(order.tolist()):
        table[row, : len(rows[source])] = rows[source]
        table[row, len(rows[source])] = 100_000 + row
        shared[row] = len(rows[source])
    return table, shared


def described(groups: Groups) -> list[tuple[int, int, int]]:
    return list(zip(groups.num_rows.tolist(), groups.first_columns.tolist(), groups.num_columns.tolist(), strict=True))


def find(families: list[tuple[list[int], int]]) -> tuple[Int32s, Int32s, Groups]:
    table, shared = tables(families)
    order, groups = find_groups(table, np.arange(len(table), dtype=np.int32), shared, POLICY)
    assert sorted(order.tolist()) == list(range(len(table)))
    for first, count, column, width in zip(
        groups.first_rows, groups.num_rows, groups.first_columns, groups.num_columns, strict=True
    ):
        part = table[order[first : first + count], : column + width]
        assert (part == part[0]).all()
    return table, order, groups


def test_choices_of_long_prompts_become_one_group_each() -> None:
    _, _, groups = find([(list(range(48)), 32), (list(range(100, 148)), 16)])
    assert sorted(described(groups)) == [(16, 0, 48), (32, 0, 48)]


def test_a_long_common_start_of_different_prompts_is_a_level_of_its_own() -> None:
    system = list(range(30))
    _, _, groups = find([([*system, *range(100, 120)], 32), ([*system, *range(200, 220)], 32)])
    # Two groups would read the common start twice only: not worth a merge of 64 rows. Nor is it read by 64
    # rows.
    assert sorted(described(groups)) == [(32, 0, 50), (32, 0, 50)]
    many = [([*system, *range(first, first + 20)], 8) for first in range(1000, 1800, 50)]
    _, _, groups = find(many)
    assert described(groups)[0] == (128, 0, 30)
    assert described(groups)[1:] == [(8, 30, 20)] * 16


def test_small_groups_and_short_prefixes_are_left_alone() -> None:
    _, _, groups = find([(list(range(48)), 3), (list(range(100, 104)), 30), (list(range(200, 208)), 4)])
    assert described(groups) == []


def test_rows_that_end_leave_their_group_without_a_new_search(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    search = hydragen.find_groups

    def counted(*arguments: object) -> tuple[Int32s, Groups]:
        calls.append(1)
        return search(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hydragen, "find_groups", counted)
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64))
    streams = harness.submit(list(range(20)), n=6, max_tokens=60, seed=1)
    for _ in range(20):
        harness.plan()
        harness.return_one()
    assert len(calls) == 1
    harness.cancel(streams[1])
    harness.plan()
    assert len(calls) == 1
    assert harness.sent[-1].group_num_rows.tolist() == [5]
    harness.run()
    harness.check_results()


def test_groups_change_no_token() -> None:
    outputs = []
    for use_hydragen in (True, False):
        config = EngineConfig(use_hydragen=use_hydragen, hydragen_min_group_size=2, hydragen_min_prefix_len=4)
        harness = Harness(small_sizes(num_pages=200), config=config)
        for _ in range(3):
            harness.submit(list(range(30)), n=4, max_tokens=12, seed=9, stop_ids=(3, 4))
        harness.run()
        harness.check_results()
        assert (harness.worker.num_shared_rows > 0) == use_hydragen
        outputs.append([result.tokens for result in harness.results.values()])
    assert outputs[0] == outputs[1]


def test_rows_that_come_late_join_once_what_they_miss_outweighs_the_search() -> None:
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64))
    rows = harness.manager.state.rows
    prompt = list(range(20))
    harness.submit(prompt, n=3, max_tokens=60, seed=1)
    harness.plan()
    harness.return_one()
    harness.plan()
    assert harness.sent[-1].group_num_rows.tolist() == [3]
    # 2 late rows miss 16 shared tokens each in every step: the third step goes over 90.
    rows.policy = replace(rows.policy, regroup_cost=90)
    harness.submit([*prompt, 1], n=2, max_tokens=60, seed=2)
    sizes = []
    while len(sizes) < 8:
        harness.return_one()
        harness.plan()
        step = harness.sent[-1]
        if step.decode_slots.size == 5:
            sizes.append(int(step.group_num_rows[step.group_first_columns == 0].sum()))
    assert sizes == [3, 3, 5, 5, 5, 5, 5, 5]
    harness.run()
    harness.check_results()


def test_a_group_that_became_too_small_is_dissolved_without_a_search() -> None:
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64))
    rows = harness.manager.state.rows
    streams = harness.submit(list(range(20)), n=3, max_tokens=60, seed=1)
    for _ in range(4):
        harness.plan()
        harness.return_one()
    rows.policy = replace(rows.policy, regroup_cost=1 << 40)
    harness.cancel(*streams[1:])
    harness.plan()
    assert harness.sent[-1].decode_slots.size == 1
    assert harness.sent[-1].group_num_rows.size == 0
    harness.run()
    harness.check_results()


@pytest.mark.parametrize("num_rows", [1, 40, 400])  # few pages are looked at one by one, many by bisection
def test_shared_columns_are_the_leading_pages_with_several_holders(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    table = rng.permutation(num_rows * 60).astype(np.int32).reshape(num_rows, 60)
    num_columns = rng.integers(0, 61, num_rows).astype(np.int32)
    expected = np.minimum(rng.integers(0, 61, num_rows), num_columns)
    refs = np.ones(table.size, np.int32)
    for row, count in enumerate(expected.tolist()):
        refs[table[row, :count]] = 2
    rows = rng.permutation(num_rows).astype(np.int32)
    found = count_shared_columns(table, rows, num_columns[rows], refs)
    assert found.tolist() == expected[rows].tolist()
    for guesses in (expected, rng.integers(0, 70, num_rows), np.where(rng.random(num_rows) < 0.5, expected, 60)):
        found = recount_shared_columns(table, rows, num_columns[rows], refs, guesses[rows].astype(np.int32))
        assert found.tolist() == expected[rows].tolist()
