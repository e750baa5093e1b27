"""Admission: which waiting requests start now.

First come, first served, as many streams as a forecast of page use lets in. When not even one stream of the
first request fits, a few behind it are tried, but only so often: then all wait until it fits. With nothing
running, one stream always starts, so the queue always moves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from toka_engine.manager.arrays import distinct
from toka_engine.manager.priorities import RESERVE
from toka_engine.manager.prompt_logprobs import num_reusable_pages
from toka_engine.manager.requests import Waiting
from toka_engine.manager.sharing import recount_shared_columns
from toka_engine.manager.simulation import Arrival, Forecast, Load
from toka_engine.manager.slots import State
from toka_engine.manager.starting import start_entry
from toka_engine.manager.state import ManagerState, StepBuilder
from toka_engine.messages import Int32s
from toka_engine.slot_parameters import MAX_GRAMMAR_STREAMS

MAX_SKIPS = 64
"""Later requests that may start before one that does not fit."""
SKIP_WINDOW = 8
"""Requests behind it that are tried."""
PAGE_LIMITED_INTERVAL = 2
"""If pages are short, one step in this many admits: what ends in between is forecast once, not in
every step, and a page waits half a step longer for its next owner."""
MAX_DEFERRED = 32
"""Requests passed over in one step because they wait for another's prefill."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A waiting entry that may start now."""

    entry: Waiting
    matched: Int32s
    """Retained pages of the prefix tree."""
    num_streams: int


@dataclass(frozen=True, slots=True, eq=False)
class Streams:
    """The streams in slots: for the fields see `Load`."""

    rows: Int32s  # [n] slots
    lengths: Int32s
    num_pages: Int32s  # [n] columns in use
    num_held: Int32s
    """Pages held now; for siblings that wait for a leader's prefill, the pages they will share with it."""
    num_planned: Int32s
    """Output tokens, when its prefill is done."""
    limits: Int32s


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """The pages that the streams in slots hold: `load`, and by page when the last holder of a shared one ends (else
    -1)."""

    load: Load
    ends: Int32s  # [num_pages]


@dataclass(slots=True)
class Budget:
    """Prefill tokens of a step that no prefill under way will take."""

    all_tokens: int
    background_tokens: int
    """The part of them that background prompts may have."""

    def take(self, num_tokens: int) -> None:
        self.all_tokens -= num_tokens
        self.background_tokens -= num_tokens


def _measure_budget(state: ManagerState, budget: int, background: int) -> Budget:
    """Return what is left of `budget` tokens, of which background prompts may take `background`. Prefills of background
    work that are under way keep no other request from starting: it goes before them.
    """
    taken = {True: 0, False: 0}
    for prefill in state.prefills:
        taken[prefill.request.is_background] += prefill.tokens.size - prefill.position
    left = budget - taken[False]
    return Budget(left, min(left, background) - taken[True])


def admit(state: ManagerState, step: StepBuilder, budget: int, background: int) -> None:
    """Start waiting requests whose prefill can begin in this step; `budget` tokens of its forward are
    left, of which background prompts may take `background`."""
    num_free = state.sizes.max_running - (state.sizes.num_slots - state.slots.num_free)
    if not state.queue or not state.queue.has_news:
        return
    if num_free <= 0:
        state.misfit = state.queue.head
    left = _measure_budget(state, budget, background)
    if left.all_tokens <= 0 or num_free <= 0:
        return
    if step.number < state.next_admission and state.slots.num_running:
        return
    state.queue.settle()
    candidates = _collect(state, state.queue.entries, step.number, left, num_free)
    if not candidates:
        return
    chosen = _choose(state, candidates)
    _release_others(state, candidates, chosen)
    if len(chosen) < len(candidates):
        state.next_admission = step.number + PAGE_LIMITED_INTERVAL
    if not chosen:
        state.misfit = candidates[0].entry
        left = _measure_budget(state, budget, background)
        chosen = _skip_ahead(state, candidates[0].entry, step.number, left, num_free)
    for candidate, num_streams in chosen.items():
        start_entry(state, step, candidate.entry, num_streams, candidate.matched)
        state.queue.note_news()  # perhaps more in the next step
    if chosen and state.queue:
        state.start_rate.note(state.queue.busy_s, sum(chosen.values()))


