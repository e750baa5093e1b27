"""The operator is killed, doubled, upgraded and cut off; the objects end up the same."""

from __future__ import annotations

import time

import pytest

from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import Operator
from tests.cluster.proxy import CUT, GARBAGE, FaultProxy
from tests.cluster.simulated_engines import begin, simulate_engines, wait_for_phase

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


def is_settled(operator: Operator, name: str = "chat") -> bool:
    found = operator.require("td", name)
    conditions = {c["type"]: c for c in found.get("status", {}).get("conditions", [])}
    is_seen = found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
    return is_seen and conditions["Ready"]["status"] == "True" and len(operator.sets(name)) == 1


def test_writes_that_go_wrong_are_made_again_and_none_twice(without_operator: Operator) -> None:
    operator = without_operator
    faults = {
        "serviceaccounts": 429,
        "services": CUT,
        "controllerrevisions": 500,
        "statefulsets": GARBAGE,
        "status": 409,
    }
    operator.expected.append("ControllerRevision chat-.* rejected=")  # 500 may be about this one object, and is told
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
    operator.scale("chat", 3)
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
    operator.scale("chat", 2)
    operator.wait_until_ready("chat")
    lease = operator.server.get("lease", "toka-operator", "toka-system")
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == "operator-1"


def test_only_the_leader_writes(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    follower = operator.start()
    operator.scale("chat", 2)
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
    operator.scale("chat", 2)
    operator.delete_and_wait("service", "chat")
    operator.wait_until_ready("chat")
    operator.wait_for(lambda: operator.get("service", "chat"), "the Service to be put back")
    assert process.is_running()


def test_an_object_deleted_while_the_operator_was_cut_off_is_forgotten(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    operator.processes[0].terminate()
    operator.delete_and_wait("td", "chat")
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


def test_a_canary_is_watched_on_by_the_next_operator(operator: Operator) -> None:
    with simulate_engines(operator) as engines:
        begin(operator, engines, canary={"seconds": 15})
        operator.patch("chat", engine={"pageSize": 64})
        watched = wait_for_phase(operator, "Watched")
        assert operator.processes[-1].terminate() == 0
        operator.start()
        passed = wait_for_phase(operator, "Passed")
        assert passed["since"] == watched["since"]
        assert passed["pod"] == watched["pod"]
        operator.wait_until_ready("chat")
