"""Predicts whether a new request will be answered within its `timeout_s`, beside those that are there already.

One that will not be is refused at once: what is computed for an answer that is cut off is lost to those that could be
whole, and in an overload that would be all of them. A request that would be too slow on an idle engine as well has
other reasons for its `timeout_s`: it is refused only where it would not even start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toka_engine.manager.prompt_budget import measure_prompt_time
from toka_engine.manager.requests import PRIORITY_SHIFT
from toka_engine.manager.slots import State
from toka_engine.manager.state import ManagerState
from toka_engine.manager.step_time import StepCosts, StepSize
from toka_engine.messages import Submit

MARGIN = 1.3
"""Others come later, and their prompts go first."""


@dataclass(frozen=True, slots=True)
class Lateness:
    """The time after its `timeout_s` at which a request will start, or will have its last token."""

    seconds: float
    is_start: bool


def predict_lateness(state: ManagerState, submit: Submit) -> Lateness | None:
    """Return how much too late `submit` would be; None: it will be in time, or nothing is known."""
    queue = state.queue
    num_ahead = queue.count_ahead(submit.priority)
    wait_s = state.start_rate.predict_wait_s(queue.busy_s, num_ahead)
    if wait_s > submit.timeout_s:
        return Lateness(wait_s - submit.timeout_s, is_start=True)
    costs = state.step_times.costs
    if costs is None:
        return None
    planned, limit = np.asarray([1], np.int32), np.asarray([submit.max_tokens], np.int32)
    num_tokens = 1 + int(state.predictor.predict_remaining(planned, limit)[0])
    late_s = MARGIN * (wait_s + _predict_answer_s(state, costs, submit, num_tokens, num_ahead)) - submit.timeout_s
    if late_s <= 0.0 or _predict_alone_s(state, costs, submit, num_tokens) > submit.timeout_s:
        return None
    return Lateness(late_s, is_start=False)


def _predict_answer_s(state: ManagerState, costs: StepCosts, submit: Submit, num_tokens: int, num_ahead: int) -> float:
    """Return the seconds from the start to the last token, while all run that are there already and do not give way."""
    slots = state.slots
    is_running = (slots.states != State.FREE) & (slots.states != State.RETIRING)
    is_before = is_running & (slots.orders < (submit.priority + 1) << PRIORITY_SHIFT)
    num_before = int(np.count_nonzero(is_before))
    num_rows = min(state.sizes.max_running, num_before + num_ahead + submit.num_choices)
    mean_length = (int(slots.lengths[is_before].sum()) + submit.prompt_ids.size) / (num_before + 1)
    num_context = int(num_rows * mean_length)
    num_prompt = submit.prompt_ids.size + sum(
        prefill.tokens.size - prefill.position
        for prefill in state.prefills
        if prefill.request.priority <= submit.priority
    )
    most = state.sizes.max_prefill_tokens
    if state.sizes.target_gap_s and (submit.is_streamed or slots.is_streamed[is_before].any()):
        seconds = measure_prompt_time(state, costs, StepSize(num_rows, num_context, 0))
        most = int(max(1, min(most, seconds / costs.prefill_s))) if costs.prefill_s else most
    prompt_s = -(-num_prompt // most) * costs.predict_s(StepSize(num_rows, num_context, most))
    prompt_s += _predict_attention_s(costs, submit)
    token_s = costs.predict_s(StepSize(num_rows, num_context, int(state.step_times.mean_prefill)))
    return prompt_s + num_tokens * token_s


def _predict_attention_s(costs: StepCosts, submit: Submit) -> float:
    """Return the seconds in which the prompt's tokens read those before them."""
    return costs.chunk_context_s * submit.prompt_ids.size**2 / 2


def _predict_alone_s(state: ManagerState, costs: StepCosts, submit: Submit, num_tokens: int) -> float:
    """Return the seconds that the answer takes on an idle engine."""
    num_prompt, num_rows = submit.prompt_ids.size, submit.num_choices
    prompt_s = -(-num_prompt // state.sizes.max_prefill_tokens) * costs.step_s + costs.prefill_s * num_prompt
    prompt_s += _predict_attention_s(costs, submit)
    return prompt_s + num_tokens * costs.predict_s(StepSize(num_rows, num_rows * num_prompt, 0))
