"""Fixtures of the cluster tier."""

from tests.cluster.harness.fixtures import api_server, namespace

__all__ = ["api_server", "namespace"]
