"""Makes what a start launches beside the largest steps: plans for the sampler's other kernels, and measured steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from toka_engine.messages import LogitEdits, Step, StepTime, Tokens, WorkerReady
from toka_engine.model.barred_words import WordArrays, WordPlan
from toka_engine.model.logit_edits import TokenEdits, plan_edits
from toka_engine.model.sample_plan import Penalties, SamplePlan
from toka_engine.slot_parameters import SlotBatch

_NUM_ROWS, _NUM_CONTEXT = 256, 512
"""Decode rows that are measured, and tokens in the context of each."""
_PROMPT_SHARE = 8
"""One in this many of a full forward's tokens is of the prompt that is measured."""
_TURNS = 2
"""A step is measured so many times, and the least counts."""


def make_rest_plans(slot_number: int, num_words: int, is_rank: bool) -> Iterator[SamplePlan]:
    """Make plans for one row of slot `slot_number` that together take every kernel of the sampler.

    `num_words`: those of a row's grammar mask; `is_rank`: the row is sampled on several ranks.
    """
    slot, row = np.array([slot_number], np.int32), np.zeros(1, np.int64)
    none, zero = np.empty(0, np.int64), slot * 0
    penalties = Penalties(row, slot, zero + 1, zero, *np.ones((3, 1), np.float32))
    edits = plan_edits(row, zero, [TokenEdits(LogitEdits(zero, np.zeros(1, np.float32), zero))], zero)
    words = WordPlan(row, zero, WordArrays(zero, zero, zero + 1, zero, zero, slot, zero))
    # On several ranks, rows without filters and top logprobs are sampled by other kernels.
    filters = (row, none) if is_rank else (row,)
    all_allowed = np.full((1, num_words), -1, np.int32)
    changes = (
        (none, None, None, None, None),
        (row, None, None, None, None),
        (row, penalties, None, None, None),
        (none, None, edits, None, None),
        (none, None, None, words, None),
        (none, None, None, None, all_allowed),
        (row, penalties, edits, words, all_allowed),
    )
    for filtered, has_logprobs, change in itertools.product(filters, (False, True), changes):
        seeded, penalized, edited, barred, masks = change
        asked = filtered if has_logprobs else none
        yield SamplePlan(
            slots=slot,
            greedy=none,
            drawn=none,
            seeded=seeded,
            filtered=filtered,
            has_logprobs=has_logprobs,
            top=asked,
            top_counts=np.ones(asked.size, np.int32),
            top_width=asked.size,
            penalties=penalized,
            edits=edited,
            words=barred,
            grammatical=none if masks is None else row,
            masks=masks,
        )


def measure_steps(ready: WorkerReady, run: Callable[[Step], Tokens]) -> tuple[StepTime, ...]:
    """Measure a few steps, from which the manager's costs of steps begin. No page has an owner yet.

    `run` executes a step; it returns what its tokens would be, with the seconds that it took.
    """
    most_tokens = min(ready.num_pages, ready.max_pages_per_seq) * ready.page_size
    num_rows = min(_NUM_ROWS, ready.max_seqs, ready.max_tokens_per_forward)
    num_context = min(_NUM_CONTEXT, most_tokens - 1)
    num_prefill = max(1, min(most_tokens, ready.max_tokens_per_forward // _PROMPT_SHARE))

    def measure(step: Step) -> float:
        return min(run(step).step_wall_s for _ in range(_TURNS))

    return (
        StepTime(1, 0, 0, measure(_make_decode(ready, 1, 0))),
        StepTime(num_rows, 0, 0, measure(_make_decode(ready, num_rows, 0))),
        StepTime(num_rows, num_rows * num_context, 0, measure(_make_decode(ready, num_rows, num_context))),
        StepTime(0, 0, num_prefill, measure(_make_prefill(ready, num_prefill))),
    )


def _make_decode(ready: WorkerReady, num_rows: int, num_context: int) -> Step:
    """Make a step of rows with so many tokens before each, in pages of its own as long as there are some."""
    rows = np.arange(num_rows, dtype=np.int32)
    # Slots without pages write to page 0, all of them to the same place: nobody reads it.
    num_columns = num_context // ready.page_size + 1 if num_context else 0
    entries = np.arange(num_rows * num_columns, dtype=np.int32)
    return Step(
        number=0,
        new=SlotBatch.of(rows, length=num_context),
        append_slots=entries // max(1, num_columns),
        append_indices=entries % max(1, num_columns),
        append_pages=entries % ready.num_pages,
        decode_slots=rows,
    )


def _make_prefill(ready: WorkerReady, num_tokens: int) -> Step:
    slot = np.zeros(1, np.int32)
    columns = np.arange(-(-num_tokens // ready.page_size), dtype=np.int32)
    return Step(
        number=0,
        new=SlotBatch.of(slot),
        append_slots=columns * 0,
        append_indices=columns,
        append_pages=columns,
        prefill_slots=slot,
        prefill_starts=slot,
        prefill_lengths=slot + num_tokens,
        prefill_tokens=np.zeros(num_tokens, np.int32),
        fanout_slots=slot,
        fanout_chunks=slot,
    )
