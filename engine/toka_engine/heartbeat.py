"""Judges the answers of children to the supervisor's pings: who is silent, stopped, stuck, or stops its fellow ranks.

Counts beats instead of reading a clock, so that a pause of the whole container does not look like a stall. Decides
nothing: what a finding means is the supervisor's business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from toka_engine.control_messages import RankReport
from toka_engine.processes import (
    BUSY_PONGS_STALLED,
    PING_INTERVAL_S,
    SILENT_PINGS_STALLED,
    SILENT_PINGS_STARVED,
    SILENT_PINGS_UNSURE,
    ChildProcess,
)
from toka_engine.rank_watch import Place, RankWatch, Stages, find_holdup
from toka_engine.topology import Role

SILENT_PINGS_STARTING = 240
"""Silence of 60 s while the engine starts: libraries that are read from a slow disk hold up a whole process."""
REPORT_BEATS = 4
"""The server is told of ranks once a second."""


class Finding(NamedTuple):
    """The child that is stuck, and why."""

    child: ChildProcess
    words: str


class Heartbeat:
    """The beats of all children."""

    def __init__(self) -> None:
        self.silent_process = ""
        """The name of one that has not answered for a moment."""
        self._watches: defaultdict[int, RankWatch] = defaultdict(RankWatch)
        """By replica."""
        self._num_beats = 0

    def beat(self, children: Collection[ChildProcess], is_starting: bool) -> Finding | None:
        """Ping all `children`. Return the first one that is stuck, if there is any."""
        self._num_beats += 1
        for child in children:
            child.beat()
        for child in children:
            if words := _find_start_stall(child) if is_starting else _find_silence(child):
                return Finding(child, words)
        for child in children:
            if not is_starting and child.busy_pongs >= BUSY_PONGS_STALLED:
                child = _find_held_up(child, children)
                return Finding(child, f"{child.name} has been in one step for {child.busy_s:.0f} s")
        silent = [child.name for child in children if child.silent_pings >= SILENT_PINGS_UNSURE]
        self.silent_process = "" if is_starting or not silent else silent[-1]
        return None if is_starting else self._compare_ranks(children)

    def make_reports(self, children: Collection[ChildProcess]) -> tuple[RankReport, ...]:
        """Return what each rank has done so far, in one beat of several; nothing in the others."""
        if self._num_beats % REPORT_BEATS:
            return ()
        ranks = [child for child in children if child.role is Role.MODEL]
        return tuple(RankReport(one.rank, one.place.done, one.cpu_s, one.memory_bytes) for one in ranks)

    def _compare_ranks(self, children: Collection[ChildProcess]) -> Finding | None:
        for number in sorted({child.rank.dp_rank for child in children if child.role is Role.MODEL}):
            ranks = _find_ranks(number, children)
            is_gpu = all(child.device == "cuda" for child in ranks.values())
            if len(ranks) > 1 and (blame := self._watches[number].beat(_place_stages(ranks), is_gpu)):
                return Finding(ranks[blame.name], blame.words)
        return None


def _find_ranks(replica: int, children: Collection[ChildProcess]) -> dict[str, ChildProcess]:
    return {child.name: child for child in children if child.role is Role.MODEL and child.rank.dp_rank == replica}


def _place_stages(ranks: Mapping[str, ChildProcess]) -> Stages:
    stages: defaultdict[int, dict[str, Place]] = defaultdict(dict)
    for name, child in ranks.items():
        stages[child.rank.pp_rank][name] = child.place
    return [stages[number] for number in sorted(stages)]


def _find_silence(child: ChildProcess) -> str:
    if child.silent_pings < SILENT_PINGS_STALLED:
        return ""
    if child.silent_pings < SILENT_PINGS_STARVED and child.is_at_work:
        return ""
    return f"{child.name} has not answered for {child.silent_pings * PING_INTERVAL_S:.1f} s"


def _find_held_up(busy: ChildProcess, children: Collection[ChildProcess]) -> ChildProcess:
    """Return the rank for which `busy`, one of several stages, waits in its step; else `busy` itself."""
    if busy.role is not Role.MODEL or busy.rank.pp_size == 1:
        return busy
    ranks = _find_ranks(busy.rank.dp_rank, children)
    return ranks[find_holdup(_place_stages(ranks)) or busy.name]


def _find_start_stall(child: ChildProcess) -> str:
    """Return why a child that starts is stuck: it answers only once its interpreter runs, and then not always soon."""
    if child.silent_pings >= SILENT_PINGS_STALLED and child.is_stopped:
        return f"{child.name} was stopped while the engine started"
    if child.has_answered and child.silent_pings >= SILENT_PINGS_STARTING:
        return f"{child.name} has not answered for {child.silent_pings * PING_INTERVAL_S:.0f} s"
    return ""
