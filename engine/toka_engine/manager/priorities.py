"""Background streams give way: they are preempted when another request does not fit, and leave it room. How much of a
step they have is decided in `step_share`.

A request with a priority above 0 is background work. What it has computed stays in the prefix tree, so that it goes on
from there when there is room again. One that has waited very long goes first, so that it starts however busy the engine
is: one at a time, which takes little from others.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from toka_engine.manager.lifecycle import preempt_newest
from toka_engine.manager.requests import FIRST_BACKGROUND_ORDER, Waiting
from toka_engine.manager.state import ManagerState

RESERVE = 10
"""Background streams leave one page in this many, and one slot, to others, who then start without a preemption."""

MAX_BACKGROUND_WAIT_S = 600.0
"""The age at which a background request that waits may go first."""


def promote_oldest(state: ManagerState) -> None:
    """Let the background request that came first go before all others, once it is old enough, if none does already."""
    entry = state.queue.oldest_background
    if entry is None or state.clock() - entry.request.submitted_s < MAX_BACKGROUND_WAIT_S:
        return
    if state.promoted is not None and any(
        state.promoted.first_stream + choice in state.where for choice in range(state.promoted.num_choices)
    ):
        return
    head = state.queue.head
    assert head is not None
    state.queue.remove(entry)
    entry.request = state.promoted = replace(entry.request, priority=min(0, head.request.priority))
    state.queue.add(entry, at_front=True)


def make_room(state: ManagerState, entry: Waiting) -> None:
    """Preempt background streams for `entry`, which did not fit. Nothing happens while what was preempted before is
    still on its way back, or where `entry` waits no more or is background work. To be called before a step's rows
    are chosen: a row of the step that is being planned cannot be taken back.
    """
    if entry.request.is_background or entry not in state.queue or state.slots.has_retiring or state.pages.has_held:
        return
    num_choices = len(entry.choices)
    planned = np.asarray([entry.num_kept + 1], np.int32)
    limit = np.asarray([entry.request.max_tokens], np.int32)
    length = entry.tokens.size + int(state.predictor.predict_remaining(planned, limit)[0])
    num_pages = num_choices * -(-length // state.sizes.page_size)
    num_promised, num_preempted = 0, 0
    while num_preempted < num_choices or num_pages > state.pages.allocator.num_available + num_promised:
        num_later = preempt_newest(state, FIRST_BACKGROUND_ORDER)
        if num_later is None:
            return
        num_preempted += 1
        num_promised += num_later
