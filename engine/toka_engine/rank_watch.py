"""Names the rank for which the others of its replica wait, by comparing what all of them have begun and done. Pure.

Ranks of a stage get the same steps and exchange sums within each, so one that lags or has taken another branch stops
the others, which look just as stuck. Pipeline stages may be at different steps, since each waits for the one before it,
and the first one for tokens: a stage that does not move is to blame if nothing is missing that it waits for. What is
counted is beats, never seconds: a pause of the whole container is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

UNEVEN_BEATS = 40
"""Beats (of 250 ms) for which ranks may be at different steps without any of them moving."""
ENDLESS_BEATS = 120
"""Beats for which all ranks may be in one step, on GPUs, whose longest honest step takes less than a second."""


class Place(NamedTuple):
    """The steps that a rank has begun and done since it was ready."""

    begun: int
    done: int


Stages: TypeAlias = Sequence[Mapping[str, Place]]
"""By stage, the places of its ranks by name."""


class Blame(NamedTuple):
    """The rank to blame, by name, and why."""

    name: str
    words: str


class RankWatch:
    """Watches the ranks of one replica, stage by stage."""

    def __init__(self) -> None:
        self._suspected: tuple[Blame, Stages] | None = None
        self._num_beats = 0

    def beat(self, stages: Stages, is_gpu: bool) -> Blame | None:
        """Take the places of all ranks as of this beat; return who stops the others, once that is sure."""
        suspicion, limit = _suspect(stages[0], is_gpu) if len(stages) == 1 else _suspect_stages(stages, is_gpu)
        suspected = None if suspicion is None else (suspicion, [dict(each) for each in stages])
        if suspected != self._suspected:
            self._suspected, self._num_beats = suspected, 0
        elif suspected is not None:
            self._num_beats += 1
        return suspicion if self._num_beats >= limit else None


def find_holdup(stages: Stages) -> str | None:
    """Return a rank of the stage that is in a step and waits for no other stage; None if all are idle or late."""
    for index, stage in enumerate(stages):
        name = min(stage, key=lambda each: stage[each])
        begun, done = stage[name]
        needed = begun if index else begun - 1  # rows of this step, or tokens of those before
        if done < begun and min(place.done for place in stages[index - 1].values()) >= needed:
            return name
    return None


def _suspect_stages(stages: Stages, is_gpu: bool) -> tuple[Blame | None, int]:
    """Return who holds up the others of several stages, and after how many beats that is sure."""
    every = {name: place for stage in stages for name, place in stage.items()}
    last = max(every, key=lambda name: every[name])
    late = [name for name, place in every.items() if place.begun == place.done < every[last].begun]
    if late:
        first = min(late, key=lambda name: every[name])
        return Blame(first, f"{first} has not begun step {every[first].begun + 1}; {last} waits for it"), UNEVEN_BEATS
    for stage in stages:
        blame, limit = _suspect(stage, is_gpu=False)
        if blame is not None:
            return blame, limit
    holdup = find_holdup(stages) if is_gpu else None
    if holdup is not None:
        words = f"all ranks of {holdup} are in step {every[holdup].begun}, and none ends it"
        return Blame(holdup, words), ENDLESS_BEATS
    return None, ENDLESS_BEATS


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