def _collect(
    state: ManagerState, entries: Iterable[Waiting], tick: int, budget: Budget, num_free: int
) -> list[Candidate]:
    """Return the first of `entries` that the slots and the forward's tokens allow, their prefixes
    retained. Uses up `budget`."""
    candidates: list[Candidate] = []
    claimed = set()
    num_deferred = 0
    is_background = False
    num_grammars = MAX_GRAMMAR_STREAMS - (_count_grammars(state) if len(state.grammars) else 0)
    for entry in entries:
        if budget.all_tokens <= 0 or num_free <= 0 or num_deferred > MAX_DEFERRED:
            break
        if entry.prefill is not None:
            continue
        if entry.request.grammar is not None and (not entry.request.grammar.is_ready or num_grammars <= 0):
            continue
        if entry.request.is_background and not is_background:  # all that follow are, too
            is_background = True
            num_free -= state.sizes.max_running // RESERVE if state.slots.num_running else 0
            if num_free <= 0:
                break
        if is_background and budget.background_tokens <= 0:
            state.queue.note_news()  # perhaps some in the next step
            break
        pages, missing = state.pages.tree.match(entry.tokens)
        num_reusable = num_reusable_pages(entry, state.sizes.page_size)
        if num_reusable is not None:  # waits for nobody's pages
            pages, missing = pages[:num_reusable], None
        if missing in state.pending_pages or missing in claimed:  # another prefills the very page that this one lacks
            num_deferred += 1
            continue
        if pages.size:
            state.pages.allocator.retain(pages)
            state.pages.tree.touch(pages, tick)
        if missing is not None:
            claimed.add(missing)
        num_streams = min(num_free, len(entry.choices))
        if entry.request.grammar is not None:
            num_streams = min(num_streams, num_grammars)
            num_grammars -= num_streams
        candidates.append(Candidate(entry, pages, num_streams))
        budget.take(entry.tokens.size - pages.size * state.sizes.page_size)
        num_free -= num_streams
    if num_deferred:
        state.queue.note_news()
    return candidates


def _count_grammars(state: ManagerState) -> int:
    """Return how many running streams have a grammar."""
    slots = state.slots
    is_running = (slots.states != State.FREE) & (slots.states != State.RETIRING)
    return int(np.count_nonzero(slots.has_grammar & is_running))


def _choose(state: ManagerState, candidates: list[Candidate]) -> dict[Candidate, int]:
    """Return how many streams of which candidates start."""
    streams = measure_streams(state)
    planned, limits = _planned_and_limits(candidates)
    everyone = {candidate: candidate.num_streams for candidate in candidates}
    if _have_room_to_the_end(state, candidates, limits - planned, streams, streams.limits - streams.num_planned):
        return everyone  # whatever was predicted
    remaining = state.predictor.predict_remaining(planned, limits)
    streams_remaining = state.predictor.predict_remaining(streams.num_planned, streams.limits)
    if _have_room_to_the_end(state, candidates, remaining, streams, streams_remaining):
        return everyone
    running = measure_running(state, streams, streams_remaining)
    forecast = Forecast(running.load, remaining, state.sizes.page_size)
    num_available = state.pages.allocator.num_available
    chosen: dict[Candidate, int] = {}
    for candidate, num_steps in zip(candidates, remaining.tolist(), strict=True):
        arrival, num_new = _arrival(state, candidate, num_steps, running.ends)
        if num_new > num_available:
            break
        num_pages = state.sizes.num_pages - _reserved_pages(state, [candidate])
        num_fitting = forecast.add_fitting(arrival, candidate.num_streams, num_pages)
        if num_fitting == 0:
            break
        chosen[candidate] = num_fitting
        num_available -= num_new
        if num_fitting < candidate.num_streams:
            break
        running.ends[candidate.matched] = np.maximum(running.ends[candidate.matched], num_steps)
    if chosen:
        return chosen
    if not (state.slots.num_running or state.slots.has_retiring or state.pages.has_held):
        return {candidates[0]: 1}
    return {}


def _reserved_pages(state: ManagerState, candidates: list[Candidate]) -> int:
    """Return the pages that must stay free when `candidates` start: some, if there is background work among them."""
    has_background = any(candidate.entry.request.is_background for candidate in candidates)
    return state.sizes.num_pages // RESERVE if has_background else 0


def _skip_ahead(state: ManagerState, head: Waiting, tick: int, budget: Budget, num_free: int) -> dict[Candidate, int]:
    """`head` does not fit: return one stream of the first of the next few that does."""
    if head.num_skipped >= MAX_SKIPS:
        return {}
    behind = itertools.dropwhile(lambda entry: entry is not head, state.queue.entries)
    window: Iterable[Waiting] = itertools.islice(behind, 1, 1 + SKIP_WINDOW)
    if not head.request.is_background:
        window = itertools.takewhile(lambda entry: not entry.request.is_background, window)
    candidates = _collect(state, window, tick, budget, num_free)
    if not candidates:
        return {}
    remaining = state.predictor.predict_remaining(*_planned_and_limits(candidates))
    streams = measure_streams(state)
    streams_remaining = state.predictor.predict_remaining(streams.num_planned, streams.limits)
    running = measure_running(state, streams, streams_remaining)
    forecast = Forecast(running.load, remaining, state.sizes.page_size)
    chosen: dict[Candidate, int] = {}
    for candidate, num_steps in zip(candidates, remaining.tolist(), strict=True):
        arrival, num_new = _arrival(state, candidate, num_steps, running.ends)
        if num_new > state.pages.allocator.num_available:
            continue
        if forecast.add_fitting(arrival, 1, state.sizes.num_pages):
            head.num_skipped += 1
            chosen = {candidate: 1}
            break
    _release_others(state, candidates, chosen)
    return chosen


