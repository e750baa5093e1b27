"""Logprobs of prompts: which chunks a step scores, and the messages made of what comes back.

A prompt that is scored takes from the prefix tree only pages whose rows were scored before, by itself, so the worker
sees every row once. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from toka_engine.manager.requests import Prefill, Waiting
from toka_engine.manager.state import ScoredChunk, StepBuilder
from toka_engine.messages import Int32s, PromptLogprobs, Tokens


def num_reusable_pages(entry: Waiting, page_size: int) -> int | None:
    """Return how many pages of a found prefix `entry` may use; None: all."""
    request = entry.request
    if request.scoring is None or request.scoring.num_planned >= request.prompt_length:
        return None
    return request.scoring.num_planned // page_size


def score_chunk(step: StepBuilder, prefill: Prefill, start: int) -> None:
    """Have the step score the chunk that was added last, [start, prefill.position), if the request asks for it."""
    request, end = prefill.request, prefill.position
    scoring = request.scoring
    if scoring is None or end <= scoring.num_planned:
        return
    if scoring.num_planned >= request.prompt_length:  # a preempted stream's output is prefilled with its prompt
        return
    scoring.num_planned = end
    is_end = end >= request.prompt_length
    count = min(end, request.prompt_length - 1) - start
    if count:
        next_token = -1 if is_end else int(prefill.tokens[end])
        step.scored.append(ScoredChunk(request, len(step.chunk_slots) - 1, start + 1, count, next_token))


def scored_fields(step: StepBuilder) -> dict[str, Any]:
    """Return the scored_* fields of the Step."""
    return {
        "scored_chunks": _ints([each.chunk for each in step.scored]),
        "scored_next": _ints([each.next_token for each in step.scored]),
        "scored_counts": _ints([each.request.scoring.num_tops for each in step.scored if each.request.scoring]),
    }


def report_scores(scored: list[ScoredChunk], tokens: Tokens) -> Iterator[PromptLogprobs]:
    """Make the messages to the server of the chunks that the step of `tokens` has scored."""
    begin, width = 0, tokens.scored_top_width
    for each in scored:
        end = begin + each.count
        yield PromptLogprobs(
            first_stream=each.request.first_stream,
            start=each.start,
            logprobs=tokens.scored_logprobs[begin:end],
            ranks=tokens.scored_ranks[begin:end],
            top_tokens=tokens.scored_top_tokens[begin * width : end * width],
            top_logprobs=tokens.scored_top_logprobs[begin * width : end * width],
            top_width=width,
        )
        begin = end


def _ints(values: list[int]) -> Int32s:
    return np.asarray(values, np.int32)
