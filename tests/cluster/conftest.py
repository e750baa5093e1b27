"""Fixtures of the cluster tier."""

from tests.cluster.harness.fixtures import api_server, namespace
from tests.cluster.operating import installation, operator

__all__ = ["api_server", "installation", "namespace", "operator"]
