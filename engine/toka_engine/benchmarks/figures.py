"""Percentiles and medians of what was measured. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def percentiles_ms(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99 of seconds, in milliseconds: the smallest value that as many percent do not exceed."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{q}": round(ordered[-(-len(ordered) * q // 100) - 1] * 1e3, 3) for q in (50, 90, 99)}


def medians(records: Sequence[Any]) -> Any:
    """The records' shape, each number the median of theirs; None where one has none."""
    first = records[0]
    if any(record is None for record in records):
        return None
    if isinstance(first, dict):
        return {key: medians([record[key] for record in records]) for key in first}
    return round(statistics.median(records), 4)
