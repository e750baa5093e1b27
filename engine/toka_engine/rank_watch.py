"""Names the rank for which the others of its replica wait, by comparing what all of them have begun and done. Pure.

Ranks of a replica get the same steps and exchange sums within each, so one that lags or has taken another branch stops
the others, which look just as stuck. What is counted is beats, never seconds: a pause of the whole container is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

UNEVEN_BEATS = 40
"""Beats (of 250 ms) for which ranks may be at different steps without any of them moving."""
ENDLESS_BEATS = 120
"""Beats for which all ranks may be in one step, on GPUs, whose longest honest step takes less than a second."""


class Place(NamedTuple):
    """The steps that a rank has begun and done since it was ready."""

    begun: int
    done: int


class Blame(NamedTuple):
    """The rank to blame, by name, and why."""

    name: str
    words: str


class RankWatch:
    """Watches the ranks of one replica."""

    def __init__(self) -> None:
        self._suspected: tuple[Blame, Mapping[str, Place]] | None = None
        self._num_beats = 0

    def beat(self, places: Mapping[str, Place], is_gpu: bool) -> Blame | None:
        """Take the places of all ranks, by name, as of this beat; return who stops the others, once that is sure."""
        suspicion, limit = _suspect(places, is_gpu)
        suspected = None if suspicion is None else (suspicion, dict(places))
        if suspected != self._suspected:
            self._suspected, self._num_beats = suspected, 0
        elif suspected is not None:
            self._num_beats += 1
        return suspicion if self._num_beats >= limit else None


def _suspect(places: Mapping[str, Place], is_gpu: bool) -> tuple[Blame | None, int]:
    """Return who holds up the others if nothing moves any more, and after how many such beats that is sure."""
    first = min(places, key=lambda name: places[name])
    last = max(places, key=lambda name: places[name])
    if places[first].begun < places[last].begun:
        begun, done = places[first]
        words = f"{first} has not begun step {begun + 1}; {last} waits for it"
        if done < begun:
            words = f"{first} is still in step {begun}; {last} is in step {places[last].begun} and waits for it"
        return Blame(first, words), UNEVEN_BEATS
    step = places[last].begun
    if places[first].done < step == places[last].done:
        words = f"{first} is in step {step}, which {last} has ended: one of them took another branch"
        return Blame(first, words), UNEVEN_BEATS
    if is_gpu and places[last].done < step:
        return Blame(first, f"all ranks of {first} are in step {step}, and none ends it"), ENDLESS_BEATS
    return None, ENDLESS_BEATS
