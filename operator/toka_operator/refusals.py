"""Writes that the API server refused, and when each is tried again.

Owns: the backoff of refused writes (a quota, an admission policy, a right that is missing, a range of addresses that is
used up), so that a thousand refused objects do not keep the API server busy. Another wish than the refused one is tried
at once. No I/O.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

REFUSED_FIRST_S = 5.0
REFUSED_LAST_S = 120.0
FAILED_FIRST_S = 1.0
FAILED_LAST_S = 20.0
"""The waits after a failure of the API server's or of a webhook that it asks: it is an outage, and over when somebody
mends it."""


@dataclass(slots=True)
class _Refusal:
    wish: Any
    why: str
    delay_s: float
    due: float
    is_failed: bool
    """Whether no rule refused it, but the API server could not do it."""


class Refusals:
    """The refused writes of one TokaDeployment. `target` names what was to be written ("Service chat"), `wish` what
    was to become of it."""

    def __init__(self) -> None:
        self._refusals: dict[str, _Refusal] = {}

    def find(self, target: str, wish: Any) -> str:
        """Why this write would be refused again, which it is not worth trying yet; empty if it is to be tried."""
        refusal = self._refusals.get(target)
        if refusal is None or refusal.wish != wish or time.monotonic() >= refusal.due:
            return ""
        return refusal.why

    def note(self, target: str, wish: Any, why: str, is_failed: bool = False) -> bool:
        """Remembers a refusal, or a failure. Returns whether it is news: another one, or for another reason."""
        before = self._refusals.get(target)
        first_s, last_s = (FAILED_FIRST_S, FAILED_LAST_S) if is_failed else (REFUSED_FIRST_S, REFUSED_LAST_S)
        is_again = before is not None and (before.wish, before.is_failed) == (wish, is_failed)
        delay_s = min(last_s, before.delay_s * 2) if before is not None and is_again else first_s
        self._refusals[target] = _Refusal(wish, why, delay_s, time.monotonic() + delay_s, is_failed)
        return before is None or before.why != why

    def find_failed(self) -> frozenset[str]:
        """The targets that no rule refused, but the API server could not write."""
        return frozenset(target for target, refusal in self._refusals.items() if refusal.is_failed)

    def keep_only(self, targets: set[str]) -> None:
        """Forgets the refusals of whatever is not refused any more."""
        for target in self._refusals.keys() - targets:
            del self._refusals[target]

    def next_try_s(self) -> float | None:
        """Seconds until a refused write is due; None if none is refused."""
        due = min((refusal.due for refusal in self._refusals.values()), default=None)
        return None if due is None else max(0.0, due - time.monotonic())
