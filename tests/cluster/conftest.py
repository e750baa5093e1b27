"""Fixtures of the cluster tier."""

from tests.cluster.gateways import gateway_kinds
from tests.cluster.harness.fixtures import api_server, namespace
from tests.cluster.monitors import pod_monitors
from tests.cluster.operating import crd, installation, operator, own_operator, shared_process, without_operator

__all__ = [
    "api_server",
    "crd",
    "gateway_kinds",
    "installation",
    "namespace",
    "operator",
    "own_operator",
    "pod_monitors",
    "shared_process",
    "without_operator",
]
