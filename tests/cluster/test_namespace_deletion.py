"""A namespace full of objects is deleted: all of it goes, nothing is made anew in it, and others are left alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.cluster.operating import PATHS, Json, Operator, deployment

NUM_OBJECTS = 50
SPEC: Json = {
    "model": {"source": "builtin://smollm2"},
    "resources": {"device": "cpu"},
    "replicas": 2,
    "networkPolicy": {"mode": "Ingress"},
    "rollout": {"minReadySeconds": 0},
}
LEFT_OUT = {"podmonitor", "inferencepool", "httproute"}
"""Kinds that this cluster need not have."""


@pytest.fixture
def doomed(operator: Operator) -> Iterator[str]:
    """A namespace with fifty objects that are ready."""
    server = operator.server
    name = server.create_namespace(f"doomed-{operator.namespace[-6:]}")
    operator.num_edits = 15 * NUM_OBJECTS
    server.apply(*[deployment(f"chat-{n}", **SPEC) for n in range(NUM_OBJECTS)], namespace=name)

    def are_ready() -> bool:
        found = server.list_objects("tokadeployments", name)
        told = [{c["type"]: c["status"] for c in each.get("status", {}).get("conditions", [])} for each in found]
        return len(found) == NUM_OBJECTS and all(each.get("Ready") == "True" for each in told)

    server.wait_for(are_ready, "fifty objects to be ready", timeout_s=200.0, poll_s=0.5)
    yield name
    server.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")


def count_left(operator: Operator, namespace: str) -> dict[str, int]:
    """The objects of each kind that are left in a namespace."""
    kinds = PATHS.keys() - LEFT_OUT
    counts = {kind: len(operator.server.request("GET", PATHS[kind].format(namespace))["items"]) for kind in kinds}
    counts["serviceaccount"] -= counts["serviceaccount"] and 1  # the namespace's own
    return {kind: count for kind, count in counts.items() if count}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_namespace_with_fifty_objects_goes_with_all_that_is_in_it(operator: Operator, doomed: str) -> None:
    operator.apply("bystander", replicas=2)
    operator.wait_until_ready("bystander")
    uids = {pod["metadata"]["uid"] for pod in operator.pods("bystander")}
    before = count_left(operator, doomed)
    assert (before["td"], before["pod"], before["statefulset"]) == (NUM_OBJECTS, 2 * NUM_OBJECTS, NUM_OBJECTS)
    began = time.monotonic()
    operator.server.kubectl("delete", "namespace", doomed, "--wait=false")
    operator.server.wait_for(
        lambda: operator.server.find(f"/api/v1/namespaces/{doomed}") is None, "the namespace to be gone", 300.0
    )
    print(f"{NUM_OBJECTS} objects, {before}: gone after {time.monotonic() - began:.1f} s")
    assert count_left(operator, doomed) == {}
    time.sleep(2.0)  # whoever makes something anew does it now
    assert operator.server.find(f"/api/v1/namespaces/{doomed}") is None
    assert {pod["metadata"]["uid"] for pod in operator.pods("bystander")} == uids
