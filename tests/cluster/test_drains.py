"""A cordoned node's pods get their successors first, so that `kubectl drain` takes nothing that serves, and ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.harness.errors import CommandFailed
from tests.cluster.operating import HOLD, Json, Operator
from tests.cluster.recording import is_serving, is_staying, record

NODES = ("simulated-0", "simulated-1")


@pytest.fixture
def operator(operator: Operator) -> Iterator[Operator]:
    """The module's operator; afterwards every node is as it was."""
    yield operator
    for node in NODES:
        operator.server.kubectl("uncordon", node)


def node_of(operator: Operator, pod: str) -> str:
    return str(operator.require("pod", pod)["spec"].get("nodeName", ""))


def staying(operator: Operator) -> dict[str, Json]:
    """Pods of `chat` that nobody told to go, by name."""
    return {p["metadata"]["name"]: p for p in operator.pods("chat") if is_staying(p)}


def become_ready(operator: Operator, pod: str, address: str) -> None:
    """Report a pod that was held as a kubelet does whose engine answers."""
    since = "2026-01-01T00:00:00Z"
    conditions = [{"type": t, "status": "True", "lastTransitionTime": since} for t in ("ContainersReady", "Ready")]
    operator.set_pod_status(pod, phase="Running", podIP=address, podIPs=[{"ip": address}], conditions=conditions)


def evict(operator: Operator, pod: str) -> bool:
    """Ask as a drain does. Whether the eviction was granted."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    path = f"/api/v1/namespaces/{operator.namespace}/pods/{pod}/eviction"
    try:
        operator.server.request("POST", path, eviction)
    except CommandFailed as error:
        if error.returncode == 429:
            return False
        raise
    return True


class Drain(threading.Thread):
    """`kubectl drain` of a node, of the pods of `chat` alone."""

    def __init__(self, operator: Operator, node: str, *options: str) -> None:
        super().__init__(daemon=True)
        only_ours = "--pod-selector=app.kubernetes.io/instance=chat"
        self.words = ("drain", node, only_ours, "--delete-emptydir-data", "--timeout=90s", *options)
        self.operator = operator
        self.error = ""

    def run(self) -> None:
        try:
            self.operator.server.kubectl(*self.words)
        except CommandFailed as error:
            self.error = str(error)

    def finish(self) -> None:
        self.join(100.0)
        assert not self.is_alive()
        assert not self.error


def begin(operator: Operator, **spec: Any) -> str:
    """One replica that serves, whose pods become ready when the test says so. Returns its pod's name."""
    operator.apply("chat", **HOLD, **spec)
    operator.wait_for(lambda: operator.get("pdb", "chat"), "the disruption budget")
    (name,) = operator.wait_for(lambda: [n for n in staying(operator) if node_of(operator, n)], "a pod with a node")
    become_ready(operator, name, "10.9.0.1")
    operator.wait_until_ready("chat")

    def is_guarded() -> bool:
        status = operator.require("pdb", "chat").get("status", {})
        return (status.get("currentHealthy"), status.get("disruptionsAllowed")) == (1, 0)

    operator.wait_for(is_guarded, "the disruption controller to count the pod")
    return str(name)


def wait_for_successor(operator: Operator, old: str) -> str:
    def find() -> str:
        return next((name for name in staying(operator) if name != old), "")

    return str(operator.wait_for(find, "a successor"))


def test_a_drain_of_one_replica_waits_for_its_successor_and_ends(operator: Operator) -> None:
    old = begin(operator)
    node = node_of(operator, old)
    assert not evict(operator, old), "before anybody cordons its node, too"
    drain = Drain(operator, node)
    drain.start()
    new = wait_for_successor(operator, old)
    operator.wait_for(lambda: node_of(operator, new), "the successor to have a node")
    assert node_of(operator, new) != node
    assert not evict(operator, old)
    told = operator.wait_for_condition("chat", "Progressing", "True", "NodeCordoned")
    assert f"{old} ({node})" in told["message"]
    operator.wait_for_condition("chat", "Ready", "True")
    operator.wait_for_condition("chat", "Degraded", "False")
    become_ready(operator, new, "10.9.0.2")
    drain.finish()
    operator.wait_for(lambda: set(staying(operator)) == {new}, "the old pod to go")
    operator.wait_until_ready("chat")
    assert operator.get("pdb", "chat") is not None
    assert operator.require("td", "chat")["status"]["reason"] == "Complete"


def test_a_drain_ends_though_there_is_no_room_for_a_successor(operator: Operator) -> None:
    term = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODES[1]]}
    only = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [term]}]}}
    old = begin(operator, scheduling={"affinity": {"nodeAffinity": only}, "patienceSeconds": 6})
    uid = operator.require("pod", old)["metadata"]["uid"]
    drain = Drain(operator, NODES[1])
    drain.start()
    wait_for_successor(operator, old)
    operator.wait_for(
        lambda: "waits: " in operator.wait_for_condition("chat", "Progressing", "True", "NodeCordoned")["message"],
        "the message to say what the successor lacks",
    )
    assert not evict(operator, old)
    drain.finish()
    assert uid not in {pod["metadata"]["uid"] for pod in operator.pods("chat")}
    assert "NodeCordoned" in {e["reason"] for e in events(operator) if e["involvedObject"]["name"] == "chat"}
    operator.server.kubectl("uncordon", NODES[1])
    operator.wait_for(lambda: operator.get("pdb", "chat"), "the next pod to be guarded again")


def test_a_drain_that_asks_no_budget_waits_for_nothing(operator: Operator) -> None:
    old = begin(operator)
    uid = operator.require("pod", old)["metadata"]["uid"]
    drain = Drain(operator, node_of(operator, old), "--disable-eviction")
    drain.start()
    drain.finish()
    assert uid not in {pod["metadata"]["uid"] for pod in operator.pods("chat")}


def events(operator: Operator) -> list[Json]:
    path = f"/api/v1/namespaces/{operator.namespace}/events"
    return list(operator.server.request("GET", path)["items"])


def test_a_node_that_is_no_longer_cordoned_keeps_its_pod(operator: Operator) -> None:
    old = begin(operator)
    operator.server.kubectl("cordon", node_of(operator, old))
    wait_for_successor(operator, old)
    operator.server.kubectl("uncordon", node_of(operator, old))
    operator.wait_for(lambda: set(staying(operator)) == {old}, "the successor to go")
    operator.wait_for_condition("chat", "Progressing", "False", "Complete")


@pytest.mark.parametrize("is_paused", [False, True])
def test_several_pods_leave_a_cordoned_node_without_fewer_serving(operator: Operator, is_paused: bool) -> None:
    operator.apply("chat", replicas=4)
    operator.wait_until_ready("chat")
    operator.patch("chat", rollout={"paused": is_paused})
    before = staying(operator)
    assert {pod["spec"]["nodeName"] for pod in before.values()} == set(NODES)

    def has_moved() -> bool:
        pods = staying(operator).values()
        return len(pods) == 4 and all(p["spec"].get("nodeName") == NODES[1] for p in pods)

    with record(operator, "pod") as recorded:
        operator.server.kubectl("cordon", NODES[0])
        operator.wait_for(has_moved, "four pods on the other node")
    assert min(recorded.count(is_serving)) == 4
    operator.wait_for_condition("chat", "Progressing", "False", "Complete")
    assert operator.require("td", "chat")["status"]["replicas"] == 4
