"""The runbook's cures that no change of the spec brings: what is missing comes, or what went is made again by itself.

Evictions, preemption, volumes and the replacement of failed pods are those of the real API server, scheduler and
controllers. There is no kubelet here: what one reports is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.operating import HOLD, PATHS, Json, Operator, pod_uids
from tests.cluster.test_drains import become_ready, evict
from tests.cluster.test_faults_are_told import conditions, make_faults, report

pytestmark = pytest.mark.slow


def name_of_pod(operator: Operator) -> str:
    (pod,) = operator.pods("chat")
    return str(pod["metadata"]["name"])


def wait_for_new_pods(operator: Operator, old: set[str], count: int = 1) -> None:
    """Waits until none of these pods is left and as many as asked for serve, and nothing is told of them any more."""
    operator.wait_for(lambda: len(pod_uids(operator) - old) == count and not pod_uids(operator) & old, "new pods")
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_a_volume_for_the_claim_lets_its_pod_start(operator: Operator) -> None:
    storage_class = f"fast-{operator.namespace}"
    operator.apply("chat", data={"size": "1Gi", "storageClassName": storage_class}, scheduling={"patienceSeconds": 0})
    operator.wait_for_condition("chat", "Degraded", "True", "ClaimPending")
    before = pod_uids(operator)
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": storage_class}
    volume: Json = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": storage_class}}
    operator.server.apply({**volume, "spec": {**spec, "hostPath": {"path": "/nowhere"}}})
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")
    assert pod_uids(operator) == before
    operator.server.kubectl("delete", "pv", storage_class, "--wait=false")


@contextmanager
def one_room(operator: Operator, resource: str) -> Iterator[None]:
    """A node has one of a resource that no other has, and two classes of priority are there meanwhile."""
    operator.server.give_node(resource, 1)
    names = {f"{operator.namespace}-low": -10, f"{operator.namespace}-high": 10}
    kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"}
    operator.server.apply(*({**kind, "metadata": {"name": name}, "value": value} for name, value in names.items()))
    try:
        yield
    finally:
        operator.server.kubectl("delete", "priorityclass", *names)


def more_important_pod(operator: Operator, resource: str) -> Json:
    security = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}}
    security |= {"seccompProfile": {"type": "RuntimeDefault"}}
    container = {"name": "c", "image": "none", "securityContext": security, "resources": {"limits": {resource: "1"}}}
    spec = {"priorityClassName": f"{operator.namespace}-high", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "important"}, "spec": spec}


def test_more_room_lets_a_preempted_pod_start_again(operator: Operator) -> None:
    resource = "example.com/last"
    with one_room(operator, resource):
        low = {"priorityClassName": f"{operator.namespace}-low", "patienceSeconds": 0}
        operator.apply("chat", resources={"device": "gpu", "gpuResource": resource}, scheduling=low)
        operator.wait_until_ready("chat")
        before, name = pod_uids(operator), name_of_pod(operator)
        operator.hold_pod(name)
        operator.server.apply(more_important_pod(operator, resource), namespace=operator.namespace)
        operator.wait_for_condition("chat", "Degraded", "True", "Preempted")
        operator.release_pod(name)
        operator.wait_for_condition("chat", "Degraded", "True", "Unschedulable")
        operator.server.give_node(resource, 2)
        wait_for_new_pods(operator, before)
        operator.delete("pod", "important")


def test_an_evicted_pod_is_made_again(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    name, uid = next((pod["metadata"]["name"], pod["metadata"]["uid"]) for pod in operator.pods("chat"))
    operator.hold_pod(name)
    operator.wait_for(lambda: evict(operator, name), "the budget to allow an eviction")
    operator.wait_for_condition("chat", "Degraded", "True", "Evicted")
    operator.release_pod(name)
    operator.wait_for(lambda: uid not in pod_uids(operator) and len(pod_uids(operator)) == 2, "its successor")
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_a_pod_that_its_node_does_not_take_is_made_again(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    before, name = pod_uids(operator), name_of_pod(operator)
    report(operator, "NodeRejected", operator.pods("chat")[0], make_faults()["NodeRejected"][1])
    operator.wait_for_condition("chat", "Degraded", "True", "NodeRejected")
    operator.release_pod(name)
    wait_for_new_pods(operator, before)


@pytest.mark.parametrize("reason", ["NotReady", "NotResponding"])
def test_a_pod_that_answers_its_probes_again_is_as_before(operator: Operator, reason: str) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    before, name = pod_uids(operator), name_of_pod(operator)
    operator.set_pod_status(name, **make_faults()[reason][1])
    operator.wait_for_condition("chat", "Degraded", "True", reason)
    operator.set_pod_status(name, **conditions(Ready=("True", "", "", 0), ContainersReady=("True", "", "", 0)))
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")
    assert pod_uids(operator) == before


def test_a_pod_that_starts_after_all_is_told_of_no_more(operator: Operator) -> None:
    operator.apply("chat", **HOLD)
    (pod,) = operator.wait_for(lambda: operator.pods("chat"), "the pod")
    report(operator, "PodNotStarted", pod, {})
    operator.wait_for_condition("chat", "Degraded", "True", "PodNotStarted")
    become_ready(operator, pod["metadata"]["name"], "10.9.0.1")
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_a_pod_that_a_finalizer_keeps_goes_with_that(operator: Operator) -> None:
    operator.apply("chat", rollout={"stuckSeconds": 1})
    operator.wait_until_ready("chat")
    before, name = pod_uids(operator), name_of_pod(operator)
    operator.hold_pod(name)
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 1}
    operator.server.request("DELETE", f"{PATHS['pod'].format(operator.namespace)}/{name}", options)
    operator.wait_for_condition("chat", "Degraded", "True", "PodStuckTerminating")
    operator.release_pod(name)
    wait_for_new_pods(operator, before)
