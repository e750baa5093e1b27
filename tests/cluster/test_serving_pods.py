"""Pods that serve are not given away, and children are put back, against a real API server and its controllers."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.cluster.harness.kwok import NEVER_READY_ANNOTATION
from tests.cluster.operating import Json, Operator

NEVER_READY = {"podTemplate": {"annotations": {NEVER_READY_ANNOTATION: "true"}}}


def uids(operator: Operator, *names: str) -> dict[str, str]:
    """uid -> name of the pods that are not leaving."""
    pods = [p["metadata"] for p in operator.pods("chat") if "deletionTimestamp" not in p["metadata"]]
    return {pod["uid"]: pod["name"] for pod in pods if not names or pod["name"] in names}


def make_unready(operator: Operator, pod: str, ago_s: int = 90) -> None:
    """A pod that served has been unready for a while."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago_s))
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 7200))
    conditions = [{"type": t, "status": "False", "lastTransitionTime": since} for t in ("Ready", "ContainersReady")]
    operator.set_pod_status(pod, conditions=conditions, startTime=started)


def replicas_of(operator: Operator) -> dict[str, int]:
    return {revision: found["spec"]["replicas"] for revision, found in operator.sets("chat").items()}


def pass_over(operator: Operator) -> None:
    """Waits until the operator has seen everything so far: it has told of a change that came later."""
    now = str(time.time_ns())
    operator.patch("chat", service={"annotations": {"example.com/now": now}})

    def is_told() -> bool:
        return operator.require("service", "chat")["metadata"].get("annotations", {}).get("example.com/now") == now

    operator.wait_for(is_told, "the operator to have had a look")
    time.sleep(1.5)


def test_a_stuck_rollout_keeps_the_old_pods_though_they_are_unready_for_long(operator: Operator) -> None:
    operator.apply("chat", replicas=3)
    old = operator.wait_until_ready("chat")["status"]["currentRevision"]
    before = uids(operator)
    operator.patch("chat", **NEVER_READY)
    operator.wait_for(lambda: len(operator.pods("chat")) == 4, "one pod of the new revision")
    for name in before.values():
        make_unready(operator, name)
    pass_over(operator)
    assert replicas_of(operator)[old] == 3
    assert before.keys() <= uids(operator).keys()


