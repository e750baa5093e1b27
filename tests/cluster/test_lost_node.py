"""A node that dies for good takes no engine with it for long: real node, taint and StatefulSet controllers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.cluster.harness.api_only import ApiServer, free_ports
from tests.cluster.operating import Json, Operator, install

FULL_AGAIN_S = 90.0
LOST_AFTER_S = 20
"""Seconds until a silent node is lost, as in `Cluster`; Kubernetes' default is 50 s."""


DOOMED = "simulated-1"
NAMES = ("one", "two", "four")


@pytest.fixture
def lonely_operator() -> Iterator[Operator]:
    """An operator on a server of its own with two nodes, which notices lost ones soon."""
    server = ApiServer.start(f"lost-{os.getpid()}")
    try:
        server.run.processes["kube-controller-manager"].terminate()
        (port,) = free_ports(1)
        soon = [f"--node-monitor-grace-period={LOST_AFTER_S}s", "--node-monitor-period=2s"]
        server.spawn_control("impatient-controller-manager", [*server.control.controller_manager(port), *soon])
        server.simulate_nodes(1)
        server.simulate_nodes(1, simulator="doomed")
        kubeconfig = install(server)
        namespace = server.create_namespace("models")
        operator = Operator(server, kubeconfig, namespace)
        operator.start()
        yield operator
        operator.stop()
    finally:
        server.stop()


def on_the_doomed_node() -> Json:
    """There rather than elsewhere, as long as it is there."""
    term = {"key": "kubernetes.io/hostname", "operator": "In", "values": [DOOMED]}
    rather = {"weight": 100, "preference": {"matchExpressions": [term]}}
    return {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [rather]}}}


def on_doomed(operator: Operator) -> set[str]:
    """uids of the pods on the node that dies."""
    pods = [pod for name in NAMES for pod in operator.pods(name)]
    return {pod["metadata"]["uid"] for pod in pods if pod["spec"].get("nodeName") == DOOMED}


@pytest.mark.slow
def test_replicas_of_a_node_that_dies_for_good_are_full_again_within_90_s(lonely_operator: Operator) -> None:
    operator = lonely_operator
    spread = {"topologySpread": [{"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}]}
    for name, replicas in zip(NAMES, (1, 2, 4), strict=True):
        operator.apply(name, replicas=replicas, scheduling=on_the_doomed_node() if replicas == 1 else spread)
        operator.wait_until_ready(name)
    lost = on_doomed(operator)
    assert len(lost) == 4
    died = time.monotonic()
    operator.server.kill_control("kwok-doomed")
    operator.server.wait_for(lambda: not lost & on_doomed(operator), "the dead pods to be gone", FULL_AGAIN_S)
    for name in NAMES:
        operator.wait_until_ready(name)
    assert on_doomed(operator) == set()
    print(f"full again after {time.monotonic() - died:.0f} s")
    assert time.monotonic() - died < FULL_AGAIN_S
