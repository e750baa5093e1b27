"""Which revisions get which pods: the rollout's policy.

Owns: the surge and availability budgets, and which pods of a revision go first. Pure; one call decides one step
from what is there, whatever happened before, so it needs no memory and no order of events.

A revision's StatefulSet asks for a `Window` of ordinals. Pods are taken from either end of it, so the pods that do
not serve go first, and are added at the end whose names are free, so that a new pod never waits for the name of one
that is still leaving. These rules hold at every step, over all revisions together:
- no more than desired + maxSurge pods are asked for. Old pods that still drain count (they hold their GPUs);
  unrecoverable ones do not, or one of them could block a rollout for ever;
- an available pod goes only if desired - maxUnavailable available pods are left;
- an old pod that is not available, but served before, goes only if desired - maxUnavailable other old or available
  pods are left: it may come back, and a new revision that never serves must not replace it;
- a displaced pod (its node is cordoned) counts as none of the desired ones, and goes when as many as desired are
  available without it. In the midst of a window it is deleted (`find_moves`), and its successor takes its name.

With a `new_limit` the current revision has no more pods than that, none of the others is replaced, and they have what
becomes of them otherwise: those that are lacking, too many or displaced.

With `ends_old_first` no pod of the current revision is added until every old one is gone, those that drain included.

Where ordinals have data (`keeps_ordinals`), the pods of the current revision are those from 0 on, whatever goes or
comes: a pod's successor waits for its name, and a smaller number of pods is without the highest.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """The ordinals that a StatefulSet asks for: `replicas` of them, from `start`."""

    start: int = 0
    replicas: int = 0

    @property
    def end(self) -> int:
        return self.start + self.replicas

    def __contains__(self, ordinal: int) -> bool:
        return self.start <= ordinal < self.end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))


@dataclass(frozen=True, slots=True)
class RevisionPods:
    """The pods of one revision as seen. The sets hold ordinals."""

    window: Window = Window()
    """The number that its StatefulSet asks for now."""
    available: frozenset[int] = frozenset()
    served: frozenset[int] = frozenset()
    """Pods that have been ready at some time."""
    unrecoverable: frozenset[int] = frozenset()
    """Not ready for long, or failing for a reason that waiting does not mend."""
    leaving: frozenset[int] = frozenset()
    """Pods that go, whoever asked for it, and other objects that hold the name of a pod."""
    num_draining: int = 0
    """Pods outside the window, or leaving, that still hold what they use."""
    keeps_ordinals: bool = False
    """Whether a successor takes its predecessor's ordinal, and waits for it."""
    displaced: frozenset[int] = frozenset()
    """Pods that stay, but on a node from which they are wanted away."""

    def trim(self) -> Window:
        """The window without pods at its ends that leave anyway: their successors need not wait for their names."""
        if self.keeps_ordinals:
            return self.window
        start, end = self.window.start, self.window.end
        while start < end and start in self.leaving:
            start += 1
        while end > start and end - 1 in self.leaving:
            end -= 1
        return Window(start, end - start)


@dataclass(frozen=True, slots=True)
class Budgets:
    """The number of pods desired, of pods more that may exist, and of pods fewer that may serve."""

    num_desired: int
    max_surge: int
    max_unavailable: int
    is_paused: bool = False
    keeps_ordinals: bool = False
    ends_old_first: bool = False
    new_limit: int | None = None
    """The pods that the current revision may have beside the others; None: it replaces them."""

    @property
    def replaces_old(self) -> bool:
        """Whether pods of other revisions go because there is another one."""
        return not self.is_paused and self.new_limit is None

    @property
    def max_total(self) -> int:
        return self.num_desired + self.max_surge

    @property
    def min_available(self) -> int:
        return max(0, self.num_desired - self.max_unavailable)


_NONE = RevisionPods()


def decide_windows(
    budgets: Budgets, current: str, revisions: Mapping[str, RevisionPods], unmade: RevisionPods = _NONE
) -> dict[str, Window]:
    """The window of each revision now. `revisions` are those with a StatefulSet, oldest first; `current` is the
    desired one; `unmade` says which names are taken, if that has no StatefulSet yet."""
    if budgets.num_desired == 0:
        names = dict.fromkeys([*revisions, current])
        return {name: Window(revisions[name].window.start if name in revisions else 0) for name in names}
    if budgets.is_paused:
        return _Step(budgets, current, revisions).follow_scale() if revisions else {}
    step = _Step(budgets, current, {**revisions, current: revisions.get(current, unmade)})
    if budgets.new_limit is not None:
        return step.try_current(budgets.new_limit)
    step.shrink_current()
    step.move_displaced()
    step.retire_old()
    step.grow_serving_old()
    step.grow_current()
    return step.windows


