"""The decode rows of a step in order, and the groups of them that share a prefix (Hydragen).

Rows keep their order from step to step. One that comes late joins the groups whose pages it holds; where it shares
more than they do, it reads that alone. Groups are recomputed when the reads that late rows and dissolved groups have
missed since the last time outweigh the search, so that the search never costs more than what waiting did. A group is
used where the KV reads that it saves outweigh what it costs; groups nest where that pays too. Pure.

Source: Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toka_engine.config import EngineConfig
from toka_engine.manager.arrays import find_run_starts
from toka_engine.manager.sharing import count_common_columns, count_shared_columns
from toka_engine.manager.slots import Slots, State
from toka_engine.messages import Int32s

ROW_COST_TOKENS = 48
"""Cost of merging one row's partial attention, in tokens of KV read for one row (measured on an H100: 0.038
ms against 0.44 ms for 512 tokens, both for 1,024 rows)."""
GROUP_COST_TOKENS = 256
"""Cost of one more group, in the same unit."""

REGROUP_COST_TOKENS = 8_000
"""Cost of a search for groups, in the same unit (a GPU reads some 90,000 tokens of KV, in all layers, in 1 ms), and"""
REGROUP_ROW_COST_TOKENS = 30
"""its part for each decode row (about 1.5 ms of one CPU core for 4,096 rows)."""

_NONE: Int32s = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Groups:
    """Hydragen groups in the form of the group_* fields of messages.Step."""

    first_rows: Int32s
    num_rows: Int32s
    first_columns: Int32s
    num_columns: Int32s

    def keep(self, is_kept: NDArray[np.bool_]) -> Groups:
        """Return the groups over the rows that remain when only `is_kept` rows stay."""
        if self.first_rows.size == 0:
            return self
        before = np.concatenate((np.zeros(1, np.int32), np.cumsum(is_kept, dtype=np.int32)))
        first_rows = before[self.first_rows]
        num_rows = before[self.first_rows + self.num_rows] - first_rows
        return Groups(first_rows, num_rows, self.first_columns, self.num_columns).select(num_rows > 0)

    def select(self, is_wanted: NDArray[np.bool_]) -> Groups:
        return Groups(
            self.first_rows[is_wanted],
            self.num_rows[is_wanted],
            self.first_columns[is_wanted],
            self.num_columns[is_wanted],
        )


NO_GROUPS = Groups(_NONE, _NONE, _NONE, _NONE)


@dataclass(slots=True)
class Node:
    """Sets of rows that share the columns [first_column, end_column); `children` are disjoint parts that
    share more."""

    sets: list[int]
    num_rows: int
    first_column: int
    end_column: int
    children: list[Node]
    is_used: bool = False


@dataclass(frozen=True, slots=True)
class GroupPolicy:
    """A group is used by these: lower bounds of the settings, and the cost model's figures in tokens of KV
    read."""

    page_size: int
    min_rows: int
    min_columns: int
    row_cost: int = ROW_COST_TOKENS
    group_cost: int = GROUP_COST_TOKENS
    regroup_cost: int = REGROUP_COST_TOKENS
    regroup_row_cost: int = REGROUP_ROW_COST_TOKENS

    def pays(self, num_rows: int, num_columns: int, num_readers: int) -> bool:
        """Return whether reading `num_columns` pages once for `num_rows` rows beats `num_readers` separate reads."""
        saved = num_columns * self.page_size * (num_readers - 1)
        return saved > self.row_cost * num_rows + self.group_cost

    def pays_to_regroup(self, num_missed_tokens: int, num_rows: int) -> bool:
        """Return whether reads of `num_missed_tokens` that groups would have saved outweigh a search over
        `num_rows`."""
        return num_missed_tokens > self.regroup_cost + self.regroup_row_cost * num_rows


class DecodeRows:
    """Owns the order of decode rows and their groups."""

    def __init__(self, config: EngineConfig, page_size: int) -> None:
        self._is_enabled = config.use_hydragen
        self.policy = GroupPolicy(
            page_size=page_size,
            min_rows=max(2, config.hydragen_min_group_size),
            min_columns=max(1, -(-config.hydragen_min_prefix_len // page_size)),
        )
        self.slots: Int32s = _NONE
        self.groups = NO_GROUPS
        self.is_stale = False
        """Some rows' streams no longer decode."""
        self.is_short = False
        """Some rows had to sit out the last step for want of pages."""
        self._missed_per_step = 0
        """Tokens of KV read in each step because rows that came or lost their group since the last search have
        none for them."""
        self._num_missed = 0
        """The same, summed over the steps since the last search."""

    def add(self, added: Int32s, slots: Slots, refs: Int32s) -> None:
        """Take in rows: where their pages have enough holders, into the groups that read those already."""
        if self._is_enabled:
            is_deep = slots.num_pages[added] >= self.policy.min_columns
            if is_deep.any():  # else the table may not even have such a column
                pages = slots.table[added[is_deep], self.policy.min_columns - 1]
                is_deep[is_deep] = refs[pages] >= self.policy.min_rows
            if is_deep.any():
                deep = added[is_deep]
                num_joined = self._join(deep, slots)
                self._missed_per_step += self._count_missed(deep, num_joined, slots, refs) * self.policy.page_size
                added = np.concatenate((deep[num_joined == 0], added[~is_deep]))
        self.slots = np.concatenate((self.slots, added))

    def refresh(self, slots: Slots, refs: Int32s) -> None:
        """Drop the rows that no longer decode, and regroup if that is due. Once per step."""
        self.drop_ended(slots)
        if self._missed_per_step == 0:
            return
        self._num_missed += self._missed_per_step
        if self.policy.pays_to_regroup(self._num_missed, self.slots.size):
            self._missed_per_step = self._num_missed = 0
            num_shared = count_shared_columns(slots.table, self.slots, self._count_full(slots, self.slots), refs)
            self.slots, self.groups = find_groups(slots.table, self.slots, num_shared, self.policy)

    def take_all(self) -> Int32s:
        """Return the rows, which are no longer here."""
        taken, self.slots, self.groups = self.slots, _NONE, NO_GROUPS
        self._missed_per_step = self._num_missed = 0
        self.is_short = False
        return taken

    def drop_ended(self, slots: Slots) -> None:
        """Drop the rows that no longer decode."""
        if self.is_stale:
            self._keep(slots.states[self.slots] == State.DECODE)
            self.is_stale = False

    def _join(self, added: Int32s, slots: Slots) -> Int32s:
        """Put each of `added` behind the rows of the innermost group whose pages it holds; return how many columns
        its groups read, 0 for a row that has none and is not taken in."""
        groups = self.groups
        ends = groups.first_columns + groups.num_columns
        last_pages = slots.table[self.slots[groups.first_rows], ends - 1]
        # Who holds the last page of a group holds those before it: its other groups are those around that one.
        is_member = slots.table[added[:, None], ends - 1] == last_pages
        is_member &= slots.num_pages[added, None] >= ends
        if not is_member.any():
            return np.zeros(added.size, np.int32)
        depths = np.where(is_member, ends, 0)
        innermost = depths.argmax(axis=1)
        num_columns: Int32s = depths.max(axis=1)
        joining = np.flatnonzero(num_columns)
        places = (groups.first_rows + groups.num_rows)[innermost[joining]]
        if joining.size > 1:  # where several groups end at one row, the inner one's members come first
            order = np.lexsort((-num_columns[joining], places))
            joining, places = joining[order], places[order]
        self.slots = _inserted(self.slots, places, added[joining])
        first_rows = groups.first_rows + np.searchsorted(places, groups.first_rows, side="right").astype(np.int32)
        num_rows = groups.num_rows + is_member.sum(axis=0, dtype=np.int32)
        self.groups = Groups(first_rows, num_rows, groups.first_columns, groups.num_columns)
        return num_columns

    def _count_missed(self, added: Int32s, num_joined: Int32s, slots: Slots, refs: Int32s) -> int:
        """Return how many pages that `added` share with others no group reads for them."""
        full = self._count_full(slots, added)
        rows = np.flatnonzero(num_joined < full)
        rows = rows[refs[slots.table[added[rows], num_joined[rows]]] > 1]
        if rows.size == 0:
            return 0
        shared = count_shared_columns(slots.table, added[rows], full[rows], refs)
        return int((shared - num_joined[rows]).sum())

    def _count_full(self, slots: Slots, rows: Int32s) -> Int32s:
        full: Int32s = np.minimum(slots.lengths[rows] // self.policy.page_size, slots.num_pages[rows])
        return full

    def _keep(self, is_kept: NDArray[np.bool_]) -> None:
        self.slots = self.slots[is_kept]
        self.groups = self.groups.keep(is_kept)
        is_small = self.groups.num_rows < self.policy.min_rows
        if is_small.any():  # a group that holds others is never the smaller one, so none loses its outer group
            dissolved = self.groups.num_rows[is_small] * self.groups.num_columns[is_small]
            self._missed_per_step += int(dissolved.sum()) * self.policy.page_size
            self.groups = self.groups.select(~is_small)


def find_groups(
    table: NDArray[np.int32], rows: Int32s, num_shared: Int32s, policy: GroupPolicy
) -> tuple[Int32s, Groups]:
    """Return `rows` reordered so that groups are contiguous, and the groups that pay.

    num_shared[i] bounds the columns that rows[i] may share; each of them is a full page.
    """
    tree = _SetTree(table, rows, num_shared, policy.min_rows)
    roots, loose = tree.split(np.arange(tree.sizes.size), 0)
    found: list[tuple[int, int, int, int]] = []
    order: list[int] = []
    first_row = 0
    for root in roots:
        _choose(root, policy)
        _collect(root, 0, policy.min_columns, first_row, found)
        order += root.sets
        first_row += root.num_rows
    found.sort(key=lambda group: (group[2], group[0]))
    columns = np.asarray(found, np.int32).reshape(-1, 4)
    fields = (np.ascontiguousarray(columns[:, index]) for index in range(4))
    return tree.order_rows([*order, *loose]), Groups(*fields)


class _SetTree:
    """Rows in sets: those of one set have the same deepest page that may be shared, so they share all before
    it.

    The sets of n choices of one prompt need no further look at their rows.
    """

    def __init__(self, table: NDArray[np.int32], rows: Int32s, num_shared: Int32s, min_rows: int) -> None:
        self._table = table
        self._min_rows = min_rows
        self._single = rows[num_shared == 0]
        rows, depths = rows[num_shared > 0], num_shared[num_shared > 0]
        deepest = table[rows, depths - 1]
        by_page = np.argsort(deepest, kind="stable")
        self._rows, deepest = rows[by_page], deepest[by_page]
        self._starts = find_run_starts(deepest)
        self.sizes = np.diff(np.append(self._starts, self._rows.size))
        self._first = self._rows[self._starts]
        self._depths = depths[by_page][self._starts]

    def split(self, sets: NDArray[np.intp], column: int) -> tuple[list[Node], list[int]]:
        """Part `sets` by their page at `column`; return the parts of at least min_rows rows, and all other
        sets."""
        is_open = self._depths[sets] > column
        loose: list[int] = sets[~is_open].tolist()
        sets = sets[is_open]
        pages = self._table[self._first[sets], column]
        by_page = np.argsort(pages, kind="stable")
        sets, starts = sets[by_page], find_run_starts(pages[by_page])
        if sets.size == 0:
            return [], loose
        num_rows = np.add.reduceat(self.sizes[sets], starts)
        ends = np.append(starts[1:], sets.size)
        nodes = []
        for start, end, count in zip(starts.tolist(), ends.tolist(), num_rows.tolist(), strict=True):
            part = sets[start:end]
            if count < self._min_rows:
                loose += part.tolist()
            elif end - start == 1:
                only = int(part[0])
                nodes.append(Node([only], count, column, int(self._depths[only]), []))
            else:
                nodes.append(self._branch(part, count, column))
        return nodes, loose

    def order_rows(self, order: list[int]) -> Int32s:
        """Return all rows, set by set in `order`, then those that share nothing."""
        starts, sizes = self._starts[order], self.sizes[order]
        ends = np.cumsum(sizes)
        within = np.arange(self._rows.size) - np.repeat(ends - sizes, sizes)
        return np.concatenate((self._rows[np.repeat(starts, sizes) + within], self._single))

    def _branch(self, part: NDArray[np.intp], num_rows: int, column: int) -> Node:
        most = int(self._depths[part].min())
        common = count_common_columns(self._table, self._first[part], column, most)
        children, rest = self.split(part, common)
        inside = [each for child in children for each in child.sets]
        return Node([*inside, *rest], num_rows, column, common, children)


def _inserted(rows: Int32s, places: NDArray[np.int32], added: Int32s) -> Int32s:
    """Return `rows` with added[i] before what is at places[i], which rise."""
    whole = np.empty(rows.size + added.size, np.int32)
    is_old = np.ones(whole.size, np.bool_)
    targets = places + np.arange(added.size)
    is_old[targets] = False
    whole[targets], whole[is_old] = added, rows
    return whole


def _choose(node: Node, policy: GroupPolicy) -> tuple[int, int]:
    """Mark the nodes that pay, innermost first; return (rows in groups, outermost groups) under `node`.

    Without a group of its own the node's span is read once by each group inside it and by each row outside
    those.
    """
    num_grouped = num_groups = 0
    for child in node.children:
        rows, groups = _choose(child, policy)
        num_grouped += rows
        num_groups += groups
    num_readers = node.num_rows - num_grouped + num_groups
    node.is_used = policy.pays(node.num_rows, node.end_column - node.first_column, num_readers)
    return (node.num_rows, 1) if node.is_used else (num_grouped, num_groups)


def _collect(
    node: Node, first_column: int, min_columns: int, first_row: int, found: list[tuple[int, int, int, int]]
) -> None:
    """Append the groups in use under `node`; a span whose own node is not in use falls to the groups inside
    it."""
    if node.is_used and node.end_column - first_column >= min_columns:
        found.append((first_row, node.num_rows, first_column, node.end_column - first_column))
        first_column = node.end_column
    for child in node.children:
        _collect(child, first_column, min_columns, first_row, found)
        first_row += child.num_rows
