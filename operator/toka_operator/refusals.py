"""Writes that the API server refused, and when each is tried again.

Owns: the backoff of refused writes (a quota, an admission policy, a right that is missing), so that a thousand refused
objects do not keep the API server busy. Another wish than the refused one is tried at once. No I/O.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

REFUSED_FIRST_S = 5.0
REFUSED_LAST_S = 120.0
WEBHOOK_LAST_S = 20.0
"""The longest wait for an admission webhook that does not answer: it is an outage, and over when somebody mends it."""


@dataclass(slots=True)
class _Refusal:
    wish: Any
    why: str
    delay_s: float
    due: float


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

    def note(self, target: str, wish: Any, why: str, last_s: float = REFUSED_LAST_S) -> bool:
        """Remembers a refusal, to be tried again after `last_s` at the latest. Returns whether it is news: another one,
        or for another reason."""
        before = self._refusals.get(target)
        is_again = before is not None and before.wish == wish
        delay_s = min(last_s, before.delay_s * 2) if before is not None and is_again else REFUSED_FIRST_S
        self._refusals[target] = _Refusal(wish, why, delay_s, time.monotonic() + delay_s)
        return before is None or before.why != why

    def keep_only(self, targets: set[str]) -> None:
        """Forgets the refusals of whatever is not refused any more."""
        for target in self._refusals.keys() - targets:
            del self._refusals[target]

    def next_try_s(self) -> float | None:
        """Seconds until a refused write is due; None if none is refused."""
        due = min((refusal.due for refusal in self._refusals.values()), default=None)
        return None if due is None else max(0.0, due - time.monotonic())
