"""Groups of decode rows that share a prefix."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toka_engine.config import EngineConfig
from toka_engine.manager import row_groups
from toka_engine.manager.row_groups import DecodeRows, GroupPolicy, Groups, find_groups
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


def described_step(step: Step) -> list[tuple[int, int, int]]:
    groups = Groups(step.group_first_rows, step.group_num_rows, step.group_first_columns, step.group_num_columns)
    return described(groups)


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
    search = row_groups.find_groups

    def counted(*arguments: object) -> tuple[Int32s, Groups]:
        calls.append(1)
        return search(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(row_groups, "find_groups", counted)
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


def test_rows_that_come_late_join_the_groups_whose_pages_they_hold_without_a_search() -> None:
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64))
    rows = harness.manager.state.rows
    prompt = list(range(20))
    harness.submit(prompt, n=3, max_tokens=60, seed=1)
    harness.plan()
    harness.return_one()
    harness.plan()
    assert harness.sent[-1].group_num_rows.tolist() == [3]
    rows.policy = replace(rows.policy, regroup_cost=1 << 40)
    harness.submit([*prompt, 1], n=2, max_tokens=60, seed=2)
    while harness.sent[-1].decode_slots.size < 5:
        harness.return_one()
        harness.plan()
    assert harness.sent[-1].group_num_rows.tolist() == [5]
    harness.run()
    harness.check_results()


def test_what_late_rows_share_beyond_their_groups_is_searched_for_once_it_outweighs_the_search() -> None:
    harness = Harness(small_sizes(num_pages=200, max_pages_per_seq=64))
    rows = harness.manager.state.rows
    prompt = list(range(20))
    harness.submit(prompt, n=3, max_tokens=60, seed=1)
    harness.plan()
    harness.return_one()
    harness.plan()
    # 2 late rows share 7 pages and join a group of 5: they miss 8 tokens each in every step, so the third goes
    # over 40.
    rows.policy = replace(rows.policy, regroup_cost=40)
    harness.submit([*prompt, *range(8)], n=2, max_tokens=60, seed=2)
    found = []
    while len(found) < 5:
        harness.return_one()
        harness.plan()
        step = harness.sent[-1]
        if step.decode_slots.size == 5:
            found.append(described_step(step))
    assert found == [[(5, 0, 5)]] * 2 + [[(5, 0, 5), (2, 5, 2)]] * 3
    harness.run()
    harness.check_results()


class Family:
    """Rows as paths through a tree of pages, in a block table that find_groups and DecodeRows read."""

    def __init__(self) -> None:
        self.slots = Slots(64, 20)
        self.refs = np.zeros(2000, np.int32)
        self.pages: dict[tuple[int, ...], int] = {}
        self.rows = DecodeRows(EngineConfig(), 16)
        self.rows.policy = GroupPolicy(16, 2, 2, row_cost=0, group_cost=0, regroup_cost=0, regroup_row_cost=0)

    def add(self, paths: list[list[int]]) -> None:
        added = []
        for path in paths:
            slot = self.slots.take()
            for column in range(len(path)):
                page = self.pages.setdefault(tuple(path[: column + 1]), len(self.pages))
                self.slots.table[slot, column] = page
                self.refs[page] += 1
            self.slots.num_pages[slot] = len(path)
            self.slots.table[slot, len(path)] = 0  # left behind by an earlier owner
            self.slots.lengths[slot] = 16 * len(path)
            self.slots.states[slot] = State.DECODE
            added.append(slot)
        self.rows.add(np.asarray(added, np.int32), self.slots, self.refs)

    def end(self, places: set[int]) -> None:
        ended = np.asarray([slot for at, slot in enumerate(self.rows.slots.tolist()) if at in places], np.int32)
        for slot in ended.tolist():
            self.refs[self.slots.table[slot, : self.slots.num_pages[slot]]] -= 1
        self.slots.give_back(ended)
        self.rows.is_stale = True

    def check(self) -> None:
        """Each group has exactly the rows that hold its pages, side by side; inner ones begin where outer ones
        end."""
        groups, order = self.rows.groups, self.rows.slots.tolist()
        decoding = np.flatnonzero(self.slots.states == State.DECODE).tolist()
        assert sorted(order) == decoding
        described = list(zip(groups.first_rows, groups.num_rows, groups.first_columns, groups.num_columns, strict=True))
        assert described == sorted(described, key=lambda group: (group[2], group[0]))
        covered = dict.fromkeys(order, 0)
        for first, count, column, width in described:
            end = column + width
            members = order[first : first + count]
            assert len(members) == count
            pages = self.slots.table[members[0], :end]
            for slot in members:
                assert covered[slot] == column
                covered[slot] = end
            holders = [
                slot
                for slot in order
                if self.slots.num_pages[slot] >= end and (self.slots.table[slot, :end] == pages).all()
            ]
            assert sorted(holders) == sorted(members)


twos = st.lists(st.sampled_from([(0, 0), (1, 1), (2, 2)]), max_size=3)
path = st.builds(lambda parts, last: [*itertools.chain(*parts), last], twos, st.integers(0, 9))
paths = st.lists(path, min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(paths, st.lists(st.tuples(paths, st.sets(st.integers(0, 30), max_size=4), st.booleans()), max_size=6))
def test_whoever_comes_and_goes_each_group_has_the_rows_that_hold_its_pages(
    first: list[list[int]], later: list[tuple[list[list[int]], set[int], bool]]
) -> None:
    family = Family()
    family.add([*first, *first])
    family.rows.refresh(family.slots, family.refs)
    family.check()
    for added, ended, may_search in later:
        cost = 0 if may_search else 1 << 40
        family.rows.policy = replace(family.rows.policy, regroup_cost=cost)
        family.add(added)
        family.check()
        family.end(ended)
        family.rows.refresh(family.slots, family.refs)
        family.check()


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
