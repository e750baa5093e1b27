"""Streams leave their slots here: end, cancel, preemption, and the release of what they held.

A slot that a step in flight still names is retired: its pages and the slot itself are given back when that
step is back. Preemption keeps the tokens that have come back and puts the stream at the front of the queue.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from toka_engine.manager.grammars import KnownGrammar
from toka_engine.manager.requests import Kept, Prefill, Stream, Waiting
from toka_engine.manager.slots import State
from toka_engine.manager.state import ManagerState
from toka_engine.manager.top_logprobs import Tops
from toka_engine.messages import FINISH_GRAMMAR, Deltas, Floats, Int32s


def cancel(state: ManagerState, stream: int) -> None:
    """Forget `stream`, wherever it is. Unknown ones are ignored."""
    place = state.where.get(stream)
    if place is None:
        return
    owner = place if isinstance(place, Waiting) else state.slots.streams[place]
    assert owner is not None
    state.leave(stream, owner.request)
    if isinstance(place, Waiting):
        state.queue.drop_choice(place, stream - place.request.first_stream)
        return
    slots = state.slots
    if slots.states[place] in (State.PREFILL, State.RESERVED):
        _leave_prefill(state, place)
    else:
        state.predictor.finished(slots.num_received[place : place + 1], slots.limits[place : place + 1])
        end_slot(state, place)


def fail_waiting(state: ManagerState, grammar: KnownGrammar) -> list[Deltas]:
    """End the streams of `grammar`, which the workers cannot compile: all of them wait."""
    streams: list[int] = []
    for entry in list(state.queue.entries):
        if entry.request.grammar is grammar:
            streams += [entry.request.first_stream + choice for choice in entry.choices]
    for stream in streams:
        cancel(state, stream)
    if not streams:
        return []
    zeros = np.zeros(len(streams), np.int32)
    reasons = np.full(len(streams), FINISH_GRAMMAR, np.uint8)
    ended = np.asarray(streams, np.int64)
    return [Deltas(ended=ended, ended_reasons=reasons, ended_num_tokens=zeros, ended_lengths=zeros)]


def end_slot(state: ManagerState, slot: int) -> None:
    """Take `slot` from its stream: tokens still in flight are dropped, pages go when the last step is
    back."""
    end_slots(state, np.asarray([slot], np.int32))


def end_slots(state: ManagerState, ended: Int32s) -> None:
    """End several slots at once; see `end_slot`."""
    state.mark_rows_stale()
    state.queue.note_news()
    released = state.slots.retire(ended, state.completed_step)
    if released.size:
        release_slots(state, released)


def release_completed(state: ManagerState) -> None:
    """Give back what waited for steps that are back by now."""
    released = state.slots.take_retired(state.completed_step)
    if released.size:
        release_slots(state, released)
    if state.pages.release_held(state.completed_step):
        state.queue.note_news()


def preempt_newest(state: ManagerState, min_order: int | None = None) -> int | None:
    """Preempt the stream (or the prefill) that is last by priority and arrival, unless it is the only one. With
    `min_order` it may be the only one, and is left alone if it comes before that.

    Returns how many pages come back when its last step is back, beyond those that are back already; None:
    there is none to preempt.
    """
    slots = state.slots
    candidates = np.flatnonzero((slots.states == State.DECODE) | (slots.states == State.PREFILL))
    if candidates.size < (2 if min_order is None else 1):
        return None
    slot = int(candidates[np.argmax(slots.orders[candidates])])
    if min_order is not None and slots.orders[slot] < min_order:
        return None
    pages = slots.table[slot, : slots.num_pages[slot]]
    num_freed = int(np.count_nonzero(state.pages.allocator.refs[pages] == 1))
    state.counters.preemptions += 1
    state.predictor.preempted()
    stream = slots.streams[slot]
    assert stream is not None
    if stream.prefill is not None:
        prefill = stream.prefill
        members = ([slot] if prefill.is_leader_wanted else []) + prefill.siblings
        close_prefill(state, prefill)
        if not prefill.is_leader_wanted:
            end_slot(state, slot)
        requeue(state, prefill, members, stream.kept)
    else:
        tokens, kept = known_tokens(state, slot), keep_output(state, slot, stream)
        end_slot(state, slot)
        state.enqueue(Waiting(stream.request, {stream.choice: None}, tokens, kept), at_front=True)
    return num_freed if slots.states[slot] == State.RETIRING else 0


def known_tokens(state: ManagerState, slot: int) -> Int32s:
    """Return the prompt and every output token received of `slot`, read back from its pages."""
    slots = state.slots
    count = int(slots.prompt_lengths[slot] + slots.num_received[slot])
    tokens = state.pages.tokens[slots.table[slot, : slots.num_pages[slot]]].reshape(-1)[:count]
    if tokens.size < count:  # the newest token has no page yet
        tokens = np.append(tokens, slots.last_tokens[slot])
    return tokens


def keep_output(state: ManagerState, slot: int, stream: Stream) -> Kept | None:
    """Return the logprobs of the output tokens received of `slot`; None if its request asked for none."""
    if state.slots.num_logprobs[slot] < 0:
        return None
    tops = known_tops(state, slot, stream) if keeps_tops(state, slot) else None
    return Kept(known_logprobs(state, slot, stream), tops)


def known_logprobs(state: ManagerState, slot: int, stream: Stream) -> Floats:
    """Return the logprobs of every output token received of `slot`, which asked for them."""
    slots = state.slots
    start = int(slots.prompt_lengths[slot])
    count = int(slots.num_received[slot])
    logprobs = state.pages.logprobs[slots.table[slot, : slots.num_pages[slot]]].reshape(-1)[start : start + count]
    if logprobs.size < count:  # the newest token has no page yet
        logprobs = np.append(logprobs, slots.last_logprobs[slot])
    if stream.kept is not None:
        logprobs[: stream.num_kept] = stream.kept.logprobs
    return logprobs


def keeps_tops(state: ManagerState, slots: int | Int32s) -> Any:
    """Return whether each of `slots` has asked for top logprobs that are delivered at its end."""
    return (state.slots.num_logprobs[slots] > 0) & ~state.slots.delivers_each[slots]


def known_tops(state: ManagerState, slot: int, stream: Stream) -> Tops:
    """Return the top logprobs of every output token received of `slot`, as many as its request asked for."""
    slots, page_size = state.slots, state.sizes.page_size
    width, start = int(slots.num_logprobs[slot]), int(slots.prompt_lengths[slot])
    positions = np.arange(start + stream.num_kept, start + int(slots.num_received[slot]))
    has_page = positions < slots.num_pages[slot] * page_size
    columns, offsets = np.divmod(positions[has_page], page_size)
    tops = state.pages.tops.at_places(slots.table[slot, columns] * page_size + offsets, width)
    if not has_page.all():  # as above
        tops = np.concatenate((tops, state.pages.tops.newest(np.asarray([slot]), width)))
    before = stream.kept.tops if stream.kept is not None else None
    return tops if before is None else np.concatenate((before, tops))


def _leave_prefill(state: ManagerState, slot: int) -> None:
    stream = state.slots.streams[slot]
    assert stream is not None
    assert stream.prefill is not None
    prefill = stream.prefill
    if slot == prefill.slot:
        prefill.is_leader_wanted = False
    else:
        prefill.siblings.remove(slot)
        end_slot(state, slot)
    if not prefill.is_leader_wanted and not prefill.siblings:
        close_prefill(state, prefill)
        end_slot(state, prefill.slot)


def close_prefill(state: ManagerState, prefill: Prefill) -> None:
    """End `prefill`: streams that waited for its prompt may be admitted."""
    state.prefills.remove(prefill)
    if prefill.pending_key is not None:
        state.pending_pages.pop(prefill.pending_key, None)
        prefill.pending_key = None
    if prefill.rest is not None:
        prefill.rest.prefill = None
        state.queue.note_news()


def requeue(state: ManagerState, prefill: Prefill, members: list[int], kept: Kept | None = None) -> None:
    """Streams of `prefill` that were not sampled yet start later by themselves, together with those still
    waiting."""
    choices: dict[int, None] = {}
    for slot in members:
        stream = state.slots.streams[slot]
        assert stream is not None
        choices[stream.choice] = None
        end_slot(state, slot)
    if prefill.rest is not None and prefill.rest in state.queue:
        choices.update(prefill.rest.choices)
        state.queue.remove(prefill.rest)
    state.enqueue(Waiting(prefill.request, choices, prefill.tokens, kept), at_front=True)


def release_slots(state: ManagerState, released: Int32s) -> None:
    """Give back slots that no step in flight names; full pages of worth stay in the prefix tree."""
    slots = state.slots
    num_known = slots.prompt_lengths[released] + slots.num_received[released]
    num_full = np.minimum(slots.lengths[released], num_known) // state.sizes.page_size
    num_full = np.minimum(num_full, slots.num_pages[released])
    num_in_tree = slots.num_in_tree[released]
    num_full = np.where(slots.keeps_output[released], num_full, np.minimum(num_full, num_in_tree))
    parts = []
    for slot, count, full, known in zip(
        released.tolist(),
        slots.num_pages[released].tolist(),
        num_full.tolist(),
        num_in_tree.tolist(),
        strict=True,
    ):
        pages = slots.table[slot, :count]
        if full:
            state.pages.tree.insert_released(pages[:full], min(full, known), state.next_step)
        parts.append(pages)
    # After each insertion, so that no page of one hangs below a page that another has let go of.
    state.pages.allocator.release(np.concatenate(parts))
    slots.num_pages[released] = 0
    slots.give_back(released)
    state.queue.note_news()
