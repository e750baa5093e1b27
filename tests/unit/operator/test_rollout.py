"""The rollout's budgets hold in any order of events, and every rollout ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toka_operator.rollout import Budgets, RevisionPods, decide_replicas


def pods(replicas: int, available: int = 0, hopeless: int = 0, draining: int = 0) -> RevisionPods:
    """The lowest ordinals are available, the highest hopeless."""
    return RevisionPods(
        replicas, frozenset(range(available)), frozenset(range(replicas - hopeless, replicas)), draining
    )


def test_the_first_revision_comes_up_at_once() -> None:
    assert decide_replicas(Budgets(3, 1, 0), "a", {}) == {"a": 3}


def test_a_new_revision_comes_up_by_max_surge_before_an_old_pod_goes() -> None:
    assert decide_replicas(Budgets(3, 1, 0), "b", {"a": pods(3, 3)}) == {"a": 3, "b": 1}


def test_an_old_pod_goes_once_a_new_one_is_available() -> None:
    both = {"a": pods(3, 3), "b": pods(1, 1)}
    assert decide_replicas(Budgets(3, 1, 0), "b", both) == {"a": 2, "b": 1}


def test_a_pod_that_drains_still_counts_as_surge() -> None:
    both = {"a": pods(2, 2, draining=1), "b": pods(1, 1)}
    assert decide_replicas(Budgets(3, 1, 0), "b", both) == {"a": 2, "b": 1}


def test_without_surge_an_old_pod_goes_first() -> None:
    assert decide_replicas(Budgets(2, 0, 1), "b", {"a": pods(2, 2)}) == {"a": 1, "b": 0}
    assert decide_replicas(Budgets(2, 0, 1), "b", {"a": pods(1, 1), "b": pods(0)}) == {"a": 1, "b": 1}


def test_a_third_revision_replaces_the_second_before_the_first() -> None:
    both = {"a": pods(2, 2), "b": pods(1)}
    assert decide_replicas(Budgets(2, 1, 0), "c", both)["b"] == 0
    assert decide_replicas(Budgets(2, 1, 0), "c", both)["a"] == 2


def test_going_back_scales_the_old_revision_up_again() -> None:
    both = {"a": pods(1, 1), "b": pods(2, 1)}
    assert decide_replicas(Budgets(2, 1, 0), "a", both) == {"a": 1, "b": 1}
    assert decide_replicas(Budgets(2, 1, 0), "a", {"a": pods(1, 1), "b": pods(1, 1)}) == {"a": 2, "b": 1}


def test_an_old_pod_that_restarts_is_kept_until_a_new_one_serves_in_its_place() -> None:
    both = {"a": pods(2, 1), "b": pods(1, 0)}
    assert decide_replicas(Budgets(2, 1, 0), "b", both) == {"a": 2, "b": 1}
    assert decide_replicas(Budgets(2, 1, 0), "b", {"a": pods(2, 1), "b": pods(1, 1)})["a"] == 1


def test_old_pods_that_never_come_up_are_taken_away_at_once() -> None:
    both = {"a": pods(2, 0, hopeless=2)}
    assert decide_replicas(Budgets(2, 1, 0), "b", both)["a"] == 0


def test_a_dead_old_pod_below_an_available_one_blocks_nothing() -> None:
    old = RevisionPods(3, frozenset({1, 2}), frozenset({0}))
    assert decide_replicas(Budgets(3, 1, 0), "b", {"a": old, "b": pods(1, 1)}) == {"a": 3, "b": 2}


def test_nothing_is_wanted_while_suspended() -> None:
    assert decide_replicas(Budgets(0, 1, 0), "b", {"a": pods(3, 3)}) == {"a": 0, "b": 0}


def test_a_paused_rollout_keeps_what_is_there() -> None:
    both = {"a": pods(2, 2), "b": pods(1, 1)}
    assert decide_replicas(Budgets(2, 1, 0, is_paused=True), "b", both) == {"a": 2, "b": 1}
    assert decide_replicas(Budgets(2, 1, 0, is_paused=True), "a", {}) == {}


def test_a_paused_rollout_still_scales() -> None:
    both = {"a": pods(2, 2), "b": pods(1, 1)}
    assert decide_replicas(Budgets(5, 1, 0, is_paused=True), "b", both) == {"a": 4, "b": 1}
    assert sum(decide_replicas(Budgets(1, 1, 0, is_paused=True), "b", both).values()) == 2


@dataclass
class FakeSet:
    """What a StatefulSet and its pods do: surplus pods drain from the top, and may take long to go."""

    replicas: int = 0
    state: dict[int, str] = field(default_factory=dict)
    draining: int = 0

    def scale(self, replicas: int) -> None:
        for ordinal in [o for o in self.state if o >= replicas]:
            del self.state[ordinal]
            self.draining += 1
        self.replicas = replicas
        for ordinal in range(replicas):
            self.state.setdefault(ordinal, "starting")

    def view(self) -> RevisionPods:
        available = frozenset(o for o, s in self.state.items() if s == "available")
        hopeless = frozenset(o for o, s in self.state.items() if s == "hopeless")
        return RevisionPods(self.replicas, available, hopeless, self.draining)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Pods start, fail, recover and drain, and the user changes the mind, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, FakeSet] = {}
        self.current = "r0"
        self.budgets = Budgets(1, 1, 0)

    @initialize(wanted=st.integers(1, 4), budget=st.sampled_from([(1, 0), (0, 1), (2, 1), (1, 1), (3, 0)]))
    def begin(self, wanted: int, budget: tuple[int, int]) -> None:
        self.budgets = Budgets(wanted, *budget)

    @rule(number=st.integers(0, 4))
    def change_revision(self, number: int) -> None:
        self.current = f"r{number}"

    @rule(wanted=st.integers(1, 5))
    def change_wanted(self, wanted: int) -> None:
        self.budgets = Budgets(wanted, self.budgets.max_surge, self.budgets.max_unavailable)

    @precondition(lambda self: any(s.state for s in self.sets.values()))
    @rule(data=st.data(), state=st.sampled_from(["available", "available", "starting", "hopeless"]))
    def change_pod(self, data: st.DataObject, state: str) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, s in self.sets.items() if s.state)))
        ordinal = data.draw(st.sampled_from(sorted(self.sets[name].state)))
        self.sets[name].state[ordinal] = state

    @precondition(lambda self: any(s.draining for s in self.sets.values()))
    @rule(data=st.data())
    def finish_draining(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, s in self.sets.items() if s.draining)))
        self.sets[name].draining -= 1

    @rule()
    def step(self) -> None:
        self._step()

    def _num_available(self) -> int:
        return sum(s.view().num_available() for s in self.sets.values())

    def _step(self) -> bool:
        """One decision, checked and carried out; whether it changed anything."""
        views = {name: s.view() for name, s in self.sets.items()}
        before, current_before = self._num_available(), self.sets.get(self.current, FakeSet()).replicas
        is_scale_down = current_before > self.budgets.num_wanted
        targets = decide_replicas(self.budgets, self.current, views)
        self._check_total(views, targets)
        is_changed = any(self.sets.get(n, FakeSet(-1)).replicas != t for n, t in targets.items())
        for name, target in targets.items():
            self.sets.setdefault(name, FakeSet()).scale(target)
        if not is_scale_down:
            assert self._num_available() >= min(before, self.budgets.min_available)
        return is_changed

    def _check_total(self, views: dict[str, RevisionPods], targets: dict[str, int]) -> None:
        grown = {n: t for n, t in targets.items() if t > views.get(n, pods(0)).replicas}
        assert set(grown) <= {self.current}, "only the current revision grows"
        if grown:
            old = [v for n, v in views.items() if n != self.current]
            asked = sum(v.replicas - v.num_hopeless() + v.num_draining for v in old)
            assert asked + targets[self.current] <= self.budgets.max_total

    @invariant()
    def nobody_has_a_negative_number_of_pods(self) -> None:
        assert all(s.replicas >= 0 for s in self.sets.values())

    def teardown(self) -> None:
        """Left alone, with pods that come up and go, every rollout ends."""
        for _ in range(200):
            is_changed = self._step()
            for fake in self.sets.values():
                fake.draining = 0
                fake.state = dict.fromkeys(fake.state, "available")
            if not is_changed and not self._step():
                break
        sizes = {name: s.replicas for name, s in self.sets.items() if s.replicas}
        assert sizes == {self.current: self.budgets.num_wanted}


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_a_rollout_whose_new_pods_never_come_up_keeps_the_old_ones(wanted: int, surge: int, down: int) -> None:
    if surge + down == 0:
        surge = 1
    budgets = Budgets(wanted, surge, down)
    old, new = FakeSet(), FakeSet()
    old.scale(wanted)
    old.state = dict.fromkeys(old.state, "available")
    for _ in range(50):
        targets = decide_replicas(budgets, "b", {"a": old.view(), "b": new.view()})
        old.scale(targets["a"])
        new.scale(targets["b"])
        old.draining = 0
    assert len(old.view().available) >= budgets.min_available
    assert new.replicas <= surge + down


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_a_decision_is_stable_once_the_rollout_is_over(wanted: int) -> None:
    done = {"b": pods(wanted, wanted)}
    assert decide_replicas(Budgets(wanted, 1, 0), "b", done) == {"b": wanted}
