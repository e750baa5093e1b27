"""The strategies of a rollout, as budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toka_operator.failures import Failure
from toka_operator.observed import Observed, PodView
from toka_operator.plan import find_budgets, find_surge_fallback

from tests.unit.operator.examples import NOW, pod, valid


@pytest.mark.parametrize(
    ("rollout", "surge", "unavailable", "ends_old_first"),
    [
        ({}, 1, 0, False),
        ({"maxSurge": 2, "maxUnavailable": 1}, 2, 1, False),
        ({"strategy": "InPlace"}, 0, 1, False),
        ({"strategy": "InPlace", "maxSurge": 0, "maxUnavailable": 2}, 0, 2, False),
        ({"strategy": "Recreate"}, 0, 3, True),
    ],
)
def test_a_strategy_is_a_budget(rollout: dict[str, Any], surge: int, unavailable: int, ends_old_first: bool) -> None:
    budgets = find_budgets(valid(replicas=3, rollout=rollout), Observed({}, (), frozenset()), NOW)
    assert (budgets.max_surge, budgets.max_unavailable, budgets.ends_old_first) == (surge, unavailable, ends_old_first)


def waiting_pod(revision: str, since: float, reason: str = "Unschedulable") -> PodView:
    return replace(pod(revision), failure=Failure("chat", "", reason, "no node", since=since))


def test_a_surge_falls_back_once_it_waited_for_room_as_long_as_asked() -> None:
    old, new = valid(replicas=2), valid(replicas=2, rollout={"surgeFallbackSeconds": 60}, engine={"pageSize": 8})
    serving = (pod(old.revision, 0, is_available=True), pod(old.revision, 1, is_available=True))
    blocked = Observed({}, (*serving, waiting_pod(new.revision, NOW - 50)), frozenset())
    assert find_surge_fallback(new, blocked) == NOW + 10
    assert find_budgets(new, blocked, NOW).max_surge == 1
    later = find_budgets(new, blocked, NOW + 11)
    assert (later.max_surge, later.max_unavailable) == (0, 1)
    for others in (
        (*serving, waiting_pod(new.revision, NOW - 500, "ClaimPending")),
        (*serving, pod(new.revision)),
        (waiting_pod(new.revision, NOW - 500),),
        (*serving, waiting_pod(old.revision, NOW - 500)),
    ):
        assert find_surge_fallback(new, Observed({}, others, frozenset())) is None
    assert find_surge_fallback(valid(engine={"pageSize": 8}), blocked) is None
