"""A node that dies for good takes no engine with it for long: real node, taint and StatefulSet controllers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest
from kubernetes import config

from tests.cluster.harness.api_only import ApiServer, free_ports
from tests.cluster.operating import Operator, install

FULL_AGAIN_S = 90.0
LOST_AFTER_S = 20
"""As `Cluster` has it; Kubernetes' default is 50 s."""


@pytest.fixture
def lonely_operator() -> Iterator[Operator]:
    """An operator on a server of its own with two nodes, which notices lost ones soon."""
    server = ApiServer.start(f"lost-{os.getpid()}")
    try:
        server.run.processes["kube-controller-manager"].terminate()
        (port,) = free_ports(1)
        soon = [f"--node-monitor-grace-period={LOST_AFTER_S}s", "--node-monitor-period=2s"]
        server.spawn_control("impatient-controller-manager", [*server.control.controller_manager(port), *soon])
        server.simulate_nodes(2)
        kubeconfig = install(server)
        namespace = server.create_namespace("models")
        client = config.new_client_from_config(str(server.kubeconfig))
        operator = Operator(server, kubeconfig, namespace, client)
        operator.start()
        yield operator
        operator.stop()
    finally:
        server.stop()


def test_replicas_of_a_node_that_dies_for_good_are_full_again_within_90_s(lonely_operator: Operator) -> None:
    operator = lonely_operator
    spread = {"topologySpread": [{"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}]}
    for name, replicas in (("one", 1), ("two", 2), ("four", 4)):
        operator.apply(name, replicas=replicas, scheduling=spread)
        operator.wait_until_ready(name)
    (of_one,) = operator.pods("one")
    node = of_one["spec"]["nodeName"]
    lost = {pod["metadata"]["uid"] for name in ("one", "two", "four") for pod in operator.pods(name)}
    lost -= {p["metadata"]["uid"] for n in ("two", "four") for p in operator.pods(n) if p["spec"]["nodeName"] != node}
    assert len(lost) == 4
    died = time.monotonic()
    no_kubelet = json.dumps({"metadata": {"annotations": {"kwok.x-k8s.io/node": None}}})
    operator.server.kubectl("patch", "node", node, "--type=merge", "-p", no_kubelet)
    operator.server.wait_for(
        lambda: not lost & {p["metadata"]["uid"] for n in ("one", "two", "four") for p in operator.pods(n)},
        "the dead pods to be gone",
        FULL_AGAIN_S,
    )
    for name in ("one", "two", "four"):
        operator.wait_until_ready(name)
        assert {pod["spec"]["nodeName"] for pod in operator.pods(name)} == {"simulated-0", "simulated-1"} - {node}
    assert time.monotonic() - died < FULL_AGAIN_S
