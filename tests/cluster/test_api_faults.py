"""The operator goes on without a restart, whatever becomes of requests and streams between it and the API server.

One operator runs through a proxy for all cases of the table. In each, while requests go wrong, an object is changed,
a child is deleted and a new object is created; when they go right again, everything is as it should be soon.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.harness.api_only import ApiServer, free_ports
from tests.cluster.harness.paths import REPOSITORY
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import (
    Operator,
    check_passes,
    count_passes,
    end_operator,
    has_replicas,
    probe,
    start_operator,
)
from tests.cluster.proxy import CUT, DELAY, FREEZE, HANG, Fault, FaultProxy, error_event

FAULT_S, FAULT_OF_ALL_S = 1.0, 2.0
"""Seconds that a fault lasts: longer if it befalls the Lease too, which is renewed every second."""
WATCH_S = 5
"""Seconds until a watch is renewed, where the default is 25: so much sooner is a silent one found out."""
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


@pytest.fixture(scope="module")
def faulty(api_server: ApiServer, installation: Path) -> Iterator[Faulty]:
    namespace = api_server.create_namespace("api-faults")
    operator = Operator(api_server, installation, namespace)
    (port,) = free_ports(1)
    with FaultProxy(installation) as proxy:
        environment = {"KUBECONFIG": str(proxy.kubeconfig), "TOKA_HEALTH_PORT": str(port)}
        environment["TOKA_WATCH_SECONDS"] = str(WATCH_S)
        process = start_operator(api_server, installation, "behind-a-proxy", **environment)
        operator.apply("chat", replicas=1)
        operator.wait_until_ready("chat")
        yield Faulty(operator, proxy, process, port)
        proxy.faults = []
        try:
            check_passes(process, process.started, 0.0, num_tests=len(FAULTS))
        finally:  # it would serve the objects of later tests
            assert end_operator(api_server, process) == 0
            api_server.delete_namespace(namespace)


@pytest.mark.parametrize("case", FAULTS)
def test_it_goes_on_when_the_api_server_answers_again(faulty: Faulty, case: str) -> None:
    operator, name = faulty.operator, f"new-{list(FAULTS).index(case)}"
    replicas = 3 - int(operator.require("td", "chat")["spec"]["replicas"])
    faulty.proxy.faults = FAULTS[case]
    operator.scale("chat", replicas)
    operator.delete_and_wait("service", "chat")
    operator.apply(name)
    time.sleep(FAULT_OF_ALL_S if "everything" in case else FAULT_S)
    faulty.proxy.faults = []
    recovered = time.monotonic()
    operator.wait_for(lambda: has_replicas(operator, "chat", replicas), "the changes to be made")
    operator.wait_for(lambda: has_replicas(operator, name, 1), "the new object to be ready")
    print(f"{case}: converged {time.monotonic() - recovered:.1f} s after recovery")
    assert faulty.process.is_running()
    assert faulty.probe("/livez") == (200, "ok")
    log = faulty.process.log()
    assert "event=defect" not in log
    assert "Traceback" not in log
    operator.delete("td", name)


def test_pods_that_do_not_go_make_no_loop(faulty: Faulty) -> None:
    """The controller manager stands still, so nobody ends the pods of a scaled-down set, and the deadline passes."""
    operator = faulty.operator
    manager = operator.server.run.processes["kube-controller-manager"]
    rollout = {"progressDeadlineSeconds": 11}
    operator.apply("stays", replicas=3, startup={"timeoutSeconds": 10}, rollout=rollout)
    operator.wait_for(lambda: has_replicas(operator, "stays", 3), "its pods")
    manager.send_signal(signal.SIGSTOP)
    try:
        operator.scale("stays", 1)
        time.sleep(13.0)
        before = count_passes(faulty.process)
        time.sleep(5.0)
        assert count_passes(faulty.process) - before <= 6
    finally:
        manager.send_signal(signal.SIGCONT)
    operator.wait_for(lambda: len(operator.pods("stays")) == 1, "two pods to go")
    operator.delete("td", "stays")


def test_a_crd_that_was_deleted_and_applied_again_is_watched_again(faulty: Faulty) -> None:
    operator = faulty.operator
    operator.kubectl("delete", "crd", "tokadeployments.toka.dev")
    operator.wait_for(lambda: faulty.probe("/readyz")[0] == 503, "it to say that it sees no objects")
    assert faulty.probe("/livez") == (200, "ok"), "a restart would not help"
    operator.server.kubectl("apply", "-f", str(REPOSITORY / "crds" / "tokadeployments.yaml"))
    operator.server.kubectl("wait", "--for=condition=Established", "crd/tokadeployments.toka.dev")
    applied = time.monotonic()
    operator.wait_for(lambda: _can_apply(operator, "after"), "the API server to serve it")
    operator.wait_for(lambda: has_replicas(operator, "after", 1), "the new object to be ready")
    operator.scale("after", 2)
    operator.wait_for(lambda: has_replicas(operator, "after", 2), "the change to be made")
    print(f"converged {time.monotonic() - applied:.1f} s after the CRD was there")
    assert faulty.process.is_running()
    operator.wait_for(lambda: faulty.probe("/readyz") == (200, "ok"), "it to be ready")


def _can_apply(operator: Operator, name: str) -> bool:
    operator.apply(name)
    return True