def test_growth_during_a_stuck_rollout_goes_to_the_revision_that_serves(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    old = operator.wait_until_ready("chat")["status"]["currentRevision"]
    operator.patch("chat", **NEVER_READY)
    operator.wait_for(lambda: len(operator.pods("chat")) == 3, "one pod of the new revision")
    operator.patch("chat", replicas=5)
    operator.wait_for(lambda: replicas_of(operator)[old] == 5, "the old revision to grow")
    operator.wait_for_condition("chat", "Available", "True")
    assert sum(replicas_of(operator).values()) == 6


def test_scaling_down_takes_the_pod_that_does_not_serve(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    first, second = sorted(uids(operator).items(), key=lambda pod: pod[1])
    make_unready(operator, first[1])
    operator.patch("chat", replicas=1)
    operator.wait_until_ready("chat")
    operator.wait_for(lambda: uids(operator) == dict([second]), "the pod that serves to be left")


def test_a_paused_object_with_one_revision_scales_exactly(operator: Operator) -> None:
    operator.apply("chat", replicas=3, rollout={"paused": True})
    operator.patch("chat", rollout={"paused": False})
    operator.wait_until_ready("chat")
    operator.patch("chat", replicas=1, rollout={"paused": True})
    operator.wait_until_ready("chat")
    assert len(uids(operator)) == 1


@pytest.mark.parametrize("change", ["deleted by hand", "suspended and resumed", "deleted and applied again"])
def test_a_restart_waits_for_no_pod_that_still_drains(operator: Operator, change: str) -> None:
    operator.apply("chat", replicas=1)
    operator.wait_until_ready("chat")
    ((uid, name),) = uids(operator).items()
    operator.hold_pod(name)
    if change == "deleted by hand":
        operator.delete("pod", name)
    elif change == "suspended and resumed":
        operator.patch("chat", suspend=True)
        operator.wait_for(lambda: not uids(operator), "the pod to drain")
        operator.patch("chat", suspend=False)
    else:
        operator.delete_and_wait("td", "chat")
        operator.apply("chat", replicas=1)
    operator.wait_for(lambda: uids(operator).keys() - {uid}, "another pod")
    operator.wait_until_ready("chat")
    assert uid in {pod["metadata"]["uid"] for pod in operator.pods("chat")}, "it still drains"
    assert name not in uids(operator).values()
    operator.release_pod(name)
    operator.wait_for(lambda: len(operator.pods("chat")) == 1, "just one pod in the end")


def test_a_pod_of_a_lost_node_is_deleted_for_good_and_replaced(operator: Operator) -> None:
    operator.apply("chat", replicas=3)
    operator.wait_until_ready("chat")
    middle = sorted(uids(operator).values())[1]
    operator.keep_pod(middle)
    operator.lose_pod(middle)
    operator.wait_for(lambda: ("delete", "pods") in operator.requests(), "the pod to be deleted for good")
    operator.release_pod(middle)
    operator.wait_until_ready("chat")
    assert len(uids(operator)) == 3


def test_a_pod_that_was_taken_from_its_set_by_a_label_is_replaced(operator: Operator) -> None:
    """Its StatefulSet lets it go and cannot make another of that name; it goes on serving meanwhile."""
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    first = min(uids(operator).values())
    operator.edit("pod", first, {"metadata": {"labels": {"toka.dev/revision": "x"}}})
    operator.wait_for(lambda: len(uids(operator)) == 3, "another pod in its place")
    operator.wait_until_ready("chat")
    assert first in uids(operator).values()


def test_no_label_edited_by_hand_costs_a_pod(operator: Operator) -> None:
    operator.apply("chat", replicas=3)
    operator.wait_until_ready("chat")
    before = uids(operator)
    (revision,) = operator.sets("chat")
    children = {"statefulset": f"chat-{revision}", "controllerrevision": f"chat-{revision}"}
    children |= {"service": "chat", "pdb": "chat", "serviceaccount": "chat"}
    for kind, name in children.items():
        labels = operator.require(kind, name)["metadata"]["labels"]
        for label in labels:
            operator.edit(kind, name, {"metadata": {"labels": {label: "x"}}})
        operator.edit(kind, name, {"metadata": {"labels": dict.fromkeys(labels)}})

        def is_back(kind: str = kind, name: str = name, labels: Json = labels) -> bool:
            return bool(operator.require(kind, name)["metadata"].get("labels", {}).items() >= labels.items())

        operator.wait_for(is_back, f"the labels of {kind} {name}")
    operator.wait_until_ready("chat")
    assert uids(operator) == before
    operator.expected.append("event=name_taken")


def test_children_without_an_owner_are_adopted_with_their_pods(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    before = uids(operator)
    operator.delete_and_wait("td", "chat", "Orphan")
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")
    (revision,) = operator.sets("chat")
    owner = operator.require("td", "chat")["metadata"]["uid"]
    children = {"statefulset": f"chat-{revision}", "controllerrevision": f"chat-{revision}"}
    children |= {"service": "chat", "pdb": "chat", "serviceaccount": "chat"}
    for kind, name in children.items():
        assert operator.require(kind, name)["metadata"]["ownerReferences"][0]["uid"] == owner
        operator.edit(kind, name, {"metadata": {"ownerReferences": None}})
        operator.wait_for(
            lambda kind=kind, name=name: operator.require(kind, name)["metadata"].get("ownerReferences"),
            f"{kind} {name} to be adopted",
        )
    assert uids(operator) == before
    operator.expected.append("event=name_taken")


def test_a_deletion_in_the_foreground_waits_for_the_pods(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    ((uid, name),) = uids(operator).items()
    operator.hold_pod(name)
    operator.delete("td", "chat", "Foreground")
    operator.wait_for(lambda: uid not in uids(operator), "the pod to drain")
    time.sleep(2)
    assert operator.get("td", "chat") is not None, "its pod still drains"
    operator.release_pod(name)
    operator.wait_for(lambda: operator.get("td", "chat") is None, "the object to be gone with its pod")


ADDED: list[tuple[str, dict[str, Any]]] = [
    ("service", {"selector": {"app": "evil"}, "sessionAffinity": "ClientIP", "publishNotReadyAddresses": True}),
    ("statefulset", {"template": {"spec": {
        "nodeSelector": {"a": "b"}, "hostNetwork": True, "shareProcessNamespace": True, "dnsPolicy": "Default",
        "tolerations": [{"operator": "Exists"}], "schedulingGates": [{"name": "example.com/x"}]}}}),
    ("statefulset", {"template": {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}}}),
    ("statefulset", {"minReadySeconds": 1000}),
]  # fmt: skip


def test_fields_added_to_a_child_by_hand_are_taken_away(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    before = uids(operator)
    (revision,) = operator.sets("chat")
    for kind, spec in ADDED:
        name = "chat" if kind == "service" else f"chat-{revision}"
        right = operator.require(kind, name)["spec"]
        operator.edit(kind, name, {"spec": spec})
        operator.wait_for(
            lambda kind=kind, name=name, right=right: operator.require(kind, name)["spec"] == right,
            f"{kind} {name} as it was before {spec}",
        )
    operator.wait_until_ready("chat")
    assert uids(operator) == before


def test_of_two_edits_by_hand_at_about_the_same_time_none_stays(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    (revision,) = operator.sets("chat")
    name = f"chat-{revision}"
    right = operator.require("statefulset", name)
    label = {"metadata": {"labels": {"app.kubernetes.io/part-of": "x"}}}
    scale = {"spec": {"replicas": 3}}
    for pause_s in (0.0, 0.1, 0.2, 0.3, 0.35, 0.4):
        operator.edit("statefulset", name, label)
        time.sleep(pause_s)
        operator.edit("statefulset", name, scale)

        def is_right() -> bool:
            found = operator.require("statefulset", name)
            is_labelled = found["metadata"]["labels"] == right["metadata"]["labels"]
            return is_labelled and found["spec"]["replicas"] == right["spec"]["replicas"]

        operator.wait_for(is_right, f"both edits to be undone, {pause_s} s apart")


def test_pods_never_run_as_the_account_of_somebody_else(operator: Operator) -> None:
    operator.kubectl("create", "serviceaccount", "chat")
    operator.expected.append("event=name_taken")
    operator.apply("chat")
    operator.wait_for_condition("chat", "Degraded", "True", "NameTaken")
    pass_over(operator)
    assert operator.sets("chat") == {}
    operator.delete_and_wait("serviceaccount", "chat")
    operator.wait_until_ready("chat")
