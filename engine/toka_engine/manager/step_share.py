"""Decides how much of each step background streams get, so that the slowest tokens of other streams come no later.

Those others are the online streams. What a step takes is predicted from its size (`step_time`). A step with a chunk of
an online prompt is among the longest that online streams see: there background work gets next to nothing. Other steps
are filled up, though not beyond the longer ones of the online steps. While online streams have been there lately, a
step of background work alone is no longer than one with an online prompt: that is how long the next request waits for
it. Where requests are refused, background work gets next to nothing of any step. Rows that do not fit sit the step out,
those that came last first; at least one goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toka_engine.manager.prompt_budget import choose_budget, size_prompts
from toka_engine.manager.requests import FIRST_BACKGROUND_ORDER
from toka_engine.manager.state import ManagerState, StepBuilder
from toka_engine.manager.step_time import StepCosts, StepSize
from toka_engine.messages import Int32s

SLACK = 1.15
"""A step of online rows may take this many times as long as without background work;"""
FILL = 1.6
"""this many times where it then is no longer than the longer ones of the online steps;"""
FILL_TO_TARGET = 2.0
"""this many where there is a target for the gaps of streamed answers: their longest steps are bounded then."""
LONG_SHARE, LONG_SHARE_TO_TARGET = 14, 30
"""One online step in so many is a longer one."""
PREFILL_SHARE = 4
"""The prompts of background streams take one in this many of a step's prefill tokens beside online streams."""
MIN_CHUNK = 8
"""Prefill tokens that a step has for background prompts, unless background rows sit it out."""
OVERLOAD_S = 10.0
"""For so long after a refusal online streams need all there is."""
RECENT_S = 60.0
"""For so long after an online stream the next one is expected at any moment."""

_NO_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class BackgroundShare:
    """The part of a step that background work may have."""

    last_order: int = _NO_LIMIT
    """Rows with a higher order sit the step out."""
    num_prefill: int = _NO_LIMIT
    """Tokens of chunks."""


WHOLE = BackgroundShare()


def share_step(state: ManagerState) -> BackgroundShare:
    """Return the share of background work in the next step of `state.rows`."""
    slots, rows = state.slots, state.rows.slots
    is_background = slots.orders[rows] >= FIRST_BACKGROUND_ORDER
    online, background = rows[~is_background], rows[is_background]
    num_prompt, num_before = size_prompts(state, choose_budget(state, online))
    has_online = bool(online.size or num_prompt)
    now, steps = state.clock(), state.online_steps
    quarter = state.sizes.max_tokens_per_forward // PREFILL_SHARE if online.size else _NO_LIMIT
    costs = state.step_times.costs
    if costs is None:
        return BackgroundShare(num_prefill=quarter)
    if not has_online and now - steps.seen_s > RECENT_S:
        return WHOLE
    if has_online:
        size = StepSize(online.size, int(slots.lengths[online].sum()), num_prompt, num_before)
        online_s = costs.predict_s(size)
        least_s = online_s if num_prompt else SLACK * online_s
        fill = FILL_TO_TARGET if state.has_target else FILL
        rest_s = min(max(least_s, steps.long_step_s), fill * online_s) - online_s
        if now - state.refused_s < OVERLOAD_S:
            rest_s = 0.0
    else:
        rest_s = _limit_lone_step(state, costs) - costs.step_s
    return _share_rest(state, background, costs, rest_s, quarter)


def _share_rest(
    state: ManagerState, background: Int32s, costs: StepCosts, rest_s: float, most_prefill: int
) -> BackgroundShare:
    """Let the first of the rows `background`, by order, run that fit into `rest_s`, and prefill in what is left."""
    orders = state.slots.orders[background]
    by_order = np.argsort(orders)
    ends_s = np.cumsum(costs.row_s + costs.context_s * state.slots.lengths[background[by_order]])
    num_fitting = max(1, int(np.searchsorted(ends_s, rest_s, side="right")))
    if num_fitting < background.size:
        return BackgroundShare(int(orders[by_order[num_fitting - 1]]), 0)
    if background.size:
        rest_s -= float(ends_s[-1])
    num_prefill = int(min(max(rest_s, 0.0) / costs.prefill_s, most_prefill)) if costs.prefill_s else most_prefill
    return BackgroundShare(num_prefill=max(MIN_CHUNK, num_prefill))


def _limit_lone_step(state: ManagerState, costs: StepCosts) -> float:
    """Return how long a step may be that has no online part, while an online request is expected."""
    return state.online_steps.prompt_step_s or costs.predict_s(StepSize(0, 0, state.sizes.max_prefill_tokens))


def expects_online(state: ManagerState) -> bool:
    """Return whether there is background work alone, and an online request is expected."""
    head = state.queue.head
    if state.clock() - state.online_steps.seen_s > RECENT_S or (head is not None and not head.request.is_background):
        return False
    if any(not prefill.request.is_background for prefill in state.prefills):
        return False
    return bool((state.slots.orders[state.rows.slots] >= FIRST_BACKGROUND_ORDER).all())


def note_planned(state: ManagerState, rows: Int32s, step: StepBuilder) -> StepSize | None:
    """Note the online part of a step that has been planned; return the size of the whole step. None, and nothing is
    noted, where nobody needs it: without background work and deadlines, a part of the steps is enough to learn from.
    """
    is_sample = state.has_background or state.has_deadlines or state.step_times.wants(step.number)
    if not is_sample and not (step.chunk_slots and state.has_target and state.step_times.wants_mixed()):
        return None
    slots = state.slots
    num_context = int(slots.lengths[rows].sum())
    lengths = [tokens.size for tokens in step.chunk_tokens]
    num_before = sum(length * (start + length // 2) for start, length in zip(step.chunk_starts, lengths, strict=True))
    whole = StepSize(rows.size, num_context, sum(lengths), num_before)
    online = whole if not state.has_background else _size_online(state, rows, step)
    if is_sample and (online.num_rows or online.num_prefill):
        long_share = LONG_SHARE_TO_TARGET if state.has_target else LONG_SHARE
        state.online_steps.note(online, state.step_times.costs, state.clock(), long_share)
    return whole


def _size_online(state: ManagerState, rows: Int32s, step: StepBuilder) -> StepSize:
    slots = state.slots
    online = rows[slots.orders[rows] < FIRST_BACKGROUND_ORDER]
    is_online = slots.orders[np.asarray(step.chunk_slots, np.int32)] < FIRST_BACKGROUND_ORDER
    chunk_sizes = np.asarray([tokens.size for tokens in step.chunk_tokens], np.int64)[is_online]
    starts = np.asarray(step.chunk_starts, np.int64)[is_online]
    num_before = int((chunk_sizes * (starts + chunk_sizes // 2)).sum())
    return StepSize(online.size, int(slots.lengths[online].sum()), int(chunk_sizes.sum()), num_before)
