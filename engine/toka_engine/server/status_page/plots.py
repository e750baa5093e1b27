"""Plots: a quantity over the last ten minutes as the points of an SVG line, and in words."""

from __future__ import annotations

import math

import msgspec

from toka_engine.server.status_page.samples import NUM_SAMPLES, SAMPLE_S, Series

WIDTH, HEIGHT = 320, 96
SPAN_S = (NUM_SAMPLES - 1) * SAMPLE_S
_STEPS = (1, 2, 5, 10)


class Plot(msgspec.Struct, frozen=True):
    """One quantity as it is drawn."""

    title: str
    shown: str
    """The latest value, with its unit."""
    top: str
    """The value at the plot's upper edge."""
    line: str
    """The line's points, as `points` of a polyline; empty without values."""
    area: str
    """The outline of the area under the line."""
    description: str
    """The plot in words, for those who do not see it."""


def draw(title: str, series: Series, unit: str, *, is_share: bool = False) -> Plot:
    """Return the plot of a series; `is_share`: its values are from 0 to 1, shown in per cent."""
    scale = 100.0 if is_share else 1.0
    values = [value * scale for value in series.values]
    top = 100.0 if is_share else round_up(max(values, default=0.0))
    points = [
        (WIDTH * (1 - min(age, SPAN_S) / SPAN_S), HEIGHT - HEIGHT * min(value / top, 1.0))
        for age, value in zip(series.ages_s, values, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{points[0][0]:.1f},{HEIGHT} {line} {points[-1][0]:.1f},{HEIGHT}" if points else ""
    latest = format_number(values[-1]) if values else "–"
    mean = sum(values) / len(values) if values else 0.0
    words = (
        f"{title}: {latest}{unit} now, {format_number(mean)}{unit} on average and at most "
        f"{format_number(max(values))}{unit} in the last ten minutes."
        if values
        else f"{title}: nothing was measured yet."
    )
    return Plot(title, latest + unit, format_number(top) + unit, line, area, words)


def round_up(value: float) -> float:
    """Return the least of 1, 2, 5 times a power of ten that is no less than `value`, and at least 1."""
    if value <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in _STEPS if step * power >= value * (1 - 1e-9))


def format_number(value: float) -> str:
    """Write a number as short as it can be read: 0.4, 12, 3,456, 1.2 M."""
    if value >= 999_500:
        return f"{value / 1e6:.1f} M"
    if value >= 9.95 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}"
