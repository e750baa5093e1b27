"""One cluster of two nodes with the operator installed, for the whole session; a namespace for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.fixtures import two_node_cluster
from tests.e2e.installation import Installation

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
