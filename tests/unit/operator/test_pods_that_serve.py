"""Pods that serve are not given away: plans over pods as the API server shows them."""

from __future__ import annotations

from typing import Any

import pytest
from toka_operator.observed import Observed, PodView, is_adoptable, view_pod
from toka_operator.plan import Plan, make_plan
from toka_operator.rollout import Window
from toka_operator.settings import Settings
from toka_operator.spec import TokaDeploymentSpec
from toka_operator.times import format_time

from tests.unit.operator.examples import IMAGE, NOW, OWNER, live, plan_for, seen, valid

LONG_AGO = NOW - 86400


def a_pod(
    spec: TokaDeploymentSpec,
    ordinal: int = 0,
    *,
    ready: bool = True,
    changed_s: float = 3600,
    served: bool = True,
    restarts: int = 0,
    deleted_s: float | None = None,
    node_lost: bool = False,
) -> PodView:
    """A pod a day old. `changed_s`: how long ago it became (un)ready; `deleted_s`: how long ago its grace was over."""
    name = f"chat-{spec.revision}-{ordinal}"
    word = "True" if ready else "False"
    changed = NOW - changed_s if served else LONG_AGO
    conditions = [
        {"type": "Ready", "status": word, "lastTransitionTime": format_time(changed)},
        {"type": "ContainersReady", "status": "True" if node_lost else word},
    ]
    failed = {"lastState": {"terminated": {"exitCode": 1, "message": "died"}}} if restarts else {}
    engine = {"name": "engine", "restartCount": restarts, "state": {"running": {}}, **failed}
    metadata: dict[str, Any] = {"name": name, "uid": f"uid-{name}", "labels": {"toka.dev/revision": spec.revision}}
    if deleted_s is not None:
        metadata["deletionTimestamp"] = format_time(NOW - deleted_s)
    status = {"startTime": format_time(LONG_AGO), "conditions": conditions, "containerStatuses": [engine]}
    return view_pod({"metadata": metadata, "status": status}, frozenset([name] if ready else []))


def plan_at(spec: TokaDeploymentSpec, observed: Observed, now: float = NOW) -> Plan:
    return make_plan(OWNER, spec, observed, Settings(engine_image=IMAGE), now)


def both_sets(old: TokaDeploymentSpec, new: TokaDeploymentSpec, *pods: PodView) -> Observed:
    """The sets of an old revision with all its pods and of a new one with its surge pod."""
    begun = seen(plan_for(new, seen(plan_for(old), tuple(p for p in pods if p.revision == old.revision))), pods)
    return Observed({**seen(plan_for(old)).children, **begun.children}, pods, frozenset())


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("restarts", [0, 5])
def test_a_stuck_rollout_keeps_old_pods_that_are_unready_for_long(replicas: int, restarts: int) -> None:
    old, new = valid(replicas=replicas), valid(replicas=replicas, engine={"pageSize": 8})
    pods = [a_pod(old, n, ready=False, changed_s=3600, restarts=restarts) for n in range(replicas)]
    pods.append(a_pod(new, ready=False, served=False))
    assert plan_at(new, both_sets(old, new, *pods)).targets[old.revision].replicas == replicas


def test_old_pods_that_never_were_ready_go_at_once() -> None:
    old, new = valid(replicas=2), valid(replicas=2, engine={"pageSize": 8})
    pods = [a_pod(old, n, ready=False, served=False) for n in range(2)]
    assert plan_at(new, both_sets(old, new, *pods)).targets[old.revision].replicas == 0


def test_scaling_down_keeps_the_pod_that_serves_whatever_its_number() -> None:
    spec = valid(replicas=2)
    observed = seen(plan_for(spec), (a_pod(spec, 0, ready=False), a_pod(spec, 1)))
    (window,) = plan_at(valid(replicas=1), observed).targets.values()
    assert window == Window(1, 1)


