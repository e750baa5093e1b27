"""Pods on cordoned nodes: who moves, and for how long an eviction of the only pod is held up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toka_operator.failures import Failure
from toka_operator.moves import find_displaced, find_hold_end, tolerates_cordon
from toka_operator.observed import Observed, PodView
from toka_operator.plan import Plan
from toka_operator.resources import POD_DISRUPTION_BUDGET
from toka_operator.spec import TokaDeploymentSpec

from tests.unit.operator.examples import NOW, child, plan_for, pod, seen, valid

CORDONED = frozenset(["old-node"])


def observed(spec: TokaDeploymentSpec, *coming: PodView, cordoned: frozenset[str] | None = CORDONED) -> Observed:
    """One pod that serves on a cordoned node, and others."""
    serving = replace(pod(spec.revision, is_available=True), node="old-node")
    return replace(seen(plan_for(spec), (serving, *coming)), cordoned=cordoned)


def successor(spec: TokaDeploymentSpec, age_s: float, reason: str = "", since: float = 0.0) -> PodView:
    failure = Failure("chat", "", reason, "words", since=since) if reason else None
    return replace(pod(spec.revision, 1), created_at=NOW - age_s, failure=failure)


def test_a_drain_waits_for_a_successor_of_an_older_revision_where_that_is_not_replaced() -> None:
    """It is not in a paused rollout, nor while a canary is tried or was bad: else a drain would be held for ever."""
    old, new = valid(), valid(engine={"pageSize": 32})
    coming = successor(old, 100)
    assert find_hold_end(new, observed(old), NOW) is None
    assert find_hold_end(new, observed(old, coming), NOW) == coming.created_at + new.rollout.progress_deadline_s


def has_budget(plan: Plan) -> bool:
    return any(c["kind"] == POD_DISRUPTION_BUDGET for c in plan.desired)


def test_an_only_pod_is_held_where_cordoned_nodes_are_seen_and_else_not() -> None:
    spec = valid()
    assert (
        child(plan_for(spec, observed(spec, cordoned=frozenset())), POD_DISRUPTION_BUDGET)["spec"]["minAvailable"] == 1
    )
    assert has_budget(plan_for(spec, observed(spec)))
    unseen = plan_for(spec, observed(spec, cordoned=None))
    assert not has_budget(unseen)
    assert unseen.targets[spec.revision].replicas == 1


@pytest.mark.parametrize(
    "other",
    [
        {"rollout": {"maxSurge": 0, "maxUnavailable": 1}},
        {"rollout": {"maxUnavailable": 1}},
        {"data": {"size": "1Gi"}},
        {"scheduling": {"tolerations": [{"operator": "Exists"}]}},
        {"disruption": {"podDisruptionBudget": "Off"}},
        {"suspend": True},
    ],
)
def test_an_only_pod_is_not_held_where_no_successor_would_come_or_none_is_asked_for(other: dict[str, Any]) -> None:
    spec = valid(**other)
    assert not has_budget(plan_for(spec, observed(spec)))


def test_a_drain_is_held_until_the_successor_found_no_room_for_too_long() -> None:
    spec = valid(scheduling={"patienceSeconds": 60})
    waiting = observed(spec, successor(spec, 50, "Unschedulable", NOW - 50))
    assert find_hold_end(spec, waiting, NOW) == NOW + 10
    assert has_budget(plan_for(spec, waiting))
    assert plan_for(spec, waiting).requeue_s == pytest.approx(10.01)
    late = observed(spec, successor(spec, 70, "Unschedulable", NOW - 70))
    assert not has_budget(plan_for(spec, late))
    (deletion,) = replace_budget(spec, late).deletions
    assert deletion[0] == POD_DISRUPTION_BUDGET


def replace_budget(spec: TokaDeploymentSpec, before: Observed) -> Plan:
    """The plan where the budget is still there."""
    budget = child(plan_for(spec, observed(spec)), POD_DISRUPTION_BUDGET)
    budget["metadata"]["uid"] = "uid-budget"
    name = budget["metadata"]["name"]
    return plan_for(spec, replace(before, children={**before.children, (POD_DISRUPTION_BUDGET, name): budget}))


def test_a_drain_is_held_for_a_successor_that_loads_but_not_beyond_the_deadline() -> None:
    spec = valid(rollout={"progressDeadlineSeconds": 2000})
    assert has_budget(plan_for(spec, observed(spec, successor(spec, 1990))))
    assert not has_budget(plan_for(spec, observed(spec, successor(spec, 2010))))
    assert not has_budget(plan_for(spec, observed(spec, successor(spec, 2010, "CrashLoop"))))
    claim = successor(spec, 10, "ClaimOnOneNode")
    assert find_hold_end(spec, observed(spec, claim), NOW) == NOW - 10 + 300


def test_a_successor_that_served_and_is_unready_for_a_moment_is_waited_for() -> None:
    spec = valid()
    blip = replace(successor(spec, 90_000), ready_since=NOW - 5, has_served=True)
    assert has_budget(plan_for(spec, observed(spec, blip)))


def test_a_drain_is_not_held_for_a_successor_that_may_not_be_made() -> None:
    spec = valid()
    refused = replace(observed(spec), missing_pods=(Failure("chat", "", "QuotaExceeded", "pods"),))
    assert not has_budget(plan_for(spec, refused))


def test_pods_that_go_already_are_not_displaced() -> None:
    spec = valid()
    going = replace(successor(spec, 10), node="old-node", terminating_until=NOW + 10)
    assert [pod.ordinal for pod in find_displaced(spec, observed(spec, going))] == [0]


@pytest.mark.parametrize(
    ("toleration", "tolerates"),
    [
        ({"operator": "Exists"}, True),
        ({"key": "node.kubernetes.io/unschedulable", "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": "node.kubernetes.io/unschedulable", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, False),
    ],
)
def test_pods_that_may_be_given_a_cordoned_node_stay(toleration: dict[str, Any], tolerates: bool) -> None:
    assert tolerates_cordon([toleration]) == tolerates
