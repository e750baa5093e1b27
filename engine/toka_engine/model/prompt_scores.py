"""Logprobs of prompts: for each row of a chunk, that of the token that follows, its rank, and the likeliest tokens.

The LM head and what comes after it run over a few rows at a time, so the length of a prompt costs no memory. A
token's logprob and those of the likeliest ones come from one formula over the same numbers: where the token is the
likeliest, both are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Int32s, Step

PIECE_ROWS = 256
"""Rows at a time: with a vocabulary of 128 k, 128 MB of logits and as much of logprobs. Fewer would read the head's
weights more often.
"""
_BLOCK = 256


class Vocabulary(Protocol):
    """Joins what the ranks find in their parts of the vocabulary; see `cpu.vocabulary`."""

    def join_log_sums(self, log_sums: torch.Tensor) -> torch.Tensor: ...

    def join_counts(self, counts: torch.Tensor) -> torch.Tensor: ...

    def join_top(self, values: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]: ...

    def find_logits(self, x: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor: ...


class ScorePlan(NamedTuple):
    """The P rows of a step whose next token is known, because the prompt goes on with it."""

    rows: Int32s  # [P] rows of the forward
    targets: Int32s  # [P] the token after each
    counts: Int32s  # [P] how many of the likeliest tokens are asked for
    width: int
    """The largest of `counts`."""


class PromptScores(NamedTuple):
    """Results for the rows of a ScorePlan."""

    logprobs: torch.Tensor  # [P] fp32, of the target
    ranks: torch.Tensor  # [P] int32: 1: no token is likelier
    top_tokens: torch.Tensor  # [P, width] int32; -1 beyond a row's count
    top_logprobs: torch.Tensor  # [P, width] fp32


def plan_scores(step: Step) -> ScorePlan | None:
    """Find the rows of `step` to score; None if there are none."""
    chunks = step.scored_chunks
    if not chunks.size:
        return None
    ends = np.cumsum(step.prefill_lengths)
    rows: list[NDArray[np.integer]] = []
    targets: list[Int32s] = []
    for chunk, after in zip(chunks.tolist(), step.scored_next.tolist(), strict=True):
        begin, end = int(ends[chunk] - step.prefill_lengths[chunk]), int(ends[chunk])
        following = step.prefill_tokens[begin + 1 : end]
        targets.append(following if after < 0 else np.append(following, np.int32(after)))
        rows.append(step.decode_slots.size + np.arange(begin, begin + targets[-1].size))
    counts = np.repeat(step.scored_counts, [part.size for part in targets]).astype(np.int32)
    width = int(step.scored_counts.max())
    return ScorePlan(np.concatenate(rows).astype(np.int32), np.concatenate(targets), counts, width)


def score_prompt(
    head: Callable[[torch.Tensor], torch.Tensor],  # [n, hidden_size] -> logits [n, width of this rank's part]
    hidden: torch.Tensor,  # [P, hidden_size], of the plan's rows
    targets: torch.Tensor,  # [P] int32
    counts: torch.Tensor,  # [P] int32
    width: int,
    vocabulary: Vocabulary | None = None,
    piece_rows: int = PIECE_ROWS,
) -> PromptScores:
    """Score the rows, `piece_rows` at a time. `vocabulary` None: there is one rank."""
    num_rows, device = hidden.shape[0], hidden.device
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int32, device=device)
    top_tokens = torch.empty((num_rows, width), dtype=torch.int32, device=device)
    top_logprobs = torch.empty((num_rows, width), dtype=torch.float32, device=device)
    for begin in range(0, num_rows, piece_rows):
        piece = slice(begin, begin + piece_rows)
        found = score_logits(head(hidden[piece]).float(), targets[piece].long(), width, vocabulary)
        logprobs[piece], ranks[piece], top_tokens[piece], top_logprobs[piece] = found
    is_beyond = torch.arange(width, device=device)[None, :] >= counts[:, None]
    return PromptScores(logprobs, ranks, top_tokens.masked_fill_(is_beyond, -1), top_logprobs)


def message_fields(scores: PromptScores | None) -> dict[str, Any]:
    """Return the scored_* fields of `Tokens`, from scores on the host."""
    if scores is None:
        return {}
    return {
        "scored_logprobs": scores.logprobs.numpy(),
        "scored_ranks": scores.ranks.numpy(),
        "scored_top_tokens": scores.top_tokens.numpy().reshape(-1),
        "scored_top_logprobs": scores.top_logprobs.numpy().reshape(-1),
        "scored_top_width": scores.top_tokens.shape[1],
    }


def score_logits(
    wide: torch.Tensor,  # [n, width of this rank's part] fp32
    ids: torch.Tensor,  # [n] int64
    count: int,
    vocabulary: Vocabulary | None = None,
) -> PromptScores:
    """Return the logprob and the rank of `ids`, and the `count` likeliest tokens, of every row."""
    if vocabulary is None:
        every = torch.log_softmax(wide, dim=1)
        chosen = every.gather(1, ids[:, None])
        ranks = (every > chosen).sum(dim=1).int() + 1
        values, tokens = find_top(every, count)
        return PromptScores(chosen.squeeze(1), ranks, tokens.int(), values)
    in_order = torch.arange(ids.shape[0], device=ids.device)
    log_sums = vocabulary.join_log_sums(torch.logsumexp(wide, dim=1))
    chosen = vocabulary.find_logits(wide, in_order, ids)
    num_above = vocabulary.join_counts((wide > chosen[:, None]).sum(dim=1))
    values, tokens = find_top(wide, min(count, wide.shape[1]))
    if count:
        values, tokens = vocabulary.join_top(values, tokens, count)
    return PromptScores(chosen - log_sums, num_above.int() + 1, tokens.int(), values - log_sums[:, None])


def find_top(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and columns [n, count] of the largest of each row of x [n, width], in descending order.

    They lie in the `count` blocks of the largest maxima, so that one pass and a search among few take the place of
    torch's several passes over long rows.
    """
    num_blocks = x.shape[1] // _BLOCK
    if count == 0 or num_blocks <= 2 * count:
        found = torch.topk(x, count, dim=1)
        return found.values, found.indices
    end = num_blocks * _BLOCK
    blocks = x[:, :end].unflatten(1, (num_blocks, _BLOCK))
    best = torch.topk(blocks.amax(dim=2), count, dim=1).indices[:, :, None]
    inside = torch.arange(_BLOCK, device=x.device)
    values = blocks.gather(1, best.expand(-1, -1, _BLOCK)).flatten(1)
    columns = (best * _BLOCK + inside).flatten(1)
    if end < x.shape[1]:
        rest = torch.arange(end, x.shape[1], device=x.device).expand(x.shape[0], -1)
        values, columns = torch.cat((values, x[:, end:]), dim=1), torch.cat((columns, rest), dim=1)
    found = torch.topk(values, count, dim=1)
    return found.values, columns.gather(1, found.indices)
