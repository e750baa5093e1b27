"""Who may act, and where: a leader that comes too late, and namespaces with a Role each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness.api_only import ApiServer, free_ports
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import CHART, Operator, end_operator, has_replicas, pod_uids, probe, start_operator
from tests.cluster.proxy import DELAY, Fault, FaultProxy


def test_a_write_that_arrives_after_the_next_leader_has_acted_changes_nothing(
    api_server: ApiServer, without_operator: Operator
) -> None:
    operator = without_operator
    with FaultProxy(operator.kubeconfig) as proxy:
        first = operator.start(KUBECONFIG=str(proxy.kubeconfig), TOKA_LEASE_DURATION_SECONDS="5")
        operator.apply("chat", replicas=3)
        operator.wait_until_ready("chat")
        (revision,) = operator.sets("chat")
        name = f"chat-{revision}"
        proxy.faults = [Fault(DELAY, name, only="writes"), Fault(500, "toka-operator", only="writes")]
        operator.scale("chat", 1)
        operator.wait_for(lambda: proxy.num_waiting > 0, "the first leader's write to be on its way")
        second = operator.start()
        operator.wait_for(lambda: "held=True" in second.log(), "the second to lead")
        operator.scale("chat", 3)
        operator.wait_for(lambda: has_replicas(operator, "chat", 3), "the second leader to have acted")
        before = pod_uids(operator)
        proxy.faults = [Fault(500, "toka-operator", only="writes")]
        operator.wait_for(lambda: proxy.num_waiting == 0, "the late write to arrive")
        time.sleep(1.0)
        assert operator.require("statefulset", name)["spec"]["replicas"] == 3
        assert pod_uids(operator) == before, "a pod went, though the second leader put its number back"
        first.kill()
        operator.processes.remove(first)
    operator.stop()


@pytest.fixture
def roles(api_server: ApiServer, installation: Path) -> Iterator[tuple[list[Operator], dict[str, str]]]:
    """Two namespaces with a Role of the chart's each, what a test asks of them, and the operator's settings."""
    system = api_server.create_namespace("toka-roles", pod_security="restricted")
    names = [api_server.create_namespace(f"watched-{letter}") for letter in "ab"]
    values = f"replicas=0,crds.install=false,rbac.allowOverlap=true,watchNamespaces={{{','.join(names)}}}"
    api_server.helm("install", "roles", str(CHART), "--namespace", system, "--set", values)
    kubeconfig = api_server.service_account_kubeconfig(system, "roles-operator")
    operators = [Operator(api_server, kubeconfig, name) for name in names]
    (port,) = free_ports(1)
    yield (
        operators,
        {
            "TOKA_WATCH_NAMESPACES": ",".join(names),
            "TOKA_NAMESPACE": system,
            "TOKA_LEASE_NAME": "roles-operator",
            "TOKA_HEALTH_PORT": str(port),
        },
    )
    for name in (system, names[0]):
        api_server.delete_namespace(name)


def test_each_watched_namespace_is_served_also_when_another_is_gone(
    api_server: ApiServer, roles: tuple[list[Operator], dict[str, str]]
) -> None:
    (kept, lost), environment = roles
    port = int(environment["TOKA_HEALTH_PORT"])

    def restart(process: ProcessHandle | None, name: str) -> ProcessHandle:
        if process is not None:
            assert end_operator(api_server, process) == 0
        return start_operator(api_server, kept.kubeconfig, name, **environment)

    process = restart(None, "roles-1")
    for each in (kept, lost):
        each.apply("chat", replicas=2)
        each.wait_until_ready("chat")
    before = [pod_uids(each) for each in (kept, lost)]
    process = restart(process, "roles-2")
    api_server.wait_for(lambda: probe(port, "/readyz") == (200, "ok"), "the restarted operator to be ready")
    for each in (kept, lost):
        each.scale("chat", 3)
        each.wait_until_ready("chat")
        assert pod_uids(each) >= before[(kept, lost).index(each)]
    assert "is there already" not in process.log()
    api_server.kubectl("delete", "namespace", lost.namespace)
    kept.scale("chat", 1)
    kept.wait_until_ready("chat")
    process = restart(process, "roles-3")
    kept.scale("chat", 2)
    kept.wait_until_ready("chat")
    api_server.wait_for(lambda: lost.namespace in probe(port, "/readyz")[1], "the lost namespace to be named")
    status, text = probe(port, "/readyz")
    assert (status, kept.namespace in text) == (200, False)
    assert "toka_operator_unwatched_namespaces 1.0" in probe(port, "/metrics")[1]
    assert end_operator(api_server, process) == 0
