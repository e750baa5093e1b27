"""spec.data on a real API server: the claim, what becomes of it, and whose ordinals the pods have."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.operating import Operator

DATA = {"size": "1Gi"}
CLAIM = "persistentvolumeclaim"


def bring_volume(operator: Operator) -> None:
    """Make a volume that only the claim of `chat` may have."""
    spec: dict[str, Any] = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    spec |= {"claimRef": {"namespace": operator.namespace, "name": "chat-data"}, "hostPath": {"path": "/nowhere"}}
    manifest = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": operator.namespace}, "spec": spec}
    operator.server.apply(manifest)


def ordinals(operator: Operator) -> list[int]:
    return sorted(int(pod["metadata"]["name"].rsplit("-", 1)[1]) for pod in operator.pods("chat"))


@pytest.fixture
def chat(operator: Operator) -> Any:
    """Three ready pods with a claim."""
    bring_volume(operator)
    operator.apply("chat", replicas=3, data=DATA)
    operator.wait_until_ready("chat")
    yield operator
    operator.server.kubectl("delete", "pv", operator.namespace, "--wait=false")


def test_pods_keep_their_ordinals_and_their_node_through_deletions_scaling_and_rollouts(chat: Operator) -> None:
    operator = chat
    assert ordinals(operator) == [0, 1, 2]
    assert len({pod["spec"]["nodeName"] for pod in operator.pods("chat")}) == 1, "the volume is of one node"
    variables = {v["name"]: v for v in operator.pods("chat")[0]["spec"]["containers"][0]["env"]}
    assert "pod-index" in variables["TOKA_ORDINAL"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert all(pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"].isdigit() for pod in operator.pods("chat"))
    before = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in operator.pods("chat")}
    first = min(before)
    operator.delete("pod", first)

    def has_successor() -> bool:
        pod = operator.get("pod", first)
        return pod is not None and pod["metadata"]["uid"] != before[first]

    operator.wait_for(has_successor, "the pod to be succeeded under its name")
    operator.wait_until_ready("chat")
    operator.patch("chat", engine={"pageSize": 32})
    operator.wait_for(lambda: len(operator.sets("chat")) == 1, "the rollout to end")
    operator.wait_for(lambda: ordinals(operator) == [0, 1, 2], "the ordinals from 0 on")
    operator.scale("chat", 2)
    operator.wait_for(lambda: ordinals(operator) == [0, 1], "the highest ordinal to go")
    assert len({pod["spec"]["nodeName"] for pod in operator.pods("chat")}) == 1


def test_a_claim_that_stays_is_found_again_and_one_that_goes_goes(chat: Operator) -> None:
    operator = chat
    claim = operator.require(CLAIM, "chat-data")
    assert claim["metadata"].get("ownerReferences") is None
    assert claim["spec"]["resources"]["requests"] == {"storage": "1Gi"}
    operator.delete_and_wait("td", "chat", "Foreground")
    kept = operator.require(CLAIM, "chat-data")
    assert kept["metadata"]["uid"] == claim["metadata"]["uid"]
    assert "deletionTimestamp" not in kept["metadata"]
    operator.apply("chat", replicas=1, data={**DATA, "retention": "Delete"})
    operator.wait_until_ready("chat")
    operator.wait_for(
        lambda: operator.require(CLAIM, "chat-data")["metadata"].get("ownerReferences"), "the claim to have its owner"
    )
    assert operator.require(CLAIM, "chat-data")["metadata"]["uid"] == claim["metadata"]["uid"]
    operator.delete_and_wait("td", "chat", "Foreground")
    operator.wait_for(lambda: operator.get(CLAIM, "chat-data") is None, "the claim to go with its owner")


def test_a_claim_that_cannot_grow_is_told_in_the_api_servers_words(chat: Operator) -> None:
    operator = chat
    operator.expected.append("rejected=")
    operator.patch("chat", data={"size": "2Gi"})
    refused = operator.wait_for_condition("chat", "ConfigValid", "False", "ChildRejected")
    assert "only dynamically provisioned pvc can be resized" in refused["message"]
    assert ordinals(operator) == [0, 1, 2]


def test_a_claim_without_a_volume_is_told_in_the_provisioners_words(operator: Operator) -> None:
    operator.apply("chat", data={**DATA, "storageClassName": "fast"}, scheduling={"patienceSeconds": 0})

    def told() -> bool:
        status = operator.require("td", "chat").get("status", {})
        degraded = next((c for c in status.get("conditions", []) if c["type"] == "Degraded"), {})
        return degraded.get("reason") == "ClaimPending" and '"fast" not found' in degraded["message"]

    operator.wait_for(told, "the words of the volume controller")
    (failure,) = operator.require("td", "chat")["status"]["failures"]
    assert (failure["reason"], failure["pod"]) == ("ClaimPending", operator.pods("chat")[0]["metadata"]["name"])
