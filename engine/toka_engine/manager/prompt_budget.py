"""Decides how many prompt tokens a step has beside decode rows, so that tokens of streams come `target_gap_ms` apart.

`step_time` has learned how long a step takes: chunks get what the rows leave of the target. Only a streamed answer
shows its gaps: where no row belongs to one, the limits of `sizes` hold alone. Prompts have at least half of a step's
time, so that they take at most twice as long as without rows, however many there are, and however slow the machine.
Where the prompt that is next has waited for its turn for more than `PATIENCE_S`, the target grows with its wait.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from toka_engine.manager.requests import FIRST_BACKGROUND_ORDER, Request
from toka_engine.manager.state import ManagerState
from toka_engine.manager.step_time import StepCosts, StepSize
from toka_engine.messages import Int32s

PATIENCE_S = 5.0
"""After twice this wait a step may take twice the target, and so on."""
UNKNOWN_SHARE = 8
"""One in this many of a full forward's tokens may be of prompts while the costs of steps are unknown;"""
LEAST_SHARE = 32
"""one in this many at least, whatever the costs seem to be."""
_HEADS = 4
"""Prompts that are looked at; those behind them are taken to be like them."""


class _Prompt(NamedTuple):
    request: Request
    start: int
    """Tokens that are computed already."""
    length: int
    """Tokens that are not."""


def choose_budget(state: ManagerState, rows: Int32s) -> int:
    """Return how many prompt tokens the next step may have beside the decode rows `rows`."""
    sizes, lanes = state.sizes, state.lanes
    if not rows.size and not (lanes and lanes.num_rows):
        return min(sizes.max_tokens_per_forward, sizes.max_lone_prefill_tokens)
    most = min(sizes.max_tokens_per_forward - rows.size, sizes.max_prefill_tokens)
    if not state.has_target or not (state.prefills or _may_admit(state)):
        return most
    slots = state.slots
    waiting = lanes.list_rows() if lanes else rows  # those that get no token while this step runs
    if state.has_background:  # what background work may add to a step is decided in `step_share`
        rows = rows[slots.orders[rows] < FIRST_BACKGROUND_ORDER]
        waiting = waiting[slots.orders[waiting] < FIRST_BACKGROUND_ORDER]
    if not slots.is_streamed[waiting].any():
        return most
    costs = state.step_times.costs
    if costs is None:
        return max(1, min(most, sizes.max_tokens_per_forward // UNKNOWN_SHARE))
    prompts = list(islice(_list_prompts(state), _HEADS))
    if not prompts:
        return most
    wait_s = state.prompt_turns.measure_wait_s(prompts[0].request.submitted_s, state.clock())
    size = StepSize(rows.size, int(slots.lengths[rows].sum()), 0)
    seconds = measure_prompt_time(state, costs, size, max(1.0, wait_s / PATIENCE_S))
    num_fitting = _count_fitting(costs, prompts, seconds)
    return int(max(1, min(most, max(num_fitting, sizes.max_tokens_per_forward // LEAST_SHARE))))


def measure_prompt_time(state: ManagerState, costs: StepCosts, size: StepSize, stretch: float = 1.0) -> float:
    """Return the seconds that a step may spend on prompts beside the rows of `size`, by the target times `stretch`."""
    rows_s = costs.predict_s(size)
    # With lanes, a stream's next token comes when each of them has had its turn.
    target_s = state.sizes.target_gap_s * stretch / (state.lanes.num_used if state.lanes else 1)
    return max(target_s - rows_s, rows_s)


def size_prompts(state: ManagerState, budget: int) -> tuple[int, int]:
    """Return how many tokens of online prompts the next step will have, up to `budget`, if those that wait are
    admitted; and the tokens before each of those, added up.
    """
    num_left, num_before = budget, 0
    for prompt in islice(_list_prompts(state), len(state.prefills) + _HEADS):
        length = max(0, min(prompt.length, num_left))
        num_left -= length
        num_before += length * (prompt.start + length // 2)
    return budget - num_left, num_before


def _list_prompts(state: ManagerState) -> Iterator[_Prompt]:
    """Return the prompts that are not background work, in the order of their turns."""
    for prefill in state.prefills:
        if not prefill.request.is_background:
            yield _Prompt(prefill.request, prefill.position, prefill.tokens.size - prefill.position)
    for entry in state.queue.entries if _may_admit(state) else ():
        if entry.request.is_background:
            return
        if entry.prefill is None:
            yield _Prompt(entry.request, 0, entry.tokens.size)


def _may_admit(state: ManagerState) -> bool:
    """Return whether a prompt that waits in the queue may start in the next step."""
    num_taken = state.sizes.num_slots - state.slots.num_free
    return bool(state.queue) and state.queue.has_news and num_taken < state.sizes.max_running


def _count_fitting(costs: StepCosts, prompts: list[_Prompt], seconds: float) -> float:
    """Return how many tokens of `prompts`, and of others like them, take `seconds`."""
    num_tokens, spent_s, context_s = 0, 0.0, costs.chunk_context_s
    for prompt in prompts:
        token_s, length = costs.prefill_s + context_s * prompt.start, prompt.length
        prompt_s = (token_s + context_s * length / 2) * length
        if spent_s + prompt_s > seconds:
            # token_s * n + context_s / 2 * n^2 = left_s
            left_s = seconds - spent_s
            root = math.sqrt(token_s * token_s + 2 * context_s * left_s)
            return num_tokens + 2 * left_s / max(token_s + root, sys.float_info.min)
        num_tokens += length
        spent_s += prompt_s
    return num_tokens * seconds / spent_s if spent_s else math.inf
