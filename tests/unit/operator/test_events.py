"""Events: ours are counted up, and others' are asked for only where nothing else says why a pod does not come."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from toka_operator import events
from toka_operator.events import RETRIED_ANNOTATION, Recorder
from toka_operator.resources import Owner
from toka_operator.status import Event

from tests.unit.operator.fakes import FakeCluster, World

Json = dict[str, Any]
OWNER = Owner("apps", "chat", "uid-1", 1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(events.time, "monotonic", found.monotonic)
    return found


def posted(cluster: FakeCluster) -> list[tuple[str, int]]:
    found = (o for (kind, *_), o in cluster.objects.items() if kind == "Event")
    return sorted((event["reason"], event["count"]) for event in found)


def test_an_event_that_comes_again_soon_is_counted_up(clock: Clock) -> None:
    cluster = FakeCluster()
    recorder = Recorder(cluster, "me")  # type: ignore[arg-type]
    for reason in ("Ready", "Unavailable", "Ready", "Unavailable", "Ready"):
        recorder.post(OWNER, Event(False, reason, "as before"))
    assert posted(cluster) == [("Ready", 3), ("Unavailable", 2)]
    recorder.post(OWNER, Event(False, "Ready", "in other words"))
    clock.now += events.SERIES_S + 1
    recorder.post(OWNER, Event(False, "Unavailable", "as before"))
    assert posted(cluster) == [("Ready", 1), ("Ready", 3), ("Unavailable", 1), ("Unavailable", 2)]


def test_an_event_whose_series_was_deleted_is_lost_once_and_then_made_anew(clock: Clock) -> None:
    cluster = FakeCluster()
    recorder = Recorder(cluster, "me")  # type: ignore[arg-type]
    event = Event(False, "Ready", "x")
    recorder.post(OWNER, event)
    cluster.objects.clear()
    recorder.post(OWNER, event)
    recorder.post(OWNER, event)
    assert posted(cluster) == [("Ready", 1)]


def stateful_set(world: World) -> Json:
    (found,) = [o for (kind, *_), o in world.cluster.objects.items() if kind == "StatefulSet"]
    return found


def world_without_pods() -> World:
    """A TokaDeployment whose StatefulSet has made no pod."""
    world = World()
    world.put()
    world.show()
    world.reconcile()
    world.cluster.store({**stateful_set(world), "status": {"observedGeneration": 1, "replicas": 0}})
    world.show()
    world.reconcile()
    return world


def test_missing_pods_are_asked_about_after_a_while_and_less_and_less_often(clock: Clock) -> None:
    world = world_without_pods()
    assert world.cluster.asked == [], "a pod takes a moment"
    asked_at = []
    for _ in range(60):
        clock.now += 2.0
        num_asked = len(world.cluster.asked)
        world.reconcile()
        if len(world.cluster.asked) > num_asked:
            asked_at.append(clock.now - 1000.0)
    assert asked_at[0] <= 4.0
    gaps = [b - a for a, b in itertools.pairwise(asked_at)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == events.ASK_LAST_S
    uid = stateful_set(world)["metadata"]["uid"]
    assert set(world.cluster.asked) == {f"involvedObject.uid={uid},type=Warning"}


def test_refused_pods_are_reported_and_their_controller_is_made_to_try_again(clock: Clock) -> None:
    world = world_without_pods()
    uid = stateful_set(world)["metadata"]["uid"]
    event = {"kind": "Event", "metadata": {"namespace": "apps", "name": "e"}, "involvedObject": {"uid": uid}}
    event |= {"reason": "FailedCreate", "message": "exceeded quota: few"}
    world.cluster.store(event)
    clock.now += 3.0
    world.show()
    world.reconcile()
    assert world.condition("Degraded")["reason"] == "QuotaExceeded"
    assert "exceeded quota: few" in world.condition("Degraded")["message"]
    assert RETRIED_ANNOTATION in stateful_set(world)["metadata"]["annotations"]
    owner = {"controller": True, "uid": uid}
    pod = {"kind": "Pod", "metadata": {"namespace": "apps", "name": f"{stateful_set(world)['metadata']['name']}-0"}}
    labels = stateful_set(world)["spec"]["selector"]["matchLabels"]
    pod["metadata"] |= {"ownerReferences": [owner], "labels": labels}
    world.cluster.store(pod)
    world.show()
    world.reconcile()
    assert world.condition("Degraded")["status"] == "False"
    num_asked = len(world.cluster.asked)
    clock.now += 600.0
    world.reconcile()
    assert len(world.cluster.asked) == num_asked, "nothing is missing"


def test_a_controller_that_has_not_come_round_yet_is_only_slow(clock: Clock) -> None:
    world = world_without_pods()
    world.cluster.store({**stateful_set(world), "status": {"observedGeneration": 0, "replicas": 0}})
    world.show()
    clock.now += 60.0
    world.reconcile()
    assert world.cluster.asked == []


def test_a_thousand_objects_without_pods_are_asked_about_one_after_another(clock: Clock) -> None:
    warnings = events.Warnings(FakeCluster())  # type: ignore[arg-type]
    answers = [warnings.list_about("apps", f"uid-{n}") for n in range(1000)]
    assert answers.count(None) == 999
    clock.now += events.LISTS_APART_S
    assert warnings.list_about("apps", "uid-1") == []
