"""Which children there should be, and what the status says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toka_operator.conditions import Outcome
from toka_operator.errors import FieldError
from toka_operator.observed import Observed, PodView, view_pod
from toka_operator.status import (
    build_invalid_status,
    build_status,
    find_batching_delay_s,
    find_events,
    find_next_moment_s,
)
from toka_operator.times import format_time

from tests.unit.operator.examples import NOW, OWNER, child, engine_status, live, plan_for, pod, seen, valid


def status_of(spec: Any, observed: Observed, previous: dict[str, Any] | None = None, now: float = NOW) -> Any:
    plan = plan_for(spec, observed)
    return build_status(OWNER, spec, observed, plan, Outcome(), previous or {}, now)


def condition(status: dict[str, Any], kind: str) -> tuple[str, str]:
    (found,) = [c for c in status["conditions"] if c["type"] == kind]
    return found["status"], found["reason"]


def test_the_same_plan_twice_is_the_same() -> None:
    spec = valid(replicas=2)
    first = plan_for(spec)
    assert plan_for(spec, seen(first)).desired == first.desired


def test_a_newer_operators_image_changes_no_stored_revision() -> None:
    spec = valid()
    observed = seen(plan_for(spec, image="engine:1"))
    again = plan_for(spec, observed, image="engine:2")
    assert child(again, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]["image"] == "engine:1"


def test_a_revision_whose_memory_was_deleted_is_remembered_from_its_pods_owner() -> None:
    spec = valid()
    observed = seen(plan_for(spec, image="engine:1"))
    children = {k: v for k, v in observed.children.items() if k[0] != "ControllerRevision"}
    again = plan_for(spec, Observed(children, (), frozenset()), image="engine:2")
    template = child(again, "ControllerRevision")["data"]["template"]
    assert template["spec"]["containers"][0]["image"] == "engine:1"


def test_a_new_image_reaches_a_new_revision() -> None:
    spec, other = valid(), valid(engine={"pageSize": 8})
    observed = seen(plan_for(spec, image="engine:1"))
    again = plan_for(other, observed, image="engine:2")
    images = {
        s["metadata"]["labels"]["toka.dev/revision"]: s["spec"]["template"]["spec"]["containers"][0]["image"]
        for s in again.desired
        if s["kind"] == "StatefulSet"
    }
    assert images == {spec.revision: "engine:1", other.revision: "engine:2"}


def test_one_replica_has_no_disruption_budget() -> None:
    kinds = [c["kind"] for c in plan_for(valid(replicas=1)).desired]
    assert "PodDisruptionBudget" not in kinds
    observed = seen(plan_for(valid(replicas=2)))
    deletions = plan_for(valid(replicas=1), observed).deletions
    assert [(kind, name) for kind, name, _ in deletions] == [("PodDisruptionBudget", "chat")]


def test_an_empty_old_set_goes_and_its_revision_stays_in_the_history() -> None:
    spec, other = valid(suspend=True), valid(engine={"pageSize": 8}, suspend=True)
    observed = seen(plan_for(spec))
    name = f"chat-{spec.revision}"
    old = observed.children[("StatefulSet", name)]
    old["status"] = {"replicas": 0, "observedGeneration": 1}
    plan = plan_for(other, observed)
    assert [(kind, n) for kind, n, _ in plan.deletions] == [("StatefulSet", name)]


@pytest.mark.parametrize("sizes", [(8, 16), (16, 8)])
def test_of_two_old_revisions_the_older_one_goes_first_whatever_they_are_called(sizes: tuple[int, int]) -> None:
    older, old = (valid(replicas=2, engine={"pageSize": size}) for size in sizes)
    new = valid(replicas=2)
    children: dict[tuple[str, str], Any] = {}
    pods = tuple(pod(spec.revision, is_available=True) for spec in (older, old, new))
    for spec in (older, old, new):
        plan = plan_for(spec, Observed(children, pods, frozenset()))
        made = {(c["kind"], c["metadata"]["name"]): live(c) for c in plan.desired}
        children |= {key: child for key, child in made.items() if key not in children}
    for spec in (older, old, new):
        children["StatefulSet", f"chat-{spec.revision}"]["spec"]["replicas"] = 1
    targets = plan_for(new, Observed(children, pods, frozenset())).targets
    assert [targets[spec.revision].replicas for spec in (older, old)] == [0, 1]


def test_the_history_keeps_what_served_longer_than_edits_that_never_did() -> None:
    """Six edits in three seconds leave the last revision that served behind them."""
    specs = [
        valid(engine={"pageSize": size}, rollout={"revisionHistoryLimit": 3}) for size in (8, 16, 32, 64, 128, 256)
    ]
    good, *edits, newest = specs
    children: dict[tuple[str, str], Any] = {}
    for spec in specs:
        plan = plan_for(spec, Observed(children, (pod(good.revision, is_available=True),), frozenset()))
        children |= {(c["kind"], c["metadata"]["name"]): live(c) for c in plan.desired}
    for spec in (good, *edits):  # their sets go when the newest one serves
        children.pop(("StatefulSet", f"chat-{spec.revision}"), None)
    found = plan_for(newest, Observed(children, (pod(newest.revision, is_available=True),), frozenset()))
    gone = {name for kind, name, _ in found.deletions if kind == "ControllerRevision"}
    assert gone == {f"chat-{spec.revision}" for spec in edits[:2]}


def test_a_name_that_an_object_of_another_owner_holds_is_left_out_and_told() -> None:
    spec = valid()
    observed = Observed({}, (), frozenset({("Service", "chat")}))
    assert "Service" not in [c["kind"] for c in plan_for(spec, observed).desired]
    assert condition(status_of(spec, observed), "Degraded") == ("True", "NameTaken")


def test_a_pod_counts_once_it_was_ready_for_long_enough_and_has_an_endpoint() -> None:
    view = pod("r", is_available=True)
    assert view.is_available(view.ready_since + 5, 5)
    assert not view.is_available(view.ready_since + 4, 5)
    status = {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}
    assert not pod("r", status=status).is_available(NOW, 0), "without an endpoint no request reaches it"


def test_a_complete_rollout_is_ready() -> None:
    spec = valid(replicas=2)
    pods = (pod(spec.revision, 0, is_available=True), pod(spec.revision, 1, is_available=True))
    status = status_of(spec, seen(plan_for(spec), pods))
    assert condition(status, "Ready") == ("True", "AllAvailable")
    assert condition(status, "Progressing") == ("False", "Complete")
    assert (status["ready"], status["phase"], status["gpus"]) == ("2/2", "Running", 2)
    assert status_of(valid(replicas=2, parallelism={"data": 4}), seen(plan_for(spec), pods))["gpus"] == 8
    parallelism = {"tensor": 2, "pipeline": 2, "data": 2}
    assert status_of(valid(replicas=2, parallelism=parallelism), seen(plan_for(spec), pods))["gpus"] == 16
    on_cpus = valid(replicas=2, parallelism=parallelism, resources={"device": "cpu"})
    assert status_of(on_cpus, seen(plan_for(spec), pods))["gpus"] == 0


def test_a_status_built_from_the_same_facts_is_the_same() -> None:
    spec = valid()
    observed = seen(plan_for(spec), (pod(spec.revision, is_available=True),))
    first = status_of(spec, observed)
    assert status_of(spec, observed, first, NOW + 1000) == first


def test_no_progress_within_the_deadline_is_told() -> None:
    spec = valid(startup={"timeoutSeconds": 10}, rollout={"progressDeadlineSeconds": 60})
    observed = seen(plan_for(spec), (pod(spec.revision),))
    first = status_of(spec, observed)
    assert condition(status_of(spec, observed, first, NOW + 59), "Progressing") == ("True", "Scaling")
    late = status_of(spec, observed, first, NOW + 61)
    assert condition(late, "Progressing") == ("False", "ProgressDeadlineExceeded")


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("ImagePullFailed", engine_status(state={"waiting": {"reason": "ErrImagePull", "message": "no"}})),
        ("ModelAuthFailed", engine_status(lastState={"terminated": {"exitCode": 4, "message": "401"}})),
        ("OutOfMemory", engine_status(state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}})),
        ("CrashLoop", engine_status(state={"terminated": {"exitCode": 139}})),
        ("SecretMissing", engine_status(
            state={"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}})),
        ("Unschedulable", {"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}]}),
        ("SchedulingGated", {"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gated"}]}),
        ("ClaimPending", {"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
             "message": "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."}]}),
        ("ClaimMissing", {"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
             "message": '0/1 nodes: persistentvolumeclaim "w" not found'}]}),
    ],
)  # fmt: skip
def test_each_failure_of_a_pod_is_named(reason: str, status: dict[str, Any]) -> None:
    spec = valid()
    built = status_of(spec, seen(plan_for(spec), (pod(spec.revision, status=status),)))
    assert condition(built, "Degraded") == ("True", reason)
    assert [f["reason"] for f in built["failures"]] == [reason]


@pytest.mark.parametrize("reason", ["Unschedulable", "SchedulingGated"])
def test_waiting_for_a_node_is_no_failure_before_the_spec_says_so(reason: str) -> None:
    spec = valid(scheduling={"patienceSeconds": 200})
    waits = {"type": "PodScheduled", "status": "False", "reason": reason, "message": "0/1 nodes"}
    view = pod(spec.revision, status={"conditions": [{**waits, "lastTransitionTime": format_time(NOW)}]})
    observed = seen(plan_for(spec), (view,))
    waiting = status_of(spec, observed, now=NOW + 199)
    assert condition(waiting, "Degraded") == ("False", "AsExpected")
    assert (condition(waiting, "Progressing"), waiting["reason"]) == (("True", reason), reason)
    assert "0/1 nodes" in next(c["message"] for c in waiting["conditions"] if c["type"] == "Progressing")
    assert find_next_moment_s(spec, observed, waiting, NOW + 199) == pytest.approx(1.0, abs=0.1)
    late = status_of(spec, observed, now=NOW + 200)
    assert condition(late, "Degraded") == ("True", reason)


def test_a_pod_that_outlives_its_grace_period_is_told_until_it_is_gone() -> None:
    spec = valid(rollout={"stuckSeconds": 40})
    going = replace(pod(spec.revision), terminating_until=NOW)
    observed = seen(plan_for(spec), (going,))
    assert condition(status_of(spec, observed, now=NOW + 39), "Degraded") == ("False", "AsExpected")
    stuck = status_of(spec, observed, now=NOW + 41)
    assert condition(stuck, "Degraded") == ("True", "PodStuckTerminating")
    assert [f["pod"] for f in stuck["failures"]] == [going.name]


def test_a_container_that_ended_well_is_no_failure() -> None:
    ended = engine_status(state={"running": {}}, lastState={"terminated": {"exitCode": 0}})
    assert pod("r", status=ended).failure is None


def test_the_end_of_long_last_words_is_kept() -> None:
    words = "x" * 5000 + " out of disk"
    failure = pod("r", status=engine_status(state={"terminated": {"exitCode": 9, "message": words}})).failure
    assert failure is not None
    assert failure.message.endswith("out of disk")
    assert len(failure.message) <= 1024


def test_an_invalid_spec_names_every_field_and_is_not_ready() -> None:
    spec = valid()
    serving = seen(plan_for(spec), (pod(spec.revision, is_available=True),))
    before = status_of(spec, serving)
    errors = [FieldError("spec.a", "is bad"), FieldError("spec.b", "too")]
    status = build_invalid_status(OWNER, errors, serving, before, NOW)
    for kind, value in (("ConfigValid", "False"), ("Ready", "False"), ("Degraded", "True"), ("Progressing", "False")):
        assert condition(status, kind) == (value, "InvalidSpec")
    messages = {c["type"]: c["message"] for c in status["conditions"]}
    assert messages["ConfigValid"] == "spec.a: is bad; spec.b: too. Correct the fields that the message names."
    assert messages["Degraded"] == messages["ConfigValid"]
    assert [event.reason for event in find_events(before, status)] == ["InvalidSpec"]


def test_the_pods_of_an_invalid_spec_are_told_as_they_are() -> None:
    """They serve on, and nobody would learn of it when they do not."""
    spec = valid()
    plan = plan_for(spec)
    before = status_of(spec, seen(plan, (pod(spec.revision, is_available=True),)))
    errors = [FieldError("spec.a", "is bad")]
    serving = build_invalid_status(OWNER, errors, seen(plan, (pod(spec.revision, is_available=True),)), before, NOW)
    assert (serving["ready"], condition(serving, "Available")) == ("1/1", ("True", "MinimumAvailable"))
    failing = build_invalid_status(OWNER, errors, seen(plan, (pod(spec.revision),)), serving, NOW)
    assert (failing["ready"], condition(failing, "Available")) == ("0/1", ("False", "MinimumUnavailable"))
    assert (failing["replicas"], failing["readyReplicas"], failing["availableReplicas"]) == (1, 0, 0)
    assert [event.reason for event in find_events(serving, failing)] == ["Unavailable"]


def test_a_spec_that_is_valid_again_has_its_whole_deadline() -> None:
    """The administrator may have allowed what it asks for, so that its generation is the same."""
    spec = valid()
    observed = seen(plan_for(spec), (pod(spec.revision),))
    before = status_of(spec, observed)
    invalid = build_invalid_status(OWNER, [FieldError("spec.a", "is bad")], observed, before, NOW)
    late = NOW + 2 * spec.rollout.progress_deadline_s
    assert condition(status_of(spec, observed, invalid, now=late), "Degraded") == ("False", "AsExpected")


@pytest.mark.parametrize("edited", ["2016-12-31T23:59:60Z", "2026-01-01t00:00:00z", "0001-01-01T00:00:00Z", "soon", ""])
def test_a_time_of_the_status_that_was_edited_by_hand_ends_no_pass(edited: str) -> None:
    spec = valid()
    observed = seen(plan_for(spec), (pod(spec.revision),))
    before = {**status_of(spec, observed), "lastProgressTime": edited}
    assert condition(status_of(spec, observed, before), "Ready") == (
        "False",
        "ProgressDeadlineExceeded" if edited else "Scaling",
    )


def test_a_transition_is_told_once() -> None:
    spec = valid()
    plan = plan_for(spec)
    starting = status_of(spec, seen(plan, (pod(spec.revision),)))
    ready = status_of(spec, seen(plan, (pod(spec.revision, is_available=True),)), starting)
    assert [e.reason for e in find_events(starting, ready)] == ["Ready"]
    assert find_events(ready, ready) == []


def started_pod(revision: str, ordinal: int = 0, restarts: int = 0, ready_at: int = 50, **metadata: Any) -> PodView:
    """A pod made 60 s before NOW that got its node 2 s, its container 7 s and was ready `ready_at` s later."""

    def at(offset_s: int) -> str:
        return format_time(NOW - 60 + offset_s)

    conditions = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": at(2)},
        {"type": "Ready", "status": "True", "lastTransitionTime": at(ready_at)},
    ]
    engine = {"name": "engine", "restartCount": restarts, "state": {"running": {"startedAt": at(7)}}}
    name = f"chat-{revision}-{ordinal}"
    raw = {
        "metadata": {"name": name, "labels": {"toka.dev/revision": revision}, "creationTimestamp": at(0), **metadata},
        "status": {"conditions": conditions, "containerStatuses": [{"name": "log"}, engine]},
    }
    return view_pod(raw, frozenset([name]))


def test_how_the_first_ready_pod_came_up_is_told_and_stays_as_it_was() -> None:
    spec = valid(replicas=2)
    first, second = started_pod(spec.revision, 1), started_pod(spec.revision, 0, ready_at=55)
    status = status_of(spec, seen(plan_for(spec), (second, first)))
    expected = {"revision": spec.revision, "pod": first.name}
    assert status["startup"] == {**expected, "scheduleSeconds": 2, "startSeconds": 5, "loadSeconds": 43}
    later = status_of(spec, seen(plan_for(spec), (second,)), status, NOW + 1)
    assert later["startup"] == status["startup"]
    other = valid(replicas=2, engine={"pageSize": 8})
    assert "startup" not in status_of(other, seen(plan_for(other)), status)


@pytest.mark.parametrize(
    "pod",
    [
        started_pod("r", restarts=1),
        started_pod("r", ready_at=6),
        started_pod("r", creationTimestamp=None),
        started_pod("r", ready_at=29),
    ],
    ids=["restarted", "clocks differ", "no time", "ready too long ago to be the first time"],
)
def test_a_start_that_the_pods_times_do_not_tell_is_never_told(pod: PodView) -> None:
    spec = valid()
    status = status_of(spec, seen(plan_for(spec), (replace(pod, revision=spec.revision),)))
    assert status["startup"] == {"revision": spec.revision}
    again = seen(plan_for(spec), (started_pod(spec.revision),))
    assert status_of(spec, again, status)["startup"] == status["startup"], "it is ready again, it does not start"


def test_only_counts_of_something_under_way_may_be_told_later() -> None:
    spec = valid(replicas=3)
    plan = plan_for(spec)
    starting = status_of(spec, seen(plan))
    assert find_batching_delay_s({}, starting) > 0
    waiting = status_of(spec, seen(plan, tuple(pod(spec.revision, n) for n in range(3))), starting)
    one = pod(spec.revision, is_available=True)
    some = status_of(spec, seen(plan, (one, pod(spec.revision, 1), pod(spec.revision, 2))), waiting)
    assert find_batching_delay_s(starting, waiting) > find_batching_delay_s(waiting, some) > 0
    ready = tuple(pod(spec.revision, n, is_available=True) for n in range(3))
    failed = pod(spec.revision, status=engine_status(state={"waiting": {"reason": "ErrImagePull"}}))
    taken = Observed({}, (), frozenset({("Service", "chat")}))
    urgent = {
        "it is Ready": (some, status_of(spec, seen(plan, ready), some)),
        "it is Degraded": ({}, status_of(spec, seen(plan, (failed,)))),
        "a new spec was seen": (some, {**some, "observedGeneration": 2}),
        "nothing is under way": ({}, status_of(valid(suspend=True), seen(plan))),
        "a name is taken": ({}, status_of(spec, taken)),
    }
    assert {why: find_batching_delay_s(*pair) for why, pair in urgent.items()} == dict.fromkeys(urgent, 0.0)


def test_a_stored_child_is_seen_as_it_was_written() -> None:
    plan = plan_for(valid())
    assert live(child(plan, "Service"))["spec"] == child(plan, "Service")["spec"]
