"""Whatever becomes of requests and streams between the operator and the API server, it goes on without a restart.

One operator runs through a proxy for all cases of the table. In each, while requests go wrong, an object is changed,
a child is deleted and a new object is created; when they go right again, everything is as it should be soon.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kubernetes import config

from tests.cluster.harness.api_only import ApiServer, free_ports
from tests.cluster.harness.paths import REPOSITORY
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import CHART, Operator, end_operator, start_operator
from tests.cluster.proxy import CUT, DELAY, FREEZE, HANG, Fault, FaultProxy, error_event

FAULT_S = 2.0
FAULTS = {
    "watches get 401": [Fault(401, only="watches")],
    "watches get 403": [Fault(403, only="watches")],
    "watches get 404": [Fault(404, only="watches")],
    "watches get 410": [Fault(410, only="watches")],
    "watches get 429": [Fault(429, only="watches")],
    "watches get 500": [Fault(500, only="watches")],
    "watches end with ERROR 410": [Fault(error_event(410), only="watches")],
    "watches end with ERROR 403": [Fault(error_event(403), only="watches")],
    "watches end with ERROR 500": [Fault(error_event(500), only="watches")],
    "watches are cut": [Fault(CUT, only="watches")],
    "watches are held up": [Fault(DELAY, only="watches")],
    "watches fall silent for good": [Fault(HANG, only="watches")],
    "the objects' watch alone falls silent for good": [Fault(HANG, "tokadeployments", only="watches")],
    "writes get 401": [Fault(401, only="writes")],
    "writes get 409": [Fault(409, only="writes")],
    "writes get 429": [Fault(429, only="writes")],
    "writes get 500": [Fault(500, only="writes")],
    "writes are cut": [Fault(CUT, only="writes")],
    "writes hang": [Fault(FREEZE, only="writes")],
    "everything gets 401": [Fault(401)],
    "everything gets 503": [Fault(503)],
    "everything is cut": [Fault(CUT)],
    "everything hangs": [Fault(FREEZE)],
}


@dataclass
class Faulty:
    """An operator behind a proxy, with its health port, and its namespace."""

    operator: Operator
    proxy: FaultProxy
    process: ProcessHandle
    port: int

    def probe(self, path: str) -> tuple[int, str]:
        return probe(self.port, path)


def pod_uids(operator: Operator) -> set[str]:
    return {pod["metadata"]["uid"] for pod in operator.pods("chat")}


def probe(port: int, path: str) -> tuple[int, str]:
    """Status and text of one of an operator's health paths."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def faulty(api_server: ApiServer, installation: Path) -> Iterator[Faulty]:
    namespace = api_server.create_namespace("api-faults")
    client = config.new_client_from_config(str(api_server.kubeconfig))
    operator = Operator(api_server, installation, namespace, client)
    (port,) = free_ports(1)
    with FaultProxy(installation) as proxy:
        environment = {"KUBECONFIG": str(proxy.kubeconfig), "TOKA_HEALTH_PORT": str(port)}
        process = start_operator(api_server, installation, "behind-a-proxy", **environment)
        operator.apply("chat", replicas=1)
        operator.wait_until_ready("chat")
        yield Faulty(operator, proxy, process, port)
        proxy.faults = []
        assert end_operator(api_server, process) == 0
        api_server.kubectl("delete", "namespace", namespace, "--wait=false")


def is_settled(operator: Operator, name: str, replicas: int) -> bool:
    found = operator.require("td", name)
    status = found.get("status", {})
    conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
    sets = operator.sets(name).values()
    is_seen = status.get("observedGeneration") == found["metadata"]["generation"]
    has_pods = [s["spec"]["replicas"] for s in sets] == [replicas]
    return is_seen and has_pods and conditions.get("Ready") == "True" and operator.get("service", name) is not None


@pytest.mark.parametrize("case", FAULTS)
def test_it_goes_on_when_the_api_server_answers_again(faulty: Faulty, case: str) -> None:
    operator, name = faulty.operator, f"new-{list(FAULTS).index(case)}"
    replicas = 3 - int(operator.require("td", "chat")["spec"]["replicas"])
    faulty.proxy.faults = FAULTS[case]
    operator.kubectl("scale", "td/chat", f"--replicas={replicas}")
    operator.kubectl("delete", "service", "chat")
    operator.apply(name)
    time.sleep(FAULT_S)
    faulty.proxy.faults = []
    recovered = time.monotonic()
    operator.wait_for(lambda: is_settled(operator, "chat", replicas), "the changes to be made")
    operator.wait_for(lambda: is_settled(operator, name, 1), "the new object to be ready")
    print(f"{case}: converged {time.monotonic() - recovered:.1f} s after recovery")
    assert faulty.process.is_running()
    assert faulty.probe("/livez") == (200, "ok")
    log = faulty.process.log()
    assert "event=defect" not in log
    assert "Traceback" not in log
    operator.kubectl("delete", "td", name, "--wait=false")


