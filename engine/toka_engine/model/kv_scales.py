"""Scales of a KV cache of 8-bit floats: a checkpoint's, folded into the weights around the cache.

A checkpoint that was calibrated for such a cache has, for each layer, a scale by which keys are to be divided before
they are stored, and one for values. Dividing the outputs of the keys' projection by it and multiplying those of the
queries' changes no product of the two, and likewise for values and the output projection. So what the cache holds
stands for itself, and no kernel knows scales. They are rounded up to a power of 2, by which floats are multiplied
exactly, and which takes nothing of the precision of 8-bit floats; of several heads' scales the largest counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_MOST_EXPONENT = 24
"""Scales beyond 2 ** +-24 are no calibration's."""


@dataclass(frozen=True, slots=True)
class KvScales:
    """The factors by which what one layer's cache holds is smaller than its keys and values; powers of 2."""

    keys: float = 1.0
    values: float = 1.0


def list_scale_names(prefix: str, which: str) -> tuple[str, ...]:
    """Return the names that the scale of the keys (`which` is k) or values (v) of attention `prefix` may have."""
    return f"{prefix}.{which}_scale", f"{prefix}.{which}_proj.{which}_scale", f"{prefix}.{which}_proj.output_scale"


def round_up(scale: torch.Tensor) -> float:
    """Return the power of 2 for one layer's scale, or its heads'. Raises ValueError, which says what is wrong."""
    if not scale.numel() or not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise ValueError("is not one finite number above 0, or several")
    exponent = math.ceil(math.log2(float(scale.max())))
    if abs(exponent) > _MOST_EXPONENT:
        raise ValueError(f"is {float(scale.max()):.3g}, beyond 2 ** +-{_MOST_EXPONENT}")
    return 2.0**exponent