@pytest.mark.parametrize("label", ["toka.dev/revision", "app.kubernetes.io/instance", "app.kubernetes.io/component"])
def test_a_label_of_a_child_edited_by_hand_moves_no_pod(label: str) -> None:
    spec = valid(replicas=3)
    observed = seen(plan_for(spec), tuple(a_pod(spec, n) for n in range(3)))
    for child in observed.children.values():
        child["metadata"]["labels"] = {**child["metadata"]["labels"], label: "x"}
    plan = plan_at(spec, observed)
    assert plan.targets == {spec.revision: Window(0, 3)}
    assert (plan.deletions, plan.desired) == ((), plan_for(spec).desired)


def test_a_pod_of_a_lost_node_is_deleted_for_good_and_replaced_at_once() -> None:
    spec = valid(replicas=2)
    dead = a_pod(spec, 0, ready=False, changed_s=30, deleted_s=-100, node_lost=True)
    plan = plan_at(spec, seen(plan_for(spec), (dead, a_pod(spec, 1))))
    assert plan.dead_pods == ((dead.name, dead.uid),)
    assert plan.targets == {spec.revision: Window(1, 2)}


@pytest.mark.parametrize(
    ("pod", "dead_in_s"),
    [
        ({"deleted_s": 31}, 0.0),
        ({"deleted_s": 29}, 1.0),
        ({"deleted_s": -100}, 130.0),
        ({"deleted_s": -100, "node_lost": True, "changed_s": 4}, 6.0),
        ({"node_lost": True}, None),
        ({}, None),
    ],
    ids=["long overdue", "just over", "still draining", "node just lost", "not told to go", "unready"],
)
def test_a_pod_is_deleted_for_good_only_if_nobody_else_will_end_it(
    pod: dict[str, Any], dead_in_s: float | None
) -> None:
    spec = valid(replicas=1)
    observed = seen(plan_for(spec), (a_pod(spec, ready=False, **pod),))
    plan = plan_at(spec, observed)
    assert bool(plan.dead_pods) is (dead_in_s == 0.0)
    if dead_in_s:
        assert plan.requeue_s is not None
        assert dead_in_s < plan.requeue_s <= dead_in_s + 0.1
        assert plan_at(spec, observed, NOW + plan.requeue_s).dead_pods
    else:
        assert plan_at(spec, observed, NOW + 86400).dead_pods == plan.dead_pods


def test_the_pods_of_a_predecessor_that_drain_do_not_hold_back_new_ones() -> None:
    """Deleted and applied again: the new object's pods take other names than those that are still there."""
    spec = valid(replicas=2)
    others = frozenset(f"chat-{spec.revision}-{n}" for n in range(2))
    children = {("ServiceAccount", "chat"): live(plan_for(spec).desired[0])}
    plan = plan_at(spec, Observed(children, (), frozenset(), others))
    assert plan.targets == {spec.revision: Window(2, 2)}


def test_pods_whose_set_was_deleted_are_taken_over_as_they_are() -> None:
    """`kubectl delete statefulset --cascade=orphan`, of the current and of an old revision."""
    old, new = valid(replicas=2), valid(replicas=2, engine={"pageSize": 8})
    pods = (a_pod(old, 4), a_pod(old, 5), a_pod(new, 1, ready=False, served=False))
    everything = both_sets(old, new, *pods)
    children = {key: child for key, child in everything.children.items() if key[0] != "StatefulSet"}
    targets = plan_at(new, Observed(children, pods, frozenset())).targets
    assert targets == {old.revision: Window(4, 2), new.revision: Window(1, 1)}


def test_a_pod_that_lost_its_label_and_its_set_is_in_the_way_of_its_successor() -> None:
    raw = {"metadata": {"name": "chat-r-0", "labels": {"toka.dev/revision": "r"}}}
    assert is_adoptable(raw, "chat")
    assert not is_adoptable(raw, "other")
    assert not is_adoptable({"metadata": {"name": "chat-r-0", "labels": {"toka.dev/revision": "x"}}}, "chat")
    owned = {"name": "chat-r-0", "labels": {"toka.dev/revision": "r"}, "ownerReferences": [{"uid": "other"}]}
    assert not is_adoptable({"metadata": owned}, "chat")
    spec = valid(replicas=1)
    observed = seen(plan_for(spec))
    others = frozenset([f"chat-{spec.revision}-0"])
    assert plan_at(spec, Observed(observed.children, (), frozenset(), others)).targets == {spec.revision: Window(1, 1)}
