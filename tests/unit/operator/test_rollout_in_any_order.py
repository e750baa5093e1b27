"""The rollout's promises in any order of events, and that every rollout ends.

`TOKA_ROLLOUT_EXAMPLES=20000` tries as many orders (about ten minutes); by default there are a few hundred.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from toka_operator.rollout import Budgets, RevisionPods, Window, decide_windows, find_moves

NUM_EXAMPLES = int(os.environ.get("TOKA_ROLLOUT_EXAMPLES", "300"))
BUDGETS = [(1, 0), (0, 1), (2, 1), (1, 1), (3, 0)]
RECREATE = (0, 1000)
"""All old pods end before new ones come."""


@dataclass
class FakePod:
    state: str = "starting"
    """starting, available, unready, unrecoverable or leaving."""
    has_served: bool = False
    is_displaced: bool = False
    """Whether its node is cordoned."""


@dataclass
class FakeSet:
    """A StatefulSet controller and its pods. It may lag behind what it is asked for."""

    asked: Window = field(default_factory=Window)
    keeps_ordinals: bool = False
    pods: dict[int, FakePod] = field(default_factory=dict)

    def act(self) -> None:
        """Pods outside the window are told to go; a pod is made where its name is free."""
        for ordinal, pod in self.pods.items():
            if ordinal not in self.asked:
                pod.state = "leaving"
        for ordinal in self.asked:
            self.pods.setdefault(ordinal, FakePod())

    def where(self, *wanted: str) -> frozenset[int]:
        return frozenset(ordinal for ordinal, pod in self.pods.items() if pod.state in wanted)

    def view(self) -> RevisionPods:
        here = frozenset(ordinal for ordinal in self.pods if ordinal in self.asked) - self.where("leaving")
        seen = RevisionPods(
            window=self.asked,
            available=self.where("available"),
            served=frozenset(ordinal for ordinal in here if self.pods[ordinal].has_served),
            displaced=frozenset(n for n in here if self.pods[n].is_displaced and not self.keeps_ordinals),
            unrecoverable=self.where("unrecoverable"),
            leaving=self.where("leaving"),
            keeps_ordinals=self.keeps_ordinals,
        )
        outside = [ordinal for ordinal in self.pods if ordinal not in seen.trim()]
        return RevisionPods(**{**{f: getattr(seen, f) for f in seen.__slots__}, "num_draining": len(outside)})


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Pods start, fail, recover, are evicted and drain, controllers lag, and the user changes everything."""

    keeps_ordinals = False

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, FakeSet] = {}
        self.current = "r0"
        self.new_limit: int | None = None
        self.budgets = self._budget(1, 1, 0)

    def _budget(self, desired: int, surge: int, unavailable: int, is_paused: bool = False) -> Budgets:
        ends_old_first = (surge, unavailable) == RECREATE
        new_limit = self.new_limit if surge and not ends_old_first else None
        return Budgets(desired, surge, unavailable, is_paused, self.keeps_ordinals, ends_old_first, new_limit)

    @initialize(desired=st.integers(1, 4), budget=st.sampled_from(BUDGETS))
    def begin(self, desired: int, budget: tuple[int, int]) -> None:
        self.budgets = self._budget(desired, *budget)

    @rule(number=st.integers(0, 4))
    def change_revision(self, number: int) -> None:
        self.current = f"r{number}"

    @rule(desired=st.integers(0, 5), is_paused=st.sampled_from([False, False, True]))
    def change_scale(self, desired: int, is_paused: bool) -> None:
        self.budgets = self._budget(desired, self.budgets.max_surge, self.budgets.max_unavailable, is_paused)

    @rule(new_limit=st.sampled_from([None, 0, 1, 1]))
    def a_canary_is_tried_or_judged(self, new_limit: int | None) -> None:
        self.new_limit = new_limit
        budgets = self.budgets
        self.budgets = self._budget(budgets.num_desired, budgets.max_surge, budgets.max_unavailable, budgets.is_paused)

    @rule(budget=st.sampled_from([*BUDGETS, RECREATE]))
    def change_budgets(self, budget: tuple[int, int]) -> None:
        self.budgets = self._budget(self.budgets.num_desired, *budget, self.budgets.is_paused)

    @precondition(lambda self: any(s.pods for s in self.sets.values()))
    @rule(
        data=st.data(), state=st.sampled_from(["available", "available", "unready", "unrecoverable", "leaving", "gone"])
    )
    def change_pod(self, data: st.DataObject, state: str) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, s in self.sets.items() if s.pods)))
        ordinal = data.draw(st.sampled_from(sorted(self.sets[name].pods)))
        pod = self.sets[name].pods[ordinal]
        if state == "gone":
            del self.sets[name].pods[ordinal]
        elif pod.state != "leaving":
            pod.state = state
            pod.has_served |= state in ("available", "unready")

    @rule()
    def a_node_dies(self) -> None:
        """Every other pod is unready for long, and some are told to go."""
        pods = [pod for s in self.sets.values() for _, pod in sorted(s.pods.items())]
        for number, pod in enumerate(pods[::2]):
            if pod.state != "leaving":
                pod.state = "leaving" if number % 2 else "unrecoverable"

    @rule(number=st.integers(0, 2))
    def a_node_is_cordoned(self, number: int) -> None:
        """Every third pod is on it."""
        for pod in [pod for s in self.sets.values() for _, pod in sorted(s.pods.items())][number::3]:
            pod.is_displaced = True

    @rule()
    def nodes_are_uncordoned(self) -> None:
        for pod in [pod for s in self.sets.values() for pod in s.pods.values()]:
            pod.is_displaced = False

    @precondition(lambda self: self.sets)
    @rule(data=st.data())
    def a_controller_acts(self, data: st.DataObject) -> None:
        self.sets[data.draw(st.sampled_from(sorted(self.sets)))].act()

    @rule()
    def step(self) -> None:
        self._step()

    def _step(self) -> bool:
        """One decision, checked and carried out; whether it changed anything."""
        views = {name: s.view() for name, s in self.sets.items()}
        windows = decide_windows(self.budgets, self.current, views)
        if self.budgets.num_desired:
            self._check_available(views, windows)
            self._check_served(views, windows)
            self._check_total(views, windows)
            self._check_recreated(views, windows)
            self._check_canary(views, windows)
        is_changed = any(self.sets.get(n, FakeSet(Window(-1))).asked != w for n, w in windows.items())
        for name, window in windows.items():
            assert window.start >= 0 <= window.replicas
            self.sets.setdefault(name, FakeSet(keeps_ordinals=self.keeps_ordinals)).asked = window
        return self._move(views, windows) or is_changed

    def _move(self, views: dict[str, RevisionPods], windows: dict[str, Window]) -> bool:
        """Deletes the displaced pods that are to go, of which none may leave fewer than desired."""
        moves = find_moves(self.budgets, self.current, views, windows)
        for name, ordinal in moves:
            assert ordinal in views[name].displaced & frozenset(windows[name])
            self.sets[name].pods[ordinal].state = "leaving"
        left = sum(s.pods[n].state == "available" for s in self.sets.values() for n in s.pods if n in s.asked)
        assert not moves or left >= self.budgets.num_desired, (views, windows, moves)
        return bool(moves)

    def _check_available(self, views: dict[str, RevisionPods], windows: dict[str, Window]) -> None:
        """No available pod goes, but with enough of them left."""
        before = sum(ordinal in v.window for v in views.values() for ordinal in v.available)
        left = sum(ordinal in windows[name] for name, v in views.items() for ordinal in v.available)
        assert left >= min(before, self.budgets.min_available), (views, windows)

    def _check_served(self, views: dict[str, RevisionPods], windows: dict[str, Window]) -> None:
        """No old pod that served goes, but with enough left of old ones and of new ones that are available."""
        old = {name: v for name, v in views.items() if name != self.current}
        if all(ordinal in windows[name] for name, v in old.items() for ordinal in v.served & frozenset(v.trim())):
            return
        new = views.get(self.current, RevisionPods()).available
        left = sum(windows[name].replicas for name in old)
        left += sum(ordinal in windows.get(self.current, Window()) for ordinal in new)
        assert left >= self.budgets.min_available, (views, windows)

    def _check_total(self, views: dict[str, RevisionPods], windows: dict[str, Window]) -> None:
        """Growth keeps within the surge; unrecoverable pods do not count, nor current ones that leave."""
        trimmed = {name: v.trim() for name, v in views.items()}
        if self.budgets.is_paused or all(w.replicas <= trimmed.get(n, Window()).replicas for n, w in windows.items()):
            return
        held = windows[self.current].replicas
        for name in views.keys() - {self.current}:
            unrecoverable = sum(ordinal in trimmed[name] for ordinal in views[name].unrecoverable)
            held += max(trimmed[name].replicas, windows[name].replicas) - unrecoverable + views[name].num_draining
        assert held <= self.budgets.max_total, (views, windows)

    def _check_recreated(self, views: dict[str, RevisionPods], windows: dict[str, Window]) -> None:
        """No new pod is added while there is an old one, if those are to end first."""
        old = [s for name, s in self.sets.items() if name != self.current and (s.pods or s.asked.replicas)]
        if self.budgets.ends_old_first and not self.budgets.is_paused and old:
            before = views.get(self.current, RevisionPods()).trim()
            assert windows[self.current].replicas <= before.replicas, (views, windows)

    def _check_canary(self, views: dict[str, RevisionPods], windows: dict[str, Window]) -> None:
        """While a canary is tried no pod is added beside it, and no old pod replaced: those that are lacking come."""
        limit = self.budgets.new_limit
        if limit is None or self.budgets.is_paused:
            return
        before = views.get(self.current, RevisionPods()).trim()
        assert windows[self.current].replicas <= max(limit, before.replicas), (views, windows)
        old = [name for name in views if name != self.current]
        num_before = sum(views[name].trim().replicas for name in old)
        num_displaced = sum(n in views[name].trim() for name in old for n in views[name].displaced)
        num_left = sum(windows[name].replicas for name in old)
        assert num_left >= min(num_before, self.budgets.num_desired) - num_displaced, (views, windows)

    def teardown(self) -> None:
        """Left alone, with pods that come up and go, every rollout ends with just what is desired."""
        desired = max(1, self.budgets.num_desired)
        self.new_limit = None
        self.budgets = self._budget(desired, self.budgets.max_surge, self.budgets.max_unavailable)
        num_calm = 0
        for _ in range(200):
            num_calm = 0 if self._step() else num_calm + 1
            for fake in self.sets.values():
                fake.act()
                fake.pods = {
                    n: FakePod("available", True, p.is_displaced) for n, p in fake.pods.items() if p.state != "leaving"
                }
                fake.act()
            if num_calm == 3:  # by then what a controller made last is available, too
                break
        windows = {name: s.asked for name, s in self.sets.items() if s.asked.replicas}
        assert {name: window.replicas for name, window in windows.items()} == {self.current: desired}
        left = [pod for pod in self.sets[self.current].pods.values() if pod.is_displaced]
        assert not left or self.budgets.max_surge == 0 or self.keeps_ordinals
        if self.keeps_ordinals:
            assert windows[self.current].start == 0


class WhereOrdinalsHaveData(AnyOrderOfEvents):
    """The same promises; and in the end the pods are those from ordinal 0 on."""

    keeps_ordinals = True


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=NUM_EXAMPLES, stateful_step_count=40, deadline=None)
TestWhereOrdinalsHaveData = WhereOrdinalsHaveData.TestCase
TestWhereOrdinalsHaveData.settings = settings(max_examples=NUM_EXAMPLES, stateful_step_count=40, deadline=None)
