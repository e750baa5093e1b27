"""The operator is killed, doubled, upgraded and cut off; the objects end up the same."""

from __future__ import annotations

import time
from typing import Any

from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import Operator
from tests.cluster.proxy import KillingProxy

BROKEN = (
    "event=broken",
    "logger=kopf",
    "event=failed",
    "event=retry",
    "event=names_not_compared",
    "Traceback",
)


def describe(operator: Operator) -> dict[str, Any]:
    """All children without what differs from run to run."""
    kinds = "statefulset,service,serviceaccount,pdb,controllerrevision"
    found = {}
    for child in operator.list(kinds, "app.kubernetes.io/managed-by=toka-operator"):
        spec = child.get("spec", child.get("data", {}))
        for key in ("clusterIP", "clusterIPs"):
            spec.pop(key, None)
        labels = child["metadata"].get("labels")
        found[f"{child['kind']}/{child['metadata']['name']}"] = (labels, spec)
    return {k: v for k, v in found.items() if v[0].get("toka.dev/revision") or "ControllerRevision" not in k}


def is_settled(operator: Operator) -> bool:
    found = operator.require("td", "chat")
    conditions = {c["type"]: c for c in found.get("status", {}).get("conditions", [])}
    is_seen = found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
    return is_seen and conditions["Ready"]["status"] == "True" and len(operator.sets("chat")) == 1


def test_a_kill_after_any_single_write_of_a_rollout_ends_the_same(operator: Operator) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_for(lambda: is_settled(operator), "the first revision")
    operator.processes[0].terminate()
    operator.patch("chat", engine={"pageSize": 32})
    num_kills = 0
    with KillingProxy(operator.kubeconfig) as proxy:
        while True:
            proxy.kill_after_writes = 1
            process = operator.start(KUBECONFIG=str(proxy.kubeconfig))
            proxy.victim = process
            operator.wait_for(
                lambda process=process: not process.is_running() or is_settled(operator), "a write or the end"
            )
            if process.is_running():
                break
            num_kills += 1
            assert num_kills < 60, "every start writes something: no end"
        operator.wait_for(lambda: "held=True" in process.log(), "the last operator to lead")
        operator.wait_for(lambda: is_settled(operator), "the end")
        after_kills = describe(operator)
        operator.stop()
    assert num_kills >= 4
    operator.start()
    operator.kubectl("delete", "td", "chat")
    selector = "app.kubernetes.io/instance=chat"
    operator.wait_for(lambda: not operator.list("statefulset,service,controllerrevision", selector), "an empty start")
    operator.apply("chat", replicas=2)
    operator.wait_for(lambda: is_settled(operator), "the first revision again")
    operator.patch("chat", engine={"pageSize": 32})
    operator.wait_for(lambda: is_settled(operator), "an undisturbed rollout")
    assert describe(operator) == after_kills


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


def test_an_operator_of_the_whole_cluster_serves_every_namespace(operator: Operator) -> None:
    operator.processes[0].terminate()
    operator.start(TOKA_WATCH_NAMESPACES="")
    operator.apply("chat")
    operator.wait_until_ready("chat")
    operator.expected += ["name_taken", "rejected"]  # of other tests' namespaces, which are on their way out


def test_only_the_leader_writes(operator: Operator) -> None:
    operator.apply("chat")
    operator.wait_until_ready("chat")
    follower = operator.start()
    operator.kubectl("scale", "td/chat", "--replicas=2")
    operator.wait_until_ready("chat")
    assert "held=True" not in follower.log()
    assert "held=True" in operator.processes[0].log()


def test_the_operator_goes_on_after_the_api_server_was_restarted(operator: Operator) -> None:
    operator.expected += BROKEN
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
    time.sleep(3)  # the last status write may still be under way; the quiet that follows is what is measured
    before = len(operator.requests())
    time.sleep(10)
    quiet = [r for r in operator.requests()[before:] if r[0] != "watch"]
    assert quiet == []
