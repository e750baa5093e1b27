"""Edits of logits by their definition, token by token, and the messages that ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from toka_engine.messages import LogitEdits, SlotEdits, WordList

from tests.model.driving import ints


def make_edits(
    bias: dict[int, float] | None = None,
    allowed: Sequence[int] = (),
    ends: Sequence[int] = (),
    min_tokens: int = 0,
    words: Sequence[Sequence[int]] = (),
) -> LogitEdits:
    """`words`: of two tokens or more."""
    bias = bias or {}
    barred = WordList(
        ints(*(word[-1] for word in words)),
        ints(*(len(word) - 1 for word in words)),
        ints(*(token for word in words for token in word[:-1])),
    )
    values = np.array(list(bias.values()), np.float32)
    return LogitEdits(ints(*bias), values, ints(*allowed), ints(*ends), min_tokens, barred)


def edit(logits: torch.Tensor, edits: LogitEdits, generated: Sequence[int]) -> torch.Tensor:
    """Logits [vocab], changed in place."""
    num_generated, begin = len(generated), 0
    for token, length in zip(edits.words.ids.tolist(), edits.words.lengths.tolist(), strict=True):
        before = edits.words.tokens[begin : begin + length].tolist()
        begin += length
        if list(generated[-length:]) == before:
            logits[token] = -torch.inf
    for token, value in zip(edits.bias_ids.tolist(), edits.bias_values.tolist(), strict=True):
        logits[token] += value
    if num_generated < edits.min_tokens:
        logits[edits.end_ids.tolist()] = -torch.inf
    if edits.allowed_ids.size:
        is_allowed = torch.zeros(logits.shape[0], dtype=torch.bool)
        is_allowed[edits.allowed_ids.tolist()] = True
        logits[~is_allowed] = -torch.inf
    return logits


def slot_edits(edits: dict[int, LogitEdits | None]) -> tuple[SlotEdits, ...]:
    """The message for new slots, by slot."""
    return tuple(SlotEdits(ints(slot), each) for slot, each in edits.items() if each is not None)
