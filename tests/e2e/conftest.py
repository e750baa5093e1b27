"""One cluster of two nodes with the operator installed, for the whole session, and what the tests share on it.

An engine takes ten seconds to start, so the tests share one deployment, which each of them leaves serving, and the
objects that cannot work are applied all at once, so that their causes come while others are looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.fixtures import two_node_cluster
from tests.e2e.installation import Deployment, Installation

__all__ = ["two_node_cluster"]


@pytest.fixture(scope="session")
def installation(two_node_cluster: Cluster) -> Installation:
    """The operator, installed from the images that the working tree's Dockerfile gives."""
    return Installation.install(two_node_cluster)


@pytest.fixture
def namespace(installation: Installation, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace where Pod Security `restricted` is enforced; emptied afterwards, so that pods do not pile up."""
    name = installation.new_namespace(request.node.name)
    yield name
    installation.cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def example(installation: Installation, record_testsuite_property: Callable[[str, object], None]) -> Deployment:
    """examples/smollm2.yaml, applied as it is and ready; then with engines of one thread, because two that share
    busy cores with other engines wait for each other at every layer."""
    namespace = installation.new_namespace("example")
    applied = time.monotonic()
    smollm2 = installation.example(namespace)
    smollm2.wait_until_ready()
    record_testsuite_property("seconds_from_apply_to_ready", round(time.monotonic() - applied, 1))
    before = {pod["metadata"]["uid"] for pod in smollm2.pods()}
    smollm2.patch({"engine": {"extraArgs": ["num_threads=1"]}})
    installation.cluster.wait_for(
        lambda: before.isdisjoint(pod["metadata"]["uid"] for pod in smollm2.pods()),
        f"other pods: {smollm2.explain}",
        timeout_s=300,
    )
    return smollm2


@pytest.fixture
def smollm2(example: Deployment) -> Deployment:
    """The shared deployment, ready, whatever the test before has left of it."""
    example.wait_until_ready()
    return example


@pytest.fixture(scope="session")
def broken(installation: Installation) -> dict[str, Deployment]:
    """Deployments that cannot work, by what is wrong with them."""
    namespace = installation.new_namespace("broken")
    missing = {"name": "certificates", "secret": {"secretName": "certificates"}}
    additions = {"volumes": [missing], "volumeMounts": [{"name": "certificates", "mountPath": "/certificates"}]}
    specs: dict[str, dict[str, Any]] = {
        "image": {"engine": {"image": "10.243.0.1:5000/toka-engine:never-built"}},
        # Less than the first process needs of its own: near a limit the kernel drops pages of libraries and reads them
        # again, for minutes if they are not in memory yet.
        "memory": {"resources": {"device": "cpu", "memory": "64Mi"}},
        "gpu": {"resources": {"device": "gpu", "memory": "2Gi"}},
        "secret": {"podTemplate": additions},
    }
    return {name: installation.deploy(namespace, name, **spec) for name, spec in specs.items()}
