"""Makes metric families of what other processes have counted."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily

from toka_engine.histogram import BOUNDS_S, Buckets

_BOUNDS = (*map(str, BOUNDS_S), "+Inf")


def make_histogram(
    name: str, text: str, buckets: Buckets, labels: Sequence[str] = (), values: Sequence[str] = ()
) -> HistogramMetricFamily:
    """Return the family of one histogram."""
    family = HistogramMetricFamily(name, text, labels=labels)
    total, cumulated = 0, []
    for bound, count in zip(_BOUNDS, buckets.counts, strict=True):
        total += count
        cumulated.append((bound, float(total)))
    family.add_metric(values, cumulated, buckets.sum_s)
    return family