def _release_others(state: ManagerState, candidates: list[Candidate], chosen: dict[Candidate, int]) -> None:
    for candidate in candidates:
        if candidate not in chosen:
            state.pages.allocator.release(candidate.matched)


def _planned_and_limits(candidates: list[Candidate]) -> tuple[Int32s, Int32s]:
    """Return the output tokens of each candidate after its prefill, which plans the first one, and its limit."""
    planned = np.asarray([candidate.entry.num_kept + 1 for candidate in candidates], np.int32)
    limits = np.asarray([candidate.entry.request.max_tokens for candidate in candidates], np.int32)
    return planned, limits


def _arrival(state: ManagerState, candidate: Candidate, remaining: int, ends: Int32s) -> tuple[Arrival, int]:
    """Return the candidate's streams for the forecast, and how many pages must be taken for them now."""
    length = candidate.entry.tokens.size
    num_new = -(-length // state.sizes.page_size) - candidate.matched.size
    held_ends = ends[candidate.matched]
    held_ends = held_ends[held_ends >= 0]
    return Arrival(length, remaining, num_new + candidate.matched.size - held_ends.size, held_ends), num_new


def measure_streams(state: ManagerState) -> Streams:
    slots, page_size = state.slots, state.sizes.page_size
    rows = np.flatnonzero((slots.states != State.FREE) & (slots.states != State.RETIRING)).astype(np.int32)
    states = slots.states[rows]
    is_reserved = states == State.RESERVED
    is_prefill = is_reserved | (states == State.PREFILL)
    target = slots.prompt_lengths[rows] + slots.num_received[rows]
    num_pages = slots.num_pages[rows]
    return Streams(
        rows,
        np.where(is_prefill, target, slots.lengths[rows]),
        num_pages,
        np.where(is_reserved, target // page_size, num_pages),
        slots.num_planned[rows] + is_prefill,
        slots.limits[rows],
    )


def _have_room_to_the_end(
    state: ManagerState, candidates: list[Candidate], remaining: Int32s, streams: Streams, streams_remaining: Int32s
) -> bool:
    """Return whether all would fit even if no page were released before every stream has its last one.

    Candidates have `remaining` steps to go, `streams` have `streams_remaining`.
    """
    page_size = state.sizes.page_size
    growth = -(-(streams.lengths + streams_remaining) // page_size) - streams.num_held
    total = state.pages.allocator.num_used + int(growth.sum())
    for candidate, num_steps in zip(candidates, remaining.tolist(), strict=True):
        length = candidate.entry.tokens.size
        last = -(-(length + num_steps) // page_size)
        total += last - candidate.matched.size
        if num_steps:
            total += (candidate.num_streams - 1) * (last - length // page_size)
    return total <= state.sizes.num_pages - _reserved_pages(state, candidates)


def measure_running(state: ManagerState, streams: Streams, remaining: Int32s) -> Running:
    """Return the pages that `streams` hold, shared ones counted once, if each has `remaining` steps to go."""
    rows, num_pages = streams.rows, streams.num_pages
    slots = state.slots
    num_shared = recount_shared_columns(
        slots.table, rows, num_pages, state.pages.allocator.refs, slots.num_shared[rows]
    )
    slots.num_shared[rows] = num_shared
    ends = _find_shared_ends(state, rows, num_shared, remaining)
    load = Load(streams.lengths, streams.num_held, num_pages - num_shared, remaining, ends[ends >= 0])
    return Running(load, ends)


def _find_shared_ends(state: ManagerState, rows: Int32s, num_shared: Int32s, remaining: Int32s) -> Int32s:
    """Return for each page that several streams hold when the last of them ends; -1 for all other pages."""
    ends, last_ends = np.full((2, state.sizes.num_pages), -1, np.int32)
    places = np.flatnonzero(num_shared)
    # Those that share their deepest shared page share all before it: one of each such set stands for the
    # others.
    table = state.slots.table
    deepest = table[rows[places], num_shared[places] - 1]
    np.maximum.at(last_ends, deepest, remaining[places])
    members = np.zeros(state.sizes.num_pages, np.intp)
    members[deepest] = places
    sets = distinct(deepest)
    sets = sets[np.argsort(last_ends[sets])]
    for place, end in zip(members[sets].tolist(), last_ends[sets].tolist(), strict=True):
        ends[table[rows[place], : num_shared[place]]] = end  # later ends overwrite earlier ones
    return ends
