"""Admission: which waiting requests start now.

First come, first served, as many streams as a simulation of future page use lets in. When not even one stream of the
first request fits, a few behind it are tried, but only so often: then all wait until it fits. With nothing running, one
stream always starts, so the queue always moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toka_engine.manager.sharing import count_shared_columns
from toka_engine.manager.simulation import Load, bound_pages, peak_pages
from toka_engine.manager.slots import State
from toka_engine.manager.starting import start_entry
from toka_engine.manager.state import ManagerState, StepBuilder
from toka_engine.manager.streams import Waiting
from toka_engine.messages import Int32s

MAX_SKIPS = 64
"""How often later requests may start before one that does not fit."""
SKIP_WINDOW = 8
"""How many requests behind it are tried."""
MAX_DEFERRED = 32
"""How many requests that wait for another's prefill are passed over in one step."""


@dataclass(slots=True, eq=False)
class Candidate:
    """A waiting entry that may start now."""

    entry: Waiting
    matched: Int32s
    """Retained pages of the prefix tree."""
    remaining: int
    """Predicted steps after its prefill."""

    def num_new_pages(self, page_size: int) -> int:
        return -(-self.entry.tokens.size // page_size) - self.matched.size


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """What the streams in slots hold: `load` for what each has alone, `ends` by page for what several share."""

    load: Load
    ends: Int32s  # [num_pages]


def admit(state: ManagerState, step: StepBuilder, budget: int) -> None:
    """Start waiting requests whose prefill can begin in this step; `budget` tokens of its forward are left."""
    budget -= sum(job.tokens.size - job.position for job in state.jobs)
    num_free = state.sizes.max_running - (state.sizes.num_slots - state.slots.num_free)
    if budget <= 0 or num_free <= 0 or not state.waiting or not state.has_admission_news:
        return
    state.has_admission_news = False
    candidates = _collect(state, step, budget, num_free)
    if not candidates:
        return
    num_streams = _choose_num_streams(state, candidates, num_free)
    if num_streams == 0:
        candidates = _skip_ahead(state, candidates)
        num_streams = len(candidates)
    else:
        state.has_admission_news = True  # perhaps more in the next step
    starting: list[tuple[Candidate, int]] = []
    for candidate in candidates:
        num_choices = min(num_streams, len(candidate.entry.choices))
        num_streams -= num_choices
        if num_choices:
            starting.append((candidate, num_choices))
        else:
            state.allocator.release(candidate.matched)
    for candidate, num_choices in starting:
        start_entry(state, step, candidate.entry, num_choices, candidate.matched)


def _collect(state: ManagerState, step: StepBuilder, budget: int, num_free: int) -> list[Candidate]:
    """Return the entries next in line that the slots and the forward's tokens allow, their prefixes retained."""
    candidates: list[Candidate] = []
    claimed = set()
    num_deferred = 0
    for entry in state.waiting.values():
        if budget <= 0 or num_free <= 0 or num_deferred > MAX_DEFERRED:
            break
        if entry.job is not None:
            continue
        matched, missing = state.tree.match(entry.tokens)
        if missing in state.coming or missing in claimed:  # another prefills the very page that this lacks
            num_deferred += 1
            continue
        pages = np.asarray(matched, np.int32)
        state.allocator.retain(pages)
        state.tree.touch(pages, step.number)
        planned = np.asarray([entry.num_kept + 1], np.int32)
        limits = np.asarray([entry.request.max_tokens], np.int32)
        remaining = int(state.predictor.predict_remaining(planned, limits)[0])
        candidates.append(Candidate(entry, pages, remaining))
        if missing is not None:
            claimed.add(missing)
        budget -= entry.tokens.size - pages.size * state.sizes.page_size
        num_free -= len(entry.choices)
    if num_deferred:
        state.has_admission_news = True
    return candidates


def _choose_num_streams(state: ManagerState, candidates: list[Candidate], num_free: int) -> int:
    """Return how many of the candidates' streams, in order, fit into the cache by the simulation."""
    most = min(num_free, sum(len(candidate.entry.choices) for candidate in candidates))
    running = measure_running(state)
    if _fits(state, running, candidates, most):
        return most
    fitting, too_many = 0, most
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if _fits(state, running, candidates, middle):
            fitting = middle
        else:
            too_many = middle
    if fitting == 0 and not (state.num_running or state.retiring or state.held_pages):
        return 1
    return fitting


def _skip_ahead(state: ManagerState, candidates: list[Candidate]) -> list[Candidate]:
    """The first does not fit: return the first of the next few that does, alone, with one stream; release the others."""
    head = candidates[0]
    chosen: list[Candidate] = []
    if head.entry.num_skipped < MAX_SKIPS:
        running = measure_running(state)
        for candidate in candidates[1 : 1 + SKIP_WINDOW]:
            if _fits(state, running, [candidate], 1):
                head.entry.num_skipped += 1
                state.has_admission_news = True
                chosen = [candidate]
                break
    for candidate in candidates:
        if candidate not in chosen:
            state.allocator.release(candidate.matched)
    return chosen


def _fits(state: ManagerState, running: Running, candidates: list[Candidate], num_streams: int) -> bool:
    """Whether the first `num_streams` streams of `candidates` can start now and run to their predicted ends."""
    page_size = state.sizes.page_size
    load, ends = running.load, running.ends.copy()
    num_new = 0
    for candidate in candidates:
        count = min(num_streams, len(candidate.entry.choices))
        if count == 0:
            break
        num_streams -= count
        num_new += candidate.num_new_pages(page_size)
        load = load.joined(_candidate_load(candidate, count, page_size))
        ends[candidate.matched] = np.maximum(ends[candidate.matched], candidate.remaining)
    if num_new > state.allocator.num_available:
        return False
    shared = ends[ends >= 0]
    load = load.holding(shared, np.ones(shared.size, np.int32))
    if bound_pages(load, page_size) <= state.sizes.num_pages:
        return True
    return peak_pages(load, page_size) <= state.sizes.num_pages


def _candidate_load(candidate: Candidate, num_streams: int, page_size: int) -> Load:
    """The streams of one entry: they hold the full pages together, and each its own copy of the last."""
    length = candidate.entry.tokens.size
    num_held = np.full(num_streams, length // page_size, np.int32)
    num_held[0] = -(-length // page_size)
    return Load(
        np.full(num_streams, length, np.int32),
        num_held,
        np.full(num_streams, candidate.remaining, np.int32),
        np.asarray([candidate.remaining], np.int32),
        np.asarray([candidate.num_new_pages(page_size)], np.int32),
    )


def measure_running(state: ManagerState) -> Running:
    """The streams in slots, with what they share counted once."""
    slots, page_size = state.slots, state.sizes.page_size
    states = slots.states
    rows = np.flatnonzero((states != State.FREE) & (states != State.RETIRING)).astype(np.int32)
    is_prefill = (states[rows] == State.PREFILL) | (states[rows] == State.RESERVED)
    is_reserved = states[rows] == State.RESERVED
    target = slots.prompt_lengths[rows] + slots.num_received[rows]
    lengths = np.where(is_prefill, target, slots.lengths[rows])
    num_pages = slots.num_pages[rows]
    remaining = state.predictor.predict_remaining(slots.num_planned[rows] + is_prefill, slots.limits[rows])
    num_shared = count_shared_columns(slots.table, rows, num_pages, state.allocator.refs)
    load = Load(
        lengths.astype(np.int32),
        np.where(is_reserved, target // page_size, num_pages).astype(np.int32),
        remaining,
        remaining,
        num_pages - num_shared,
    )
    return Running(load, _find_shared_ends(state, rows, num_shared, remaining))


def _find_shared_ends(state: ManagerState, rows: Int32s, num_shared: Int32s, remaining: Int32s) -> Int32s:
    """Return for each page that several streams hold when the last of them ends; -1 for all other pages."""
    ends = np.full(state.sizes.num_pages, -1, np.int32)
    has_shared = np.flatnonzero(num_shared)
    # Those that share their deepest shared page share all before it: one of each such set stands for the others.
    by_end = has_shared[np.argsort(remaining[has_shared], kind="stable")]
    table = state.slots.table
    deepest = table[rows[by_end], num_shared[by_end] - 1]
    _, last = np.unique(deepest[::-1], return_index=True)
    for place in by_end[np.sort(by_end.size - 1 - last)].tolist():  # later ends overwrite earlier ones
        ends[table[rows[place], : num_shared[place]]] = remaining[place]
    return ends
