"""The real scheduler spreads the pods of a TokaDeployment that says nothing about it."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.operating import Operator

NUM_PLAIN = 8
"""Pods put on as many nodes by chance would be one on each in 1 of 400 runs."""
ZONES = {"west": 4, "east": 2}


@pytest.fixture(scope="module")
def pools(api_server: ApiServer) -> None:
    """Nodes without a zone (pool=plain), and others in zones of different sizes (pool=zoned)."""
    existing = len(api_server.list_objects("nodes", selector="type=simulated"))
    api_server.simulate_nodes(NUM_PLAIN + sum(ZONES.values()))
    names = [f"simulated-{existing + i}" for i in range(NUM_PLAIN + sum(ZONES.values()))]
    api_server.kubectl("label", "node", *names[:NUM_PLAIN], "pool=plain")
    api_server.kubectl("label", "node", *names[NUM_PLAIN:], "pool=zoned")
    rest = names[NUM_PLAIN:]
    for zone, size in ZONES.items():
        api_server.kubectl("label", "node", *rest[:size], f"topology.kubernetes.io/zone={zone}")
        rest = rest[size:]


def nodes_of_pods(operator: Operator, pool: str, replicas: int) -> list[str]:
    """The node of each pod, once all run."""
    operator.apply("chat", replicas=replicas, scheduling={"nodeSelector": {"pool": pool}})
    operator.wait_until_ready("chat")
    return [str(pod["spec"]["nodeName"]) for pod in operator.pods("chat")]


def test_on_nodes_without_zones_each_pod_has_a_node_of_its_own(operator: Operator, pools: None) -> None:
    nodes = nodes_of_pods(operator, "plain", NUM_PLAIN)
    assert len(set(nodes)) == NUM_PLAIN


def test_zones_get_the_same_number_of_pods_and_nodes_one_each(operator: Operator, pools: None) -> None:
    nodes = nodes_of_pods(operator, "zoned", 4)
    assert len(set(nodes)) == 4
    found = operator.server.list_objects("nodes", selector="pool=zoned")
    zones = {n["metadata"]["name"]: n["metadata"]["labels"]["topology.kubernetes.io/zone"] for n in found}
    assert Counter(zones[node] for node in nodes) == {"west": 2, "east": 2}
