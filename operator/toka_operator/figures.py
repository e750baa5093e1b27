"""The figures by which a canary is judged, out of the text of an engine's /metrics, and the comparison itself. Pure.

Owns: which answers count as failed, the least numbers, and the limits. They are compared with those of the old pods
over the same time, so what is wrong with the clients, the cluster or the hour is the same on both sides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MIN_REQUESTS = 10
"""Fewer answered requests, or first tokens, tell nothing."""
MIN_FAILED = 3
"""A canary of which fewer requests failed is not bad for that."""
MORE_FAILED = 0.05
"""A canary is bad if so much more of its requests failed than of the old pods', and twice as many."""
MOST_FAILED = 0.5
"""The share that makes a canary bad where there is nothing to compare with."""
SLOWER, SLOWER_S = 2.0, 0.05
"""A canary is bad if its first tokens took so many times as long, and so many seconds longer."""
_LEFT = 499
"""The status of a request whose client left."""
_REVISIONS_FAULTS = (401, 403, 404)
"""Refusals that a change of keys or of the model's name brings about. Others are the clients'."""
_SAMPLE = re.compile(
    r"^(toka_requests_total|toka_time_to_first_token_seconds_(?:bucket|sum|count))(?:\{(.*)\})? ([^\s]+)$", re.MULTILINE
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Figures:
    """The counts of an engine since its start, or within a time."""

    at: float = 0.0
    """The time at which it was asked (Unix time)."""
    requests: int = 0
    """Answered requests under /v1, without those whose client left."""
    failed: int = 0
    first_tokens: int = 0
    """Streamed requests that had a first token."""
    first_token_s: float = 0.0
    """The sum of their times until then."""
    within: Mapping[str, int] = field(default_factory=dict)
    """The number of these that took no longer than each bound, in seconds."""

    @property
    def failed_share(self) -> float:
        return self.failed / self.requests if self.requests else 0.0

    @property
    def mean_first_token_s(self) -> float:
        return self.first_token_s / self.first_tokens if self.first_tokens else 0.0

    @property
    def median_bound_s(self) -> float:
        """The least bound within which half of the first tokens came."""
        bounds = [float(bound) for bound, count in self.within.items() if 2 * count >= self.first_tokens]
        return min(bounds, default=math.inf)

    def since(self, before: Figures) -> Figures | None:
        """Return what was counted since then; None if the engine was started anew in between."""
        within = {bound: count - before.within.get(bound, 0) for bound, count in self.within.items()}
        counts = (self.requests - before.requests, self.failed - before.failed, self.first_tokens - before.first_tokens)
        seconds = self.first_token_s - before.first_token_s
        if min(*counts, *within.values(), seconds) < 0:
            return None
        return Figures(self.at, *counts, seconds, within)


def add_up(figures: Iterable[Figures]) -> Figures:
    """The figures of several engines together."""
    all_figures = list(figures)
    bounds = {bound for each in all_figures for bound in each.within}
    return Figures(
        max((each.at for each in all_figures), default=0.0),
        sum(each.requests for each in all_figures),
        sum(each.failed for each in all_figures),
        sum(each.first_tokens for each in all_figures),
        sum(each.first_token_s for each in all_figures),
        {bound: sum(each.within.get(bound, 0) for each in all_figures) for bound in bounds},
    )


def parse_figures(text: bytes, at: float) -> Figures | None:
    """The figures in an engine's /metrics; None if it is none, or breaks off. Any program may answer in its place."""
    requests = failed = 0
    first_tokens, seconds = -1, 0.0
    within: dict[str, int] = {}
    try:
        for name, labels, value in _SAMPLE.findall(text.decode(errors="replace")):
            found = dict(_LABEL.findall(labels))
            if name == "toka_requests_total":
                status, count = int(found.get("status", 0)), int(float(value))
                requests += count * (status != _LEFT)
                failed += count * (status >= 500 or status in _REVISIONS_FAULTS)
            elif name.endswith("_bucket"):
                within[str(float(found["le"]))] = int(float(value))
            elif name.endswith("_sum"):
                seconds = float(value)
            else:
                first_tokens = int(float(value))
    except (ValueError, KeyError, OverflowError):
        return None
    is_sound = first_tokens >= 0 and math.isfinite(seconds) and min(requests, seconds, *within.values()) >= 0
    return Figures(at, requests, failed, first_tokens, seconds, within) if is_sound and within else None


def fails_more(new: Figures, old: Figures) -> bool:
    """Whether the canary's requests fail more often."""
    if new.requests < MIN_REQUESTS or new.failed < MIN_FAILED:
        return False
    if old.requests < MIN_REQUESTS:
        return new.failed_share > MOST_FAILED
    return new.failed_share > old.failed_share + MORE_FAILED and new.failed_share > 2 * old.failed_share


def is_slower(new: Figures, old: Figures) -> bool:
    """Whether the canary's first tokens come later: on average, and in the middle too, so that a single one that took
    very long is not enough."""
    if min(new.first_tokens, old.first_tokens) < MIN_REQUESTS:
        return False
    is_later = new.mean_first_token_s > max(SLOWER * old.mean_first_token_s, old.mean_first_token_s + SLOWER_S)
    return is_later and new.median_bound_s > old.median_bound_s


def compare(new: Figures, old: Figures) -> str:
    """Both sides in words."""
    text = f"{_tell_failed(new)} failed, with the old pods {_tell_failed(old)}"
    if not new.first_tokens:
        return f"{text}; none was streamed, so first tokens were not compared"
    return f"{text}; first token after {_tell_first(new)}, with the old pods {_tell_first(old)}"


def _tell_failed(figures: Figures) -> str:
    if not figures.requests:
        return "0 of 0 requests"
    return f"{figures.failed} of {figures.requests} requests ({100 * figures.failed_share:.1f} %)"


def _tell_first(figures: Figures) -> str:
    if not figures.first_tokens:
        return "- (none)"
    return f"{figures.mean_first_token_s:.3f} s (mean of {figures.first_tokens})"
