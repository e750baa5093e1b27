"""What a step's sampled rows ask for, decided on the host, and what the sampler gives back. Shared by all devices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.state import HostSlots


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """The R rows of one step's sampler and, by row index, which of them pay for what."""

    slots: NDArray[np.int32]  # [R]
    greedy: NDArray[np.int64]  # rows with temperature 0
    drawn: NDArray[np.int64]  # rows with temperature > 0 and no seed
    seeded: NDArray[np.int64]  # rows with temperature > 0 and a seed
    filtered: NDArray[np.int64]  # drawn or seeded rows with top_k, top_p or min_p
    has_logprobs: bool
    """Any row asks for the chosen token's logprob."""
    top: NDArray[np.int64]  # rows that ask for top logprobs
    top_counts: NDArray[np.int32]  # [rows of top]: how many
    top_width: int
    """The largest number of top logprobs that any row asks for."""


def plan_sampling(slots: NDArray[np.int32], host: HostSlots) -> SamplePlan:
    """Sort the rows of `slots` by what they ask for."""
    is_greedy = host.temperatures[slots] <= 0.0
    is_seeded = host.seeds[slots] >= 0
    num_logprobs = host.num_logprobs[slots]
    return SamplePlan(
        slots=slots,
        greedy=np.flatnonzero(is_greedy),
        drawn=np.flatnonzero(~is_greedy & ~is_seeded),
        seeded=np.flatnonzero(~is_greedy & is_seeded),
        filtered=np.flatnonzero(host.is_filtered[slots]),
        has_logprobs=bool((num_logprobs >= 0).any()),
        top=np.flatnonzero(num_logprobs > 0),
        top_counts=num_logprobs[num_logprobs > 0],
        top_width=max(0, int(num_logprobs.max(initial=0))),
    )


@dataclass(frozen=True, slots=True)
class Sampled:
    """On the device. Rows as in the plan."""

    ids: torch.Tensor  # [R] int32; -1: logits not finite
    logprobs: torch.Tensor | None  # [R] float32, of the unscaled distribution; None if no row asks
    top_tokens: torch.Tensor | None  # [rows of plan.top, top_width] int32; -1 beyond what a row asks for
    top_logprobs: torch.Tensor | None  # [rows of plan.top, top_width] float32
