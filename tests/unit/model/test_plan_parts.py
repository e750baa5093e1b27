"""A plan of some of a step's samples says of each what the plan of all says."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from toka_engine.messages import LogitEdits
from toka_engine.model.barred_words import WordArrays, WordPlan
from toka_engine.model.logit_edits import TokenEdits, plan_edits
from toka_engine.model.sample_plan import Penalties, SamplePlan

NUM_ROWS = 9
rows_of = st.sets(st.integers(0, NUM_ROWS - 1)).map(sorted)


def as_rows(rows: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(rows, np.int64)


def make_penalties(rows: list[int]) -> Penalties | None:
    numbers = np.array(rows, np.int32)
    factors = (numbers.astype(np.float32) + add for add in (0.1, 0.2, 0.3))
    return Penalties(as_rows(rows), numbers, numbers + 10, numbers + 20, *factors) if rows else None


def make_edits(row: int) -> TokenEdits:
    ids = np.arange(row % 3, dtype=np.int32) + row
    allowed = np.arange(row % 2, dtype=np.int32) + 50
    return TokenEdits(LogitEdits(ids, ids.astype(np.float32), allowed, np.array([7], np.int32), 3))


def make_words(rows: list[int]) -> WordPlan | None:
    """One word more for each row than for the one before, from none."""
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), np.arange(len(rows)))
    lengths = owners % 3 + 1
    parts = np.repeat(np.arange(owners.size, dtype=np.int32), lengths)
    numbers = np.arange(parts.size, dtype=np.int32)
    arrays = WordArrays(owners, owners + 60, lengths, parts, numbers + 200, numbers + 300, numbers + 400)
    return WordPlan(as_rows(rows), np.array(rows, np.int32), arrays) if rows else None


def describe(plan: SamplePlan) -> dict[int, list[Any]]:
    """Returns what is asked for each slot, in whichever row it is."""
    found: dict[int, list[Any]] = {int(slot): [] for slot in plan.slots}
    for name in ("greedy", "drawn", "seeded", "filtered"):
        for row in getattr(plan, name):
            found[int(plan.slots[row])].append(name)
    for row, count in zip(plan.top, plan.top_counts, strict=True):
        found[int(plan.slots[row])].append(("top", int(count)))
    if plan.penalties is not None:
        names = ("sources", "lengths", "num_generated", "presence", "frequency", "repetition")
        for at, row in enumerate(plan.penalties.rows):
            values = [getattr(plan.penalties, name)[at] for name in names]
            found[int(plan.slots[row])].append(("penalties", *map(float, values)))
    if plan.edits is not None:
        placed = plan.edits.place(plan.edits.rows.astype(np.int32))
        for row, token, value in zip(placed.rows, placed.ids, placed.values, strict=True):
            found[int(plan.slots[row])].append(("added", int(token), float(value)))
        for row in placed.restricted:
            found[int(plan.slots[row])].append("restricted")
        for row, token in zip(placed.allowed_rows, placed.allowed_ids, strict=True):
            found[int(plan.slots[row])].append(("allowed", int(token)))
    if plan.words is not None:
        words = plan.words.arrays.place(plan.words.rows.astype(np.int32))
        parts = np.stack([words.tokens, words.sources, words.positions], axis=1)
        for index, (row, token, length) in enumerate(zip(words.rows, words.ids, words.lengths, strict=True)):
            own = parts[words.owners == index].tolist()
            assert len(own) == length
            found[int(plan.slots[row])].append(("word", int(token), own))
    if plan.masks is not None:
        for row, mask in zip(plan.grammatical, plan.masks, strict=True):
            found[int(plan.slots[row])].append(("mask", mask.tolist()))
    return found


@settings(max_examples=60)
@given(chosen=rows_of, kinds=st.lists(st.sampled_from(["greedy", "drawn", "seeded"]), min_size=9, max_size=9),
       filtered=rows_of, top=rows_of, penalized=rows_of, edited=rows_of, grammatical=rows_of,
       barred=rows_of)  # fmt: skip
def test_a_part_asks_for_its_rows_what_the_whole_plan_asks(
    chosen, kinds, filtered, top, penalized, edited, grammatical, barred
) -> None:
    by_kind = {
        kind: as_rows([row for row, each in enumerate(kinds) if each == kind]) for kind in ("greedy", "drawn", "seeded")
    }
    edits = None
    if edited:
        logit_rows = np.array(edited, np.int32)
        edits = plan_edits(as_rows(edited), logit_rows, [make_edits(row) for row in edited], logit_rows * 0 + 1)
    slots = np.arange(NUM_ROWS, dtype=np.int32) * 3 + 100
    counts = np.array(top, np.int32) + 1
    plan = SamplePlan(
        slots, **by_kind, filtered=as_rows(filtered), has_logprobs=bool(top), top=as_rows(top), top_counts=counts,
        top_width=NUM_ROWS, penalties=make_penalties(penalized), edits=edits, grammatical=as_rows(grammatical),
        words=make_words(barred), masks=np.array(grammatical, np.int32)[:, None] + 1,
    )  # fmt: skip
    whole, part = describe(plan), describe(plan.select(as_rows(chosen)))
    assert part == {int(slots[row]): whole[int(slots[row])] for row in chosen}
    assert plan.whole_rows.tolist() == sorted({*filtered, *top, *penalized, *edited, *grammatical, *barred})
