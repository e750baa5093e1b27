"""The kind PodMonitor on a test's API server, as far as the operator uses it.

The schema is written after the public one of the Prometheus operator, less the fields that ours does not write. What it
would write beyond them is refused by name, because it asks for strict validation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.harness.api_only import ApiServer

NAME = "podmonitors.monitoring.coreos.com"
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
SPEC = {
    "type": "object",
    "required": ["selector"],
    "properties": {
        "selector": {"type": "object", "properties": {"matchLabels": LABELS}},
        "podMetricsEndpoints": {
            "type": "array",
            "items": {"type": "object", "properties": {"port": {"type": "string"}, "path": {"type": "string"}}},
        },
    },
}
DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": NAME},
    "spec": {
        "group": "monitoring.coreos.com",
        "scope": "Namespaced",
        "names": {"kind": "PodMonitor", "plural": "podmonitors", "singular": "podmonitor"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "required": ["spec"], "properties": {"spec": SPEC}}},
            }
        ],
    },
}


@contextmanager
def with_pod_monitors(server: ApiServer) -> Iterator[None]:
    """The API server has PodMonitors meanwhile."""
    server.apply(DEFINITION)
    server.kubectl("wait", "--for=condition=Established", f"crd/{NAME}")
    try:
        yield
    finally:
        server.kubectl("delete", "crd", NAME, "--ignore-not-found")


@pytest.fixture
def pod_monitors(api_server: ApiServer) -> Iterator[None]:
    """The API server has PodMonitors during the test."""
    with with_pod_monitors(api_server):
        yield
