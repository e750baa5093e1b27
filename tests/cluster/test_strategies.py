"""Pods are replaced where there is no room for one more: in place, all at once, or after a surge that found none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.operating import Json, Operator, pod_uids
from tests.cluster.recording import is_serving, record

SCARCE = {"device": "gpu", "gpuResource": "example.com/pair"}


@pytest.fixture(autouse=True)
def two_gpus(operator: Operator) -> None:
    """Only one node has any, and only two."""
    operator.server.give_node("example.com/pair", 2)


def begin(operator: Operator, **rollout: Any) -> str:
    """Two replicas that hold both GPUs. Returns their revision."""
    operator.apply("chat", replicas=2, resources=SCARCE, rollout=rollout)
    return str(operator.wait_until_ready("chat")["status"]["currentRevision"])


def revision_of_pod(pod: Json) -> str:
    return str(pod["metadata"]["labels"]["toka.dev/revision"])


def num_running(operator: Operator) -> int:
    return sum(map(is_serving, operator.pods("chat")))


def wait_for_the_end(operator: Operator, old: str) -> None:
    """Waits until another revision than `old` serves alone."""

    def is_over() -> bool:
        found = operator.require("td", "chat")["status"]
        reasons = {c["type"]: c["reason"] for c in found["conditions"]}
        return reasons["Ready"] == "AllAvailable" and found["currentRevision"] != old

    operator.wait_for(is_over, "the rollout to end")


def test_in_place_an_old_pod_goes_first_one_at_a_time(operator: Operator) -> None:
    old = begin(operator, strategy="InPlace")
    with record(operator, "pod") as pods:
        operator.patch("chat", engine={"pageSize": 32})
        wait_for_the_end(operator, old)
    assert max(map(len, pods.states)) <= 3, "with one that goes, whose GPU the next waits for"
    assert min(pods.count(is_serving)) == 1
    assert operator.require("pdb", "chat")["spec"]["minAvailable"] == 1


def test_recreated_pods_wait_until_every_old_one_is_gone(operator: Operator) -> None:
    old = begin(operator, strategy="Recreate")
    kept = operator.pods("chat")[0]["metadata"]["name"]
    operator.hold_pod(kept)
    operator.patch("chat", engine={"pageSize": 32})
    operator.wait_for(lambda: [p["metadata"]["name"] for p in operator.pods("chat")] == [kept], "the other pod to go")
    operator.wait_for_condition("chat", "Available", "False")
    assert {revision_of_pod(pod) for pod in operator.pods("chat")} == {old}
    operator.release_pod(kept)
    assert operator.wait_until_ready("chat")["status"]["currentRevision"] != old
    assert num_running(operator) == 2


def test_a_surge_that_finds_no_room_for_as_long_as_asked_takes_an_old_pod_first_and_says_so(operator: Operator) -> None:
    old = begin(operator, surgeFallbackSeconds=4)
    with record(operator, "pod") as pods:
        operator.patch("chat", engine={"pageSize": 32})
        blocked = operator.wait_for_condition("chat", "Progressing", "True", "SurgeBlocked")
        assert "An old pod goes first after rollout.surgeFallbackSeconds (4 s)" in blocked["message"]
        assert num_running(operator) == 2
        wait_for_the_end(operator, old)
    assert min(pods.count(is_serving)) == 1
    events = operator.server.list_objects("events", operator.namespace)
    assert "SurgeBlocked" in {event["reason"] for event in events}


def test_another_strategy_replaces_no_pod(operator: Operator) -> None:
    begin(operator)
    before = pod_uids(operator)
    rollouts: list[Json] = [
        {"strategy": "InPlace"},
        {"strategy": "Recreate", "onFailure": "Rollback"},
        {"strategy": "Surge", "surgeFallbackSeconds": 60},
    ]
    for rollout in rollouts:
        operator.patch("chat", rollout=rollout)
        operator.wait_until_ready("chat")
        assert pod_uids(operator) == before
