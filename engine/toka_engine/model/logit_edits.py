"""Edits of logits by token id: biases, tokens that may not be sampled (yet), and tokens that alone may be.

They come before penalties, temperature and filters. Minus infinity stays what it is under all of these, so that one
addition per token serves bias, barred tokens and `min_tokens` alike. The plan is made on the host; what applies it are
indexed reads and writes of torch, the same on all devices. Rows without edits never get here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.messages import Floats, Int32s, LogitEdits

FOREVER: Final = np.iinfo(np.int32).max
_NEGATIVE = float("-inf")


class TokenEdits:
    """One request's edits, ready to be applied. Its streams share it."""

    __slots__ = ("_additions", "_early_additions", "allowed_ids", "min_tokens", "until")

    def __init__(self, edits: LogitEdits) -> None:
        self.allowed_ids = edits.allowed_ids
        self.min_tokens = edits.min_tokens
        self._additions = edits.bias_ids, edits.bias_values
        is_barred = np.isin(edits.bias_ids, edits.end_ids)
        barred = np.full(edits.end_ids.size, _NEGATIVE, np.float32)
        self._early_additions = (
            np.concatenate((edits.bias_ids[~is_barred], edits.end_ids)),
            np.concatenate((edits.bias_values[~is_barred], barred)),
        )
        self.until = FOREVER if edits.bias_ids.size or edits.allowed_ids.size else edits.min_tokens
        """There is something to do for a stream while it has sampled fewer tokens."""

    def additions(self, num_sampled: int) -> tuple[Int32s, Floats]:
        """Return distinct ids and what is added to their logits, for a stream that has sampled so many tokens."""
        return self._early_additions if num_sampled < self.min_tokens else self._additions

    def holds_until(self, num_sampled: int) -> int:
        """Return the number of sampled tokens from which on `additions` gives something else."""
        return self.min_tokens if num_sampled < self.min_tokens else self.until


@dataclass(frozen=True, slots=True)
class EditPlan:
    """The edits of one step's samples: e rows, k additions, and the tokens that stay in rows where no other may."""

    rows: NDArray[np.int64]  # [e] of the plan's rows, ascending
    logit_rows: Int32s  # [e]: each row's row of logits; rows that share one are choices of one prompt, of equal edits
    until: Int32s  # [e]: the plan holds while the row's slot has sampled fewer tokens
    owners: Int32s  # [k]: index into `rows`
    ids: Int32s  # [k]
    values: Floats  # [k]
    restricted: Int32s  # [a]: indices into `rows` where only some tokens are allowed
    allowed_owners: Int32s  # [m]: index into `rows`
    allowed_ids: Int32s  # [m]

    def select(self, rows: NDArray[np.int64]) -> EditPlan | None:
        """Return the edits of some of the plan's rows, ascending, as if there were no others; None if there are none.

        Each of these rows is to have a row of logits of its own, in their order.
        """
        is_chosen = np.isin(self.rows, rows, assume_unique=True)
        if not is_chosen.any():
            return None
        places = np.cumsum(is_chosen, dtype=np.int32) - 1
        own = is_chosen[self.owners]
        allowed = is_chosen[self.allowed_owners]
        at = np.searchsorted(rows, self.rows[is_chosen])
        return EditPlan(
            rows=at,
            logit_rows=at.astype(np.int32),
            until=self.until[is_chosen],
            owners=places[self.owners[own]],
            ids=self.ids[own],
            values=self.values[own],
            restricted=places[self.restricted[is_chosen[self.restricted]]],
            allowed_owners=places[self.allowed_owners[allowed]],
            allowed_ids=self.allowed_ids[allowed],
        )

    def place(self, at: Int32s, first: int = 0, width: int | None = None) -> EditArrays:
        """Return the edits of logits from token `first` on; at[i] is the row of these for row i, or -1 for none."""
        owners, ids, values = at[self.owners], self.ids - first, self.values
        allowed_owners, allowed_ids = at[self.allowed_owners], self.allowed_ids - first
        is_here, is_allowed_here = owners >= 0, allowed_owners >= 0
        if width is not None:
            is_here &= (ids >= 0) & (ids < width)
            is_allowed_here &= (allowed_ids >= 0) & (allowed_ids < width)
        restricted = at[self.restricted]
        return EditArrays(
            owners[is_here],
            ids[is_here],
            values[is_here],
            restricted[restricted >= 0],
            allowed_owners[is_allowed_here],
            allowed_ids[is_allowed_here],
        )


class EditArrays(NamedTuple):
    """Edits of some rows of logits."""

    rows: Int32s  # [k]
    ids: Int32s  # [k]
    values: Floats  # [k]: added; no pair of row and id comes twice
    restricted: Int32s  # [a]: rows in which only the tokens below stay
    allowed_rows: Int32s  # [m]
    allowed_ids: Int32s  # [m]

    def to_words(self) -> list[Int32s]:
        """Return the arrays as int32 words, for an upload; `apply_edits` takes them as they are."""
        return [each.view(np.int32) for each in self]


def plan_edits(
    rows: NDArray[np.int64],  # [e] of the plan's rows, ascending
    logit_rows: Int32s,  # [e]
    edits: list[TokenEdits],  # [e]
    num_sampled: Int32s,  # [e]
) -> EditPlan:
    """Put the edits of some rows together."""
    counts = num_sampled.tolist()
    additions = [each.additions(count) for each, count in zip(edits, counts, strict=True)]
    allowed = [each.allowed_ids for each in edits]
    places = np.arange(rows.size, dtype=np.int32)
    num_allowed = [ids.size for ids in allowed]
    return EditPlan(
        rows=rows,
        logit_rows=logit_rows,
        until=np.array([each.holds_until(count) for each, count in zip(edits, counts, strict=True)], np.int32),
        owners=np.repeat(places, [ids.size for ids, _ in additions]),
        ids=np.concatenate([ids for ids, _ in additions]),
        values=np.concatenate([values for _, values in additions]),
        restricted=np.flatnonzero(num_allowed).astype(np.int32),
        allowed_owners=np.repeat(places, num_allowed),
        allowed_ids=np.concatenate(allowed),
    )


def apply_edits(logits: torch.Tensor, words: list[torch.Tensor]) -> None:
    """Change logits [n, width] fp32 in place. `words` are int32 tensors on its device, as `EditArrays.to_words`."""
    rows, ids, values, restricted, allowed_rows, allowed_ids = words
    if rows.shape[0]:
        at = rows.long(), ids.long()
        logits.index_put_(at, logits[at].add_(values.view(torch.float32)))
    if restricted.shape[0]:
        at = allowed_rows.long(), allowed_ids.long()
        kept = logits[at]
        logits.index_fill_(0, restricted.long(), _NEGATIVE)
        logits.index_put_(at, kept)


def to_tensors(words: list[NDArray[Any]]) -> list[torch.Tensor]:
    """Return `words` as tensors on the host."""
    return [torch.from_numpy(each) for each in words]
