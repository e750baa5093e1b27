"""The operator is killed, doubled, upgraded and cut off; the objects end up the same."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import Operator
from tests.cluster.proxy import CUT, GARBAGE, FaultProxy

BROKEN = (
    "event=broken",
    "logger=kopf",
    "event=failed",
    "event=retry",
    "event=Ready lost=",
    "Traceback",
)


@pytest.fixture
def operator(own_operator: Operator) -> Operator:
    """The tests here end and start operators, so each has its own."""
    return own_operator


def describe(operator: Operator, name: str) -> dict[str, Any]:
    """All children of a TokaDeployment without what differs from run to run, its name written NAME."""
    selector = f"app.kubernetes.io/instance={name},app.kubernetes.io/part-of=toka"
    children = operator.list("statefulset,service,serviceaccount,pdb", selector)
    children += operator.list("controllerrevision", f"{selector},app.kubernetes.io/component=revision")
    found = {}
    for child in children:
        spec = child.get("spec", child.get("data", {}))
        for key in ("clusterIP", "clusterIPs"):
            spec.pop(key, None)
        found[f"{child['kind']}/{child['metadata']['name']}"] = [child["metadata"]["labels"], spec]
    described: dict[str, Any] = json.loads(json.dumps(found).replace(name, "NAME"))
    return described


def is_settled(operator: Operator, name: str = "chat") -> bool:
    found = operator.require("td", name)
    conditions = {c["type"]: c for c in found.get("status", {}).get("conditions", [])}
    is_seen = found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
    return is_seen and conditions["Ready"]["status"] == "True" and len(operator.sets(name)) == 1


def kill_after_each_write(operator: Operator) -> int:
    """Starts an operator, kills it right after its first write, and so on, until one has nothing to write.

    All have one identity, as a container that restarts in its pod has: the Lease is theirs at once. Returns the
    number of kills between writes.
    """
    with FaultProxy(operator.kubeconfig) as proxy:
        for num_kills in range(60):
            proxy.kill_after_writes = 1
            process = proxy.victim = operator.start(KUBECONFIG=str(proxy.kubeconfig), TOKA_IDENTITY="operator-0")
            operator.wait_for(
                lambda process=process: not process.is_running() or is_settled(operator), "a write or the end"
            )
            if process.is_running():
                operator.wait_for(lambda process=process: "held=True" in process.log(), "the last operator to lead")
                proxy.kill_after_writes = 0
                operator.wait_for(lambda: is_settled(operator), "the end")
                process.kill()
                return num_kills
    raise AssertionError("every start writes something: no end")


@pytest.mark.parametrize(
    ("before", "change", "at_least"),
    [
        (None, {"replicas": 2}, 5),
        ({"replicas": 2}, {"engine": {"pageSize": 32}}, 4),
        ({"replicas": 3}, {"replicas": 1}, 2),
    ],
    ids=["creation", "rollout", "scaling-down"],
)
def test_a_kill_after_any_single_write_ends_the_same(
    operator: Operator, before: dict[str, Any] | None, change: dict[str, Any], at_least: int
) -> None:
    """The same is done to `calm`, whose operator nobody kills, and to `chat`."""

    def make_change(name: str) -> None:
        operator.apply(name, **change) if before is None else operator.patch(name, **change)

    for name in ("calm", "chat") if before else ():
        operator.apply(name, **before)
        operator.wait_for(lambda name=name: is_settled(operator, name), f"the beginning of {name}")
    make_change("calm")
    operator.wait_for(lambda: is_settled(operator, "calm"), "the undisturbed end")
    operator.stop()
    make_change("chat")
    assert kill_after_each_write(operator) >= at_least
    assert describe(operator, "chat") == describe(operator, "calm")


def test_writes_that_go_wrong_are_made_again_and_none_twice(without_operator: Operator) -> None:
    operator = without_operator
    faults = {
        "serviceaccounts": 429,
        "services": CUT,
        "controllerrevisions": 500,
        "statefulsets": GARBAGE,
        "status": 409,
    }
    with FaultProxy(operator.kubeconfig) as proxy:
        proxy.fail_once = dict(faults)
        process = operator.start(KUBECONFIG=str(proxy.kubeconfig))
        operator.apply("chat")
        operator.wait_until_ready("chat")
        process.kill()
    assert proxy.fail_once == {}
    made = [
        (e["verb"], e["objectRef"]["resource"]) for e in operator.audit_events() if e["responseStatus"]["code"] < 300
    ]
    assert [made.count(("create", resource)) for resource in [*faults][:-1]] == [1, 1, 1, 1]
    operator.check_log()


def test_an_operator_upgrade_restarts_no_engine(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    pods = {p["metadata"]["uid"] for p in operator.pods("chat")}
    operator.processes[0].terminate()
    operator.start(TOKA_ENGINE_IMAGE="engine:2")
    operator.kubectl("scale", "td/chat", "--replicas=3")
    operator.wait_until_ready("chat")
    after = operator.pods("chat")
    assert pods <= {p["metadata"]["uid"] for p in after}
    assert {p["spec"]["containers"][0]["image"] for p in after} == {"engine:1"}
    operator.patch("chat", engine={"pageSize": 32})
    operator.wait_for(lambda: is_settled(operator), "the new revision")
    assert {p["spec"]["containers"][0]["image"] for p in operator.pods("chat")} == {"engine:2"}


def test_another_operator_takes_over_when_the_leader_is_killed(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    operator.start()
    operator.processes[0].kill()
    operator.kubectl("scale", "td/chat", "--replicas=2")
    operator.wait_until_ready("chat")
    lease = operator.server.get("lease", "toka-operator", "toka-system")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == "operator-1"


def test_only_the_leader_writes(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    follower = operator.start()
    operator.kubectl("scale", "td/chat", "--replicas=2")
    operator.wait_until_ready("chat")
    assert "held=True" not in follower.log()
    assert "held=True" in operator.processes[0].log()
    follower.kill()  # it may still be starting, and a SIGTERM now would only fill its log


def test_the_operator_goes_on_after_the_api_server_was_restarted(operator: Operator) -> None:
    operator.expected += BROKEN
    operator.may_be_forbidden = True
    operator.apply("chat")
    operator.wait_until_ready("chat")
    process: ProcessHandle = operator.processes[0]
    operator.server.restart_api_server()
    operator.kubectl("scale", "td/chat", "--replicas=2")
    operator.kubectl("delete", "service", "chat")
    operator.wait_until_ready("chat")
    operator.wait_for(lambda: operator.get("service", "chat"), "the Service to be put back")
    assert process.is_running()


def test_an_object_deleted_while_the_operator_was_cut_off_is_forgotten(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    operator.processes[0].terminate()
    operator.kubectl("delete", "td", "chat")
    operator.start()
    operator.apply("other")
    operator.wait_until_ready("other")
    gone = "app.kubernetes.io/instance=chat"
    operator.wait_for(lambda: not operator.list("statefulset,service,pod", gone), "its children to go")


def test_a_steady_state_costs_no_reads_and_no_writes(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    operator.apply("stopped", suspend=True)
    operator.wait_for_condition("stopped", "Ready", "False", "Suspended")
    operator.wait_for(lambda: ("create", "events") in operator.requests(), "the last write, the event of Ready")
    before = len(operator.requests())
    time.sleep(10)
    quiet = [r for r in operator.requests()[before:] if r[0] != "watch"]
    assert quiet == []
