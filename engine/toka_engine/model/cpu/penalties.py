"""Presence, frequency and repetition penalties on a CPU, and their definition.

Presence and frequency as OpenAI defines them, over generated tokens; repetition as in CTRL (Keskar et al. 2019) and
transformers, over the prompt too. Repetition comes first, then frequency, then presence. In fp32, before temperature.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from toka_engine.model.sample_plan import Penalties


def apply_penalties(
    logits: torch.Tensor,  # [n, width] float32, contiguous; changed in place
    tokens: NDArray[np.int64],  # [sum(penalties.lengths)]: each row's tokens, side by side
    penalties: Penalties,
    first: int = 0,  # the token of the first logit
    places: NDArray[np.int64] | None = None,  # [k]: the row of `logits` of each row that asks; None: in order
) -> None:
    """Change only the logits of tokens that a row's sequence has."""
    width = logits.shape[1]
    lengths = penalties.lengths.astype(np.int64)
    owners = np.repeat(np.arange(lengths.size), lengths)
    is_generated = np.arange(tokens.size) >= np.repeat(np.cumsum(lengths) - penalties.num_generated, lengths)
    if tokens.size and (first or tokens.max() >= width):
        is_here = (tokens >= first) & (tokens < first + width)
        owners, tokens, is_generated = owners[is_here], tokens[is_here] - first, is_generated[is_here]
    keys, place = np.unique(owners * width + tokens, return_inverse=True)  # each token of each row once
    counts = np.bincount(place[is_generated], minlength=keys.size)
    rows = keys // width
    if places is not None:
        keys = places[rows] * width + keys % width
    flat, index = logits.view(-1), torch.from_numpy(keys)
    values = flat[index]
    repetition = torch.from_numpy(penalties.repetition[rows])
    values = torch.where(values > 0, values / repetition, values * repetition)
    num_generated = torch.from_numpy(counts.astype(np.float32))
    values -= torch.from_numpy(penalties.frequency[rows]) * num_generated
    values -= torch.from_numpy(penalties.presence[rows]) * (num_generated > 0)
    flat[index] = values
