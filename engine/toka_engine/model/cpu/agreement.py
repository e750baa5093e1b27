"""Checks that the ranks of a replica are at the same step, before each: they would add up different things for ever.

No rank can tell by itself that it lags or has taken another branch; its sums would still have the right shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toka_engine.errors import RanksDisagreeError
from toka_engine.messages import Step
from toka_engine.model.ranks import Ranks

_PARTS = ("number", "decode_rows", "prefill_tokens", "samples")


def check_step(ranks: Ranks, names: Sequence[str], step: Step) -> None:
    """Exchange what `step` is among the ranks of these names.

    Raises RanksDisagreeError, on every rank, with what two of them have.
    """
    num_samples = step.decode_slots.size + step.fanout_slots.size
    own = torch.tensor([step.number, step.decode_slots.size, step.prefill_tokens.size, num_samples])
    found = ranks.all_gather(own)
    for rank in range(1, ranks.size):
        if not torch.equal(found[rank], found[0]):
            raise RanksDisagreeError(
                f"the ranks disagree on a step: {_describe(names[0], found[0])}, {_describe(names[rank], found[rank])}"
            )


def _describe(name: str, values: torch.Tensor) -> str:
    parts = (f"{name}={value}" for name, value in zip(_PARTS, values.tolist(), strict=True))
    return f"{name} has {' '.join(parts)}"
