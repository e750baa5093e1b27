"""Pytest fixtures: import them in a conftest.py (`from tests.cluster.harness.fixtures import api_server`).

`api_server` -- an `ApiServer`, one per session, about four seconds. Each test takes a namespace of its own:

    async def test_a_service_is_made(api_server: ApiServer, namespace: str) -> None:
        api_server.kubectl("apply", "-f", "crds/tokadeployments.yaml")
        operator = api_server.spawn_python("operator", ["-m", "toka_operator"], {"TOKA_NAMESPACE": namespace})
        api_server.apply(deployment, namespace=namespace)
        api_server.wait_for(lambda: api_server.get("service", "smollm2", namespace), "the Service")
        assert operator.terminate() == 0

`kubernetes.config.load_kube_config(str(api_server.kubeconfig))` gives Python's client the same server.
`api_server.simulate_nodes(2, gpus_each=8)` makes pods run; `restart_api_server`, `stop_api_server` and
`start_api_server` break it; `audit_events(user)` tells who asked what.

`cluster`, `two_node_cluster` -- a `Cluster` with one or two real nodes, one per session each.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.outside import VARIABLE, OutsideServer


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    """A real API server without nodes; or the cluster that TOKA_TEST_KUBECONFIG names."""
    outside = os.environ.get(VARIABLE)
    server = OutsideServer.connect(outside) if outside else ApiServer.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real cluster of one node."""
    running = Cluster.start(1)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def two_node_cluster() -> Iterator[Cluster]:
    """A real cluster of two nodes."""
    running = Cluster.start(2)
    yield running
    running.stop()


@pytest.fixture
def namespace(api_server: ApiServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace on `api_server`, named after the test; its deletion is begun, not awaited."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40].rstrip("-")
    name = api_server.create_namespace(f"{words}-{uuid.uuid4().hex[:6]}")
    yield name
    api_server.delete_namespace(name)
