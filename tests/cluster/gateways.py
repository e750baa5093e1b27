"""The kinds Gateway, HTTPRoute and InferencePool on a test's API server, by the definitions of those who define them.

There is no gateway: what one would write into an HTTPRoute's status, `accept` writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.definitions import require_definition
from tests.cluster.operating import Json, Operator

NAMES = {
    "Gateway": "gateways.gateway.networking.k8s.io",
    "HTTPRoute": "httproutes.gateway.networking.k8s.io",
    "InferencePool": "inferencepools.inference.networking.k8s.io",
}


@contextmanager
def with_kinds(server: ApiServer, *kinds: str) -> Iterator[None]:
    """The API server has these kinds meanwhile."""
    names = [NAMES[kind] for kind in kinds]
    for kind in kinds:
        # An annotation, as an apply by the client makes it, would be too long.
        server.kubectl("apply", "--server-side", "-f", str(require_definition(kind)))
    server.wait_for(lambda: all(_is_served(server, name) for name in names), f"{kinds} to be served")
    try:
        yield
    finally:
        server.kubectl("delete", "crd", *names, "--ignore-not-found")


def _is_served(server: ApiServer, name: str) -> bool:
    """Whether objects of a kind can be listed: some time after its definition is Established it is served, and then
    the API server makes room for it and answers 429, which is a failure of `find`."""
    plural, _, group = name.partition(".")
    return server.find(f"/apis/{group}/v1/{plural}") is not None


@pytest.fixture
def gateway_kinds(api_server: ApiServer) -> Iterator[None]:
    """The API server has HTTPRoutes and InferencePools during the test."""
    with with_kinds(api_server, "HTTPRoute", "InferencePool"):
        yield


def make_gateway(operator: Operator, name: str) -> None:
    """Makes a Gateway of which no controller knows."""
    listener = {"name": "http", "port": 80, "protocol": "HTTP"}
    gateway: Json = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": name}}
    spec = {"gatewayClassName": "nobodys", "listeners": [listener]}
    operator.server.apply({**gateway, "spec": spec}, namespace=operator.namespace)


def accept(operator: Operator, name: str, message: str = "") -> None:
    """Writes what each Gateway of an HTTPRoute would: that it accepts the route, or, with a message, does not."""
    route = operator.require("httproute", name)
    status = "False" if message else "True"
    condition: Json = {"status": status, "reason": "Said", "message": message or "ok"}
    condition |= {"lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": route["metadata"]["generation"]}
    parents = [
        {
            "parentRef": parent,
            "controllerName": "example.com/gateway",
            "conditions": [{**condition, "type": kind} for kind in ("Accepted", "ResolvedRefs")],
        }
        for parent in route["spec"]["parentRefs"]
    ]
    operator.edit("httproute", f"{name}/status", {"status": {"parents": parents}})
