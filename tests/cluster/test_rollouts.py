"""Changes of the spec reach the pods without fewer of them serving."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.harness.errors import CommandFailed
from tests.cluster.harness.kwok import NEVER_READY_ANNOTATION
from tests.cluster.operating import HOLD, Operator, pod_uids
from tests.cluster.recording import is_serving, is_staying, record
from tests.unit.operator.test_revisions import BASE, MEANINGLESS, edit


def wait_for_the_end(operator: Operator) -> None:
    """Waits until the newest spec serves with one StatefulSet."""

    def is_over() -> bool:
        found = operator.require("td", "chat")
        conditions = {c["type"]: c for c in found["status"]["conditions"]}
        is_seen = found["status"]["observedGeneration"] == found["metadata"]["generation"]
        return is_seen and conditions["Ready"]["status"] == "True" and len(operator.sets("chat")) == 1

    operator.wait_for(is_over, "the rollout to end")


def test_a_change_of_the_spec_surges_and_the_old_revision_goes(operator: Operator) -> None:
    operator.apply("chat", replicas=3)
    (old,) = operator.wait_until_ready("chat")["status"]["revisions"]
    with record(operator, "pod") as pods:
        operator.patch("chat", engine={"maxSeqsPerForward": 64})
        wait_for_the_end(operator)
    assert (max(pods.count(is_staying)), min(pods.count(is_serving))) == (4, 3)
    (new,) = operator.require("td", "chat")["status"]["revisions"]
    assert new["name"] != old["name"]
    stored = operator.list("controllerrevision", "app.kubernetes.io/component=revision")
    assert {s["metadata"]["labels"]["toka.dev/revision"]: s["revision"] for s in stored} == {
        old["name"]: 1,
        new["name"]: 2,
    }


def test_a_third_revision_supersedes_a_rollout_under_way_without_fewer_pods_serving(operator: Operator) -> None:
    operator.apply("chat", replicas=3, rollout={"minReadySeconds": 1})
    operator.wait_until_ready("chat")
    operator.patch("chat", engine={"pageSize": 32})

    def is_half_way() -> bool:
        revisions = operator.require("td", "chat")["status"]["revisions"]
        return len(revisions) == 2 and all(revision["available"] for revision in revisions)

    operator.wait_for(is_half_way, "two revisions to serve")
    with record(operator, "pod") as pods:
        operator.patch("chat", engine={"pageSize": 64})
        wait_for_the_end(operator)
    revisions = [
        {p["metadata"]["labels"]["toka.dev/revision"] for p in state if is_staying(p)} for state in pods.states
    ]
    assert max(map(len, revisions)) == 3
    assert (max(pods.count(is_staying)), min(pods.count(is_serving))) == (4, 3)
    assert {"page_size=64"} <= set(operator.pods("chat")[0]["spec"]["containers"][0]["args"])


def test_going_back_uses_the_old_revision_again(operator: Operator) -> None:
    operator.apply("chat")
    first = operator.wait_until_ready("chat")["status"]["currentRevision"]
    operator.patch("chat", engine={"pageSize": 32})
    second = operator.wait_until_ready("chat")["status"]["currentRevision"]
    operator.patch("chat", engine={"pageSize": None})
    third = operator.wait_until_ready("chat")["status"]["currentRevision"]
    assert first == third != second
    assert operator.require("controllerrevision", f"chat-{first}")["revision"] == 3


def test_history_keeps_no_more_revisions_than_asked(operator: Operator) -> None:
    operator.apply("chat", suspend=True, rollout={"revisionHistoryLimit": 1})
    for size in (8, 16, 32):
        operator.patch("chat", engine={"pageSize": size})
        operator.wait_for_condition("chat", "Ready", "False", "Suspended")
    operator.wait_for(
        lambda: len(operator.list("controllerrevision", "app.kubernetes.io/component=revision")) == 2,
        "old revisions to go",
    )
    assert len(operator.sets("chat")) == 1


def test_a_revision_that_never_becomes_ready_keeps_the_old_pods(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    old = operator.wait_until_ready("chat")["status"]["currentRevision"]
    operator.patch("chat", podTemplate={"annotations": {NEVER_READY_ANNOTATION: "true"}})
    operator.wait_for_condition("chat", "Progressing", "True", "RolloutUnderway")
    operator.wait_for(lambda: len(operator.pods("chat")) == 3, "one surge pod")
    status = operator.require("td", "chat")["status"]
    assert {r["name"]: r["available"] for r in status["revisions"]}[old] == 2
    operator.wait_for_condition("chat", "Available", "True")
    operator.patch("chat", podTemplate={"annotations": {NEVER_READY_ANNOTATION: "false"}})
    operator.wait_until_ready("chat")
    operator.wait_for(lambda: len(operator.sets("chat")) == 1, "both older revisions to go")


def test_a_paused_rollout_waits_until_it_is_resumed(operator: Operator) -> None:
    operator.apply("chat")
    old = operator.wait_until_ready("chat")["status"]["currentRevision"]
    operator.patch("chat", rollout={"paused": True}, engine={"pageSize": 32})
    operator.wait_for_condition("chat", "Progressing", "False", "Paused")
    assert set(operator.sets("chat")) == {old}
    operator.patch("chat", rollout={"paused": False})
    assert operator.wait_until_ready("chat")["status"]["currentRevision"] != old


def test_the_scale_subresource_scales(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    operator.kubectl("scale", "td/chat", "--replicas=3")
    assert operator.wait_until_ready("chat")["status"]["replicas"] == 3
    assert operator.require("pdb", "chat")["spec"]["minAvailable"] == 2
    operator.kubectl("scale", "td/chat", "--replicas=1")
    operator.wait_for(lambda: operator.require("td", "chat")["status"]["replicas"] == 1, "one pod")
    operator.wait_for(
        lambda: operator.require("pdb", "chat")["spec"]["minAvailable"] == 1, "the budget to hold the only pod"
    )
    selector = operator.require("td", "chat")["status"]["selector"]
    assert len(operator.list("pod", selector)) == 1


def test_a_suspended_object_has_no_pods_and_comes_back(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    operator.patch("chat", suspend=True)
    operator.wait_for_condition("chat", "Ready", "False", "Suspended")
    operator.wait_for(lambda: not operator.pods("chat"), "the pods to go")
    assert operator.get("service", "chat") is not None
    operator.patch("chat", suspend=False)
    assert operator.wait_until_ready("chat")["status"]["phase"] == "Running"


def test_a_surge_without_room_says_so_and_goes_on_when_there_is(operator: Operator) -> None:
    operator.apply("chat", resources={"device": "gpu", "gpuResource": "example.com/scarce"})
    operator.wait_for_condition("chat", "Progressing", "True", "Unschedulable")
    operator.server.give_node("example.com/scarce", 1)
    operator.wait_until_ready("chat")
    operator.patch("chat", engine={"pageSize": 32})
    blocked = operator.wait_for_condition("chat", "Progressing", "True", "SurgeBlocked")
    assert "example.com/scarce" in blocked["message"]
    operator.wait_for_condition("chat", "Available", "True")
    operator.wait_for_condition("chat", "Degraded", "False")
    operator.server.give_node("example.com/scarce", 2)
    operator.wait_until_ready("chat")


def test_the_progress_deadline_is_told(operator: Operator) -> None:
    operator.apply("chat", **HOLD, startup={"timeoutSeconds": 10}, rollout={"progressDeadlineSeconds": 11})
    operator.wait_for_condition("chat", "Progressing", "False", "ProgressDeadlineExceeded")
    operator.wait_for_condition("chat", "Degraded", "True", "ProgressDeadlineExceeded")


def test_a_rollout_that_fails_goes_back_to_the_pods_that_serve_and_a_change_is_tried_again(operator: Operator) -> None:
    rollout = {"progressDeadlineSeconds": 11, "onFailure": "Rollback"}
    operator.apply("chat", replicas=2, startup={"timeoutSeconds": 10}, rollout=rollout)
    old = operator.wait_until_ready("chat")["status"]["currentRevision"]
    before = pod_uids(operator)
    operator.patch("chat", podTemplate={"annotations": {NEVER_READY_ANNOTATION: "true"}})
    told = operator.wait_for_condition("chat", "Degraded", "True", "RolledBack")
    status = operator.require("td", "chat")["status"]
    failed = status["rollback"]["revision"]
    assert failed in told["message"]
    assert status["currentRevision"] == old != failed
    operator.wait_for_condition("chat", "Ready", "False", "RolledBack")
    operator.wait_for(lambda: set(operator.sets("chat")) == {old}, "the failed revision to go")
    assert pod_uids(operator) == before
    operator.wait_for_condition("chat", "Progressing", "False", "RolledBack")
    operator.scale("chat", 3)
    operator.wait_for(lambda: operator.require("td", "chat")["status"]["availableReplicas"] == 3, "a third pod")
    assert set(operator.sets("chat")) == {old}
    assert before < pod_uids(operator)
    reasons = {e["reason"] for e in operator.server.list_objects("events", operator.namespace)}
    assert {"RolledBack", "RolloutStarted"} <= reasons
    operator.patch("chat", podTemplate={"annotations": {NEVER_READY_ANNOTATION: "false"}})
    after = operator.wait_until_ready("chat")["status"]
    assert after["currentRevision"] not in (old, failed)
    assert "rollback" not in after


def _without_nulls(value: Any) -> Any:
    """A spec without the fields that are taken away, whose types admit no null."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def test_sixty_kinds_of_edits_without_meaning_replace_no_pod(operator: Operator) -> None:
    """Each is applied to the object as it was at first, through the CRD. Its pods need no node to be there."""

    def is_seen() -> bool:
        found = operator.require("td", "chat")
        return found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]

    operator.apply("chat", **BASE)
    operator.wait_for(lambda: len(operator.pods("chat")) == 1 and is_seen(), "the pod")
    before, pods = operator.require("td", "chat"), pod_uids(operator)
    kept = [(path, value) for path, value in MEANINGLESS if path not in ("suspend", "replicas")]
    operator.num_edits = len(kept)
    num_accepted = 0

    for path, value in kept:
        try:
            operator.apply("chat", **_without_nulls(edit(BASE, path, value)))
        except CommandFailed as error:  # an older CRD accepted it
            if error.returncode != 422:
                raise
            continue
        num_accepted += 1
        operator.wait_for(is_seen, f"{path}={value} to be seen")
        assert operator.require("td", "chat")["status"]["currentRevision"] == before["status"]["currentRevision"], path
    assert num_accepted >= 60
    another = json.loads(json.dumps({k: before[k] for k in ("apiVersion", "kind", "spec")}))
    another["metadata"] = {"name": "chat", "namespace": operator.namespace}
    operator.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(another))
    operator.wait_for(is_seen, "another applier's edit to be seen")
    assert pod_uids(operator) == pods
    assert len(operator.list("controllerrevision", "app.kubernetes.io/component=revision")) == 1
