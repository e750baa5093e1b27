"""Puts admitted choices into slots: the leader with its pages and its prefill, the others in reserve
behind it."""

from __future__ import annotations

import numpy as np

from toka_engine.manager.requests import Prefill, Stream, Waiting
from toka_engine.manager.slots import NO_STOP, STOP_WIDTH, State
from toka_engine.manager.state import ManagerState, StepBuilder
from toka_engine.messages import Int32s


def start_entry(state: ManagerState, step: StepBuilder, entry: Waiting, num_choices: int, matched: Int32s) -> None:
    """Take slots for the first `num_choices` choices of `entry` and pages for its tokens.

    `matched` pages hold the KV of a prefix; the caller has retained them for the leader.
    """
    slots, page_size = state.slots, state.sizes.page_size
    tokens = entry.tokens
    num_matched = matched.size
    num_columns = -(-tokens.size // page_size)
    choices = list(entry.choices)[:num_choices]
    pages = np.concatenate((matched, state.pages.take(num_columns - num_matched)))
    _write_tokens(state, pages[num_matched:], tokens[num_matched * page_size :])
    members = []
    for choice in choices:
        state.queue.drop_choice(entry, choice)
        members.append(_take_slot(state, entry, choice))
    state.times.note_start(members, entry.request.submitted_s, state.clock(), is_again=bool(entry.num_kept))
    leader = members[0]
    slots.states[leader] = State.PREFILL
    slots.table[leader, :num_columns] = pages
    slots.num_pages[leader] = num_columns
    slots.num_in_tree[leader] = slots.num_shared[leader] = num_matched
    slots.lengths[leader] = num_matched * page_size
    rest = entry if entry.choices else None
    prefill = Prefill(entry.request, leader, tokens, num_matched * page_size, members[1:], rest)
    if rest is not None:
        rest.prefill = prefill
    for slot in members:
        stream = slots.streams[slot]
        assert stream is not None
        stream.prefill = prefill
    state.prefills.append(prefill)
    step.new_slots.append(leader)
    step.new_lengths.append(prefill.position)
    if entry.request.grammar is not None and entry.num_kept:
        step.grammar_outputs.append(tokens[entry.request.prompt_length :])
    columns = np.arange(num_columns, dtype=np.int32)
    step.appends.append((np.full(num_columns, leader, np.int32), columns, pages))
    state.counters.prefix_hit_tokens += prefill.position
    if not entry.num_kept:
        state.started.append((entry.request.first_stream + choices[0], prefill.position))


def _take_slot(state: ManagerState, entry: Waiting, choice: int) -> int:
    slots, request = state.slots, entry.request
    slot = slots.take()
    stream = Stream(request, choice, entry.kept, entry.num_kept)
    slots.streams[slot] = stream
    slots.stream_ids[slot] = stream.id
    slots.orders[slot] = request.order + choice
    slots.states[slot] = State.RESERVED
    slots.num_pages[slot] = 0
    slots.num_in_tree[slot] = 0
    slots.lengths[slot] = 0
    slots.prompt_lengths[slot] = request.prompt_length
    slots.num_planned[slot] = slots.num_received[slot] = entry.num_kept
    slots.limits[slot] = request.max_tokens
    slots.delivers_each[slot] = request.deliver_each
    slots.is_streamed[slot] = request.is_streamed
    slots.delivers_stop[slot] = request.delivers_stop
    slots.num_logprobs[slot] = request.sampling.num_logprobs
    slots.has_grammar[slot] = request.grammar is not None
    slots.keeps_output[slot] = request.num_choices == 1
    slots.last_steps[slot] = state.completed_step
    stops = list(request.stop_ids)
    slots.has_more_stops[slot] = len(stops) > STOP_WIDTH
    num_places = min(len(stops), STOP_WIDTH)
    slots.num_stop_places = max(slots.num_stop_places, num_places)
    slots.stop_ids[:, slot] = NO_STOP
    slots.stop_ids[:num_places, slot] = stops[:num_places]
    state.where[stream.id] = slot
    return slot


def _write_tokens(state: ManagerState, pages: Int32s, tokens: Int32s) -> None:
    """Note the contents of a prompt's own pages."""
    padded = np.zeros(pages.size * state.sizes.page_size, np.int32)
    padded[: tokens.size] = tokens
    state.pages.tokens[pages] = padded.reshape(pages.size, -1)
