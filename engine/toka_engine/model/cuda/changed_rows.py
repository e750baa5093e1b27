"""Which samples of a step get a copy of their logits, changed, and which have theirs changed in place; the host's part.

Edits are made in place, which costs what they touch; so are words barred. Where the model's own logits are needed
afterwards, for logprobs, and where penalties change a row, the row is copied first, as many at a time as the sampler
has room for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from toka_engine.messages import Int32s
from toka_engine.model.barred_words import NO_WORDS, WordArrays
from toka_engine.model.logit_edits import EditArrays
from toka_engine.model.sample_plan import Penalties, SamplePlan

_NO_ROWS = np.empty(0, np.int64)


def find_copied_rows(plan: SamplePlan) -> NDArray[np.int64]:
    """Return the plan's rows of which a copy is changed, ascending."""
    penalized = _NO_ROWS if plan.penalties is None else plan.penalties.rows
    return plan.changed_rows if plan.has_logprobs else penalized


def place_masks_in_place(plan: SamplePlan, copied: NDArray[np.int64]) -> Int32s:
    """Return, for each mask, the sample whose logits it changes in place; -1 where a copy is changed."""
    samples = plan.grammatical.astype(np.int32)
    samples[np.isin(plan.grammatical, copied, assume_unique=True)] = -1
    return samples


def place_masks_in_copies(plan: SamplePlan, chosen: NDArray[np.int64]) -> Int32s:
    """Return, for each mask, which of the copies of the rows `chosen`, ascending, it changes; -1: none."""
    is_chosen = np.isin(plan.grammatical, chosen, assume_unique=True)
    at = np.full(plan.grammatical.size, -1, np.int32)
    at[is_chosen] = np.searchsorted(chosen, plan.grammatical[is_chosen])
    return at


def place_edits_in_place(plan: SamplePlan, copied: NDArray[np.int64]) -> EditArrays | None:
    """Return the edits of the model's own logits, once for each of their rows; None if there are none."""
    edits = plan.edits
    if edits is None:
        return None
    rows, firsts = np.unique(edits.logit_rows, return_index=True)
    at = np.full(edits.rows.size, -1, np.int32)
    at[firsts] = rows
    at[np.isin(edits.rows, copied, assume_unique=True)] = -1
    return edits.place(at) if (at >= 0).any() else None


def place_edits_in_copies(plan: SamplePlan, chosen: NDArray[np.int64]) -> list[Int32s]:
    """Return the words (see `EditArrays`) of the edits of copies of the rows `chosen`, ascending; all empty if none."""
    edits = plan.edits
    if edits is None:
        return [_NO_WORDS] * len(EditArrays._fields)
    at = np.full(edits.rows.size, -1, np.int32)
    is_chosen = np.isin(edits.rows, chosen, assume_unique=True)
    at[is_chosen] = np.searchsorted(chosen, edits.rows[is_chosen])
    return edits.place(at).to_words()


def place_words_in_place(plan: SamplePlan, copied: NDArray[np.int64]) -> WordArrays | None:
    """Return the words that are barred in the model's own logits; None if there are none."""
    words = plan.words
    if words is None:
        return None
    at = np.where(np.isin(words.rows, copied, assume_unique=True), np.int32(-1), words.logit_rows)
    placed = words.arrays.place(at)
    return placed if placed.ids.size else None


def place_words_in_copies(plan: SamplePlan, chosen: NDArray[np.int64]) -> WordArrays:
    """Return the words that are barred in copies of the rows `chosen`, ascending."""
    words = plan.words
    if words is None:
        return NO_WORDS
    is_chosen = np.isin(words.rows, chosen, assume_unique=True)
    at = np.where(is_chosen, np.searchsorted(chosen, words.rows), -1).astype(np.int32)
    return words.arrays.place(at)


def pack_penalties(plan: SamplePlan, chosen: NDArray[np.int64]) -> list[Int32s]:
    """Return the inputs of the kernels, [chosen.size] words each: sources, lengths, numbers of generated tokens and
    the three factors. Rows without penalties have none of their tokens counted, and factors that change nothing.
    """
    count = chosen.size
    arrays: list[NDArray[np.int32] | NDArray[np.float32]] = [plan.slots[chosen], *np.zeros((2, count), np.int32)]
    arrays += [*np.zeros((2, count), np.float32), np.ones(count, np.float32)]
    penalties = plan.penalties
    if penalties is not None:
        is_chosen = np.isin(penalties.rows, chosen, assume_unique=True)
        at = np.searchsorted(chosen, penalties.rows[is_chosen])
        for array, given in zip(arrays, _columns(penalties), strict=True):
            array[at] = given[is_chosen]
    return [array.view(np.int32) for array in arrays]


def _columns(penalties: Penalties) -> tuple[NDArray[np.int32] | NDArray[np.float32], ...]:
    return (
        penalties.sources,
        penalties.lengths,
        penalties.num_generated,
        penalties.presence,
        penalties.frequency,
        penalties.repetition,
    )


_NO_WORDS: Int32s = np.empty(0, np.int32)
