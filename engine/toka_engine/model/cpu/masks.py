"""Masks of allowed tokens, on a CPU: tokens that a row's grammar does not allow get no chance."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_NEGATIVE = float("-inf")


def apply_masks(
    logits: torch.Tensor,  # [n, width] float32; changed in place
    places: NDArray[np.int64],  # [k]: each masked row's place in `logits`
    bits: NDArray[np.int32],  # [k, words]: bit i of word w allows token 32 * w + i
    first: int = 0,  # the token of the first logit
) -> None:
    """Set the logits of tokens whose bit is 0 to -inf."""
    width = logits.shape[1]
    for place, row in zip(places.tolist(), bits, strict=True):
        allowed = np.unpackbits(row.view(np.uint8), bitorder="little")[first : first + width]
        logits[place].masked_fill_(torch.from_numpy(allowed) == 0, _NEGATIVE)
