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


def test_a_warning_makes_its_child_be_asked_about_at_once_and_no_sooner_than_the_backoffs_beginning(
    clock: Clock,
) -> None:
    world = world_without_pods()
    uid, warnings = stateful_set(world)["metadata"]["uid"], world.reconciler.warnings
    for _ in range(30):
        clock.now += 2.0
        world.reconcile()
    num_asked = len(world.cluster.asked)
    while len(world.cluster.asked) == num_asked:
        clock.now += 1.0
        world.reconcile()
    num_asked += 1
    assert warnings.note("another") is None
    assert warnings.note(uid) == ("apps", "chat")
    assert warnings.note(uid) is None, "the pass was called for already"
    world.reconcile()
    assert len(world.cluster.asked) == num_asked, "events were listed just now"
    clock.now += events.ASK_FIRST_S
    world.reconcile()
    assert len(world.cluster.asked) == num_asked + 1
    clock.now += events.ASK_FIRST_S
    world.reconcile()
    assert len(world.cluster.asked) == num_asked + 1, "it is no news any more"
    assert warnings.note(uid) == ("apps", "chat")


def test_children_that_came_and_those_of_a_deleted_object_are_no_longer_heeded(clock: Clock) -> None:
    world = world_without_pods()
    uid, warnings = stateful_set(world)["metadata"]["uid"], world.reconciler.warnings
    world.cluster.store({**stateful_set(world), "status": {"observedGeneration": 1, "replicas": 1}})
    world.show()
    world.reconcile()
    assert warnings.note(uid) is None
    world = world_without_pods()
    uid, warnings = stateful_set(world)["metadata"]["uid"], world.reconciler.warnings
    world.deployments.forget(("apps", "chat"))
    world.reconcile()
    assert warnings.note(uid) is None


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


def ask_when_told(warnings: events.Warnings, clock: Clock, uids: list[str]) -> dict[str, float]:
    """Each object comes again when it was told to; return when its turn came."""
    due, asked = dict.fromkeys(uids, clock.now), {}
    while due:
        uid = min(due, key=lambda each: due[each])
        clock.now = max(clock.now, due[uid])
        wait_s = warnings.turn_in_s(uid)
        due[uid] = clock.now + wait_s
        if wait_s == 0.0:
            asked[uid] = clock.now - 1000.0
            del due[uid]
    return asked


def test_a_thousand_objects_without_pods_are_asked_about_one_after_another(clock: Clock) -> None:
    warnings = events.Warnings(FakeCluster())  # type: ignore[arg-type]
    asked = sorted(ask_when_told(warnings, clock, [f"uid-{n}" for n in range(1000)]).values())
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert min(gaps) > events.LISTS_APART_S * 0.99
    assert asked[-1] < 1000 * events.LISTS_APART_S * 1.1


def test_of_objects_that_ask_at_the_same_moments_none_is_left_out(clock: Clock) -> None:
    """Faults that came together back off together: the same one would be first each time."""
    warnings = events.Warnings(FakeCluster())  # type: ignore[arg-type]
    asked = ask_when_told(warnings, clock, ["a", "b", "c"])
    assert max(asked.values()) < 1.0


def test_objects_that_found_their_pods_keep_no_place(clock: Clock) -> None:
    warnings = events.Warnings(FakeCluster())  # type: ignore[arg-type]
    for number in range(50):
        warnings.turn_in_s(f"well-{number}")
    clock.now += 50 * events.LISTS_APART_S + events.COMES_LATE_S + 1.0
    assert warnings.turn_in_s("ill") == 0.0