def find_moves(
    budgets: Budgets, current: str, revisions: Mapping[str, RevisionPods], windows: Mapping[str, Window]
) -> list[tuple[str, int]]:
    """The (revision, ordinal) of displaced pods that are to be deleted now. `windows`: as decided.

    One at a time: what an end of a window can do without is taken there, and costs no successor.
    """
    names = windows.keys() & revisions.keys()
    if budgets.replaces_old:
        names &= {current}
    available = {
        (name, ordinal)
        for name in windows.keys() & revisions.keys()
        for ordinal in revisions[name].available - revisions[name].leaving
        if ordinal in windows[name]
    }
    displaced = [(name, n) for name in sorted(names) for n in sorted(revisions[name].displaced) if n in windows[name]]
    movable = [pod for pod in displaced if len(available - {pod}) >= budgets.num_desired]
    return movable[:1] if budgets.num_desired else []


class _Step:
    """One decision in the making: `windows` starts as what is asked for now and ends as what to ask for."""

    def __init__(self, budgets: Budgets, current: str, revisions: Mapping[str, RevisionPods]) -> None:
        self._budgets, self._current, self._revisions = budgets, current, revisions
        self.windows = {name: pods.trim() for name, pods in revisions.items()}
        self._old = [name for name in revisions if name != current]
        self._is_replaced: Container[str] = self._old if budgets.replaces_old else ()
        """Revisions whose ordinals the current one takes over."""
        self._movable = [current] if budgets.replaces_old else [*revisions]
        """Revisions whose displaced pods get successors."""

    # ---- counts

    def _num_available(self, name: str) -> int:
        return sum(ordinal in self.windows[name] for ordinal in self._revisions[name].available)

    def _total(self, names: list[str]) -> int:
        return sum(self.windows[name].replicas for name in names)

    @property
    def _spare_available(self) -> int:
        return sum(map(self._num_available, self.windows)) - self._budgets.min_available

    @property
    def _spare_old(self) -> int:
        """Old pods that could go if no pod that is not available now ever came back, but those of old revisions."""
        return self._total(self._old) + self._num_available(self._current) - self._budgets.min_available

    def _num_old_held(self) -> int:
        """Old pods that hold what they use. One taken away in this very step does; an unrecoverable one does not."""
        held = 0
        for name in self._old:
            pods, before = self._revisions[name], self._revisions[name].trim()
            unrecoverable = sum(ordinal in before for ordinal in pods.unrecoverable)
            held += max(before.replicas, self.windows[name].replicas) - unrecoverable + pods.num_draining
        return held

    def _num_displaced(self, names: list[str]) -> int:
        return sum(ordinal in self.windows[name] for name in names for ordinal in self._revisions[name].displaced)

    def _num_to_keep(self) -> int:
        """The pods desired, and one for each that is to be replaced, within the surge."""
        return self._budgets.num_desired + min(self._budgets.max_surge, self._num_displaced(self._movable))

    def _has_old(self) -> bool:
        """Whether old pods are there; those that are stuck, as on a dead node, are not waited for."""
        old = [self._revisions[name] for name in self._old]
        return self._total(self._old) > 0 or any(pods.trim().replicas or pods.num_draining for pods in old)

    # ---- taking away

    def shrink_current(self) -> None:
        """Takes current pods that are too many, or whose ordinals are too high where those have data."""
        if not self._budgets.keeps_ordinals:
            self.shrink([self._current], self._num_to_keep())
            return
        while self.windows[self._current].end > self._budgets.num_desired and self._total([self._current]):
            if not (self._take_waiting([self._current]) or self._take_available(self._current)):
                break

    def shrink(self, names: list[str], num_left: int) -> None:
        """Takes pods of these revisions, in this order, down to `num_left`: those that never served, those that do not
        serve, then those that do while enough are left."""
        while self._total(names) > num_left:
            if not (self._take_waiting(names) or any(map(self._take_available, names))):
                break

    def move_displaced(self) -> None:
        """Takes displaced pods at the ends of windows, once as many as desired are available without them."""
        for name in self._movable:
            while displaced := [ordinal for ordinal in self._ends(name) if ordinal in self._revisions[name].displaced]:
                is_available = displaced[0] in self._revisions[name].available
                if sum(map(self._num_available, self.windows)) - is_available < self._budgets.num_desired:
                    break
                self._take(name, displaced[0])

    def retire_old(self) -> None:
        """Takes old pods while the budgets allow it: first those that never served, last those that do."""
        while self._retire_one():
            pass

    def _retire_one(self) -> bool:
        if self._take_waiting(self._old, is_free=True):
            return True
        if self._spare_old > 0 and self._take_waiting(self._old):
            return True
        return any(map(self._take_available, self._old))

    def _take_waiting(self, names: list[str], is_free: bool = False) -> bool:
        """Takes a pod at an end that is not available, one that never served before others. `is_free`: only one that
        never served and does not come up."""
        found = []
        for place, name in enumerate(names):
            pods = self._revisions[name]
            for ordinal in self._ends(name):
                is_lost = ordinal in pods.unrecoverable and ordinal not in pods.served
                if ordinal not in pods.available and (is_lost or not is_free):
                    found.append((ordinal in pods.served, ordinal not in pods.displaced, place, -ordinal))
        if not found:
            return False
        _, _, place, ordinal = min(found)
        self._take(names[place], -ordinal)
        return True

    def _take_available(self, name: str) -> bool:
        """Takes a displaced pod, else the lowest, the longest there, so that the names above it stay free for new
        pods."""
        ends = self._ends(name)
        if self._spare_available <= 0 or not ends:
            return False
        self._take(name, min(ends, key=lambda ordinal: (ordinal not in self._revisions[name].displaced, ordinal)))
        return True

    def _ends(self, name: str) -> list[int]:
        window = self.windows[name]
        if self._budgets.keeps_ordinals and name not in self._is_replaced:
            return [window.end - 1] if window.replicas else []
        return sorted({window.start, window.end - 1}) if window.replicas else []

    def _take(self, name: str, ordinal: int) -> None:
        window = self.windows[name]
        start = window.start + 1 if ordinal == window.start and window.replicas > 1 else window.start
        self.windows[name] = Window(start, window.replicas - 1)

    # ---- adding

    def grow_serving_old(self) -> None:
        """While no pod of the current revision has ever served, pods that are lacking come from one that serves.

        Pods are lacking when more are desired than the rollout began with, or when old ones are gone.
        """
        serving = [name for name in self._old if self._num_available(name)]
        lacking = -self._spare_old
        if self._is_proven() or not serving or lacking <= 0:
            return
        self.shrink_unproven()
        room = self._budgets.max_total - self._num_old_held() - self.windows[self._current].replicas
        main = max(serving, key=self._num_available)
        self._add(main, min(lacking, room))

    def shrink_unproven(self) -> None:
        """Leaves the current revision, which never served, no more than its share of the budgets."""
        share = self._budgets.max_total - self._budgets.min_available
        while self.windows[self._current].replicas > share and self._take_waiting([self._current]):
            pass

    def _is_proven(self) -> bool:
        pods = self._revisions[self._current]
        return any(ordinal in pods.window for ordinal in pods.served | pods.available)

    def grow_current(self) -> None:
        """Adds current pods as far as the surge allows, or once the old ones are gone."""
        if self._budgets.ends_old_first and self._has_old():
            return
        window, num_desired = self.windows[self._current], self._budgets.num_desired
        room = self._budgets.max_total - self._num_old_held() - window.replicas
        num_right = (
            sum(ordinal < num_desired for ordinal in window)
            if self._budgets.keeps_ordinals
            else window.replicas - self._num_displaced([self._current])
        )
        self._add(self._current, min(room, num_desired - num_right))

    def _add(self, name: str, count: int) -> None:
        """Adds pods where their names are free, if they are anywhere; where ordinals have data, below all others."""
        keeps, displaced = self._budgets.keeps_ordinals, self._revisions[name].displaced
        leaving = self._revisions[name].leaving if not keeps else frozenset()
        for _ in range(count):
            window = self.windows[name]
            if window.replicas == 0:
                window = Window(max(leaving, default=-1) + 1)
            is_better_below = window.end in leaving or (window.end - 1 in displaced and window.start not in displaced)
            is_below = window.start > 0 and (keeps or (is_better_below and window.start - 1 not in leaving))
            self.windows[name] = Window(window.start - is_below, window.replicas + 1)

    # ---- a canary

    def try_current(self, limit: int) -> dict[str, Window]:
        """Gives the current revision up to `limit` pods beside the others, which go on as if it were not there: but one
        that serves stays if it is needed."""
        self.shrink([self._current], limit)
        self.move_displaced()
        newest_first = list(reversed(self._old))
        self.shrink(sorted(newest_first, key=self._num_available), self._budgets.num_desired)
        serving = [name for name in self._old if self._num_available(name)]
        room = self._budgets.max_total - self._num_old_held() - self.windows[self._current].replicas
        if serving:
            lacking = self._budgets.num_desired + self._num_displaced(self._old) - self._total(self._old)
            lacking -= self._num_available(self._current) if limit else 0
            self._add(max(serving, key=self._num_available), min(lacking, room))
            room -= max(0, min(lacking, room))
        self._add(self._current, min(limit - self.windows[self._current].replicas, room))
        return self.windows

    # ---- paused

    def follow_scale(self) -> dict[str, Window]:
        """A paused rollout only follows a change of the desired number, in the revision that serves most."""
        self.move_displaced()
        names = sorted(self.windows, key=lambda name: (self._num_available(name), self.windows[name].replicas))
        self._add(names[-1], self._num_to_keep() - self._total(names))
        limit = self._num_to_keep() if len(names) == 1 else self._budgets.max_total
        self.shrink(names, limit)
        return self.windows