def test_a_crd_that_was_deleted_and_applied_again_is_watched_again(faulty: Faulty) -> None:
    operator = faulty.operator
    operator.kubectl("delete", "crd", "tokadeployments.toka.dev")
    operator.wait_for(lambda: faulty.probe("/readyz")[0] == 503, "it to say that it sees no objects")
    assert faulty.probe("/livez") == (200, "ok"), "a restart would not help"
    operator.server.kubectl("apply", "-f", str(REPOSITORY / "crds" / "tokadeployments.yaml"))
    operator.server.kubectl("wait", "--for=condition=Established", "crd/tokadeployments.toka.dev")
    applied = time.monotonic()
    operator.wait_for(lambda: _can_apply(operator, "after"), "the API server to serve it")
    operator.wait_for(lambda: is_settled(operator, "after", 1), "the new object to be ready")
    operator.kubectl("scale", "td/after", "--replicas=2")
    operator.wait_for(lambda: is_settled(operator, "after", 2), "the change to be made")
    print(f"converged {time.monotonic() - applied:.1f} s after the CRD was there")
    assert faulty.process.is_running()
    operator.wait_for(lambda: faulty.probe("/readyz") == (200, "ok"), "it to be ready")


def _can_apply(operator: Operator, name: str) -> bool:
    operator.apply(name)
    return True


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
        operator.kubectl("scale", "td/chat", "--replicas=1")
        operator.wait_for(lambda: proxy.num_waiting > 0, "the first leader's write to be on its way")
        second = operator.start()
        operator.wait_for(lambda: "held=True" in second.log(), "the second to lead")
        operator.kubectl("scale", "td/chat", "--replicas=3")
        operator.wait_for(lambda: is_settled(operator, "chat", 3), "the second leader to have acted")
        proxy.faults = [Fault(500, "toka-operator", only="writes")]
        operator.wait_for(lambda: proxy.num_waiting == 0, "the late write to arrive")
        time.sleep(1.0)
        assert operator.require("statefulset", name)["spec"]["replicas"] == 3
        assert not [p for p in operator.pods("chat") if p["metadata"].get("deletionTimestamp")]
        first.kill()
        operator.processes.remove(first)
    operator.stop()


@pytest.fixture
def roles(api_server: ApiServer, installation: Path) -> Iterator[tuple[list[Operator], dict[str, str]]]:
    """Two namespaces with a Role of the chart's each, what a test asks of them, and the operator's settings."""
    system = api_server.create_namespace("toka-roles", pod_security="restricted")
    names = [api_server.create_namespace(f"watched-{letter}") for letter in "ab"]
    values = f"replicas=0,crds.install=false,watchNamespaces={{{','.join(names)}}}"
    api_server.helm("install", "roles", str(CHART), "--namespace", system, "--set", values)
    kubeconfig = api_server.service_account_kubeconfig(system, "roles-operator")
    client = config.new_client_from_config(str(api_server.kubeconfig))
    operators = [Operator(api_server, kubeconfig, name, client) for name in names]
    (port,) = free_ports(1)
    yield (
        operators,
        {"TOKA_WATCH_NAMESPACES": ",".join(names), "TOKA_NAMESPACE": system, "TOKA_HEALTH_PORT": str(port)},
    )
    api_server.kubectl("delete", "namespace", system, *names, "--wait=false", "--ignore-not-found")


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
        each.kubectl("scale", "td/chat", "--replicas=3")
        each.wait_until_ready("chat")
        assert pod_uids(each) >= before[(kept, lost).index(each)]
    assert "is there already" not in process.log()
    api_server.kubectl("delete", "namespace", lost.namespace)
    kept.kubectl("scale", "td/chat", "--replicas=1")
    kept.wait_until_ready("chat")
    process = restart(process, "roles-3")
    kept.kubectl("scale", "td/chat", "--replicas=2")
    kept.wait_until_ready("chat")
    api_server.wait_for(lambda: lost.namespace in probe(port, "/readyz")[1], "the lost namespace to be named")
    status, text = probe(port, "/readyz")
    assert (status, kept.namespace in text) == (200, False)
    assert "toka_operator_unwatched_namespaces 1.0" in probe(port, "/metrics")[1]
    assert end_operator(api_server, process) == 0
