"""A model in an image, where the API server knows image volumes, and where it does not."""

from __future__ import annotations

import pytest
from toka_operator.advice import ADVICE
from toka_operator.errors import ApiError
from toka_operator.podspec import IMAGE_VOLUMES_DROPPED

from tests.unit.operator.fakes import World

SOURCE = {"source": "oci://registry.example/org/tiny:v1"}
OWN_VOLUME = {"volumes": [{"name": "more", "image": {"reference": "registry.example/more:1"}}]}


def sets_of(world: World) -> list[str]:
    return [name for kind, _, name in world.cluster.objects if kind == "StatefulSet"]


def run_pass(world: World) -> None:
    world.show()
    world.reconcile()


def test_no_pod_is_made_without_its_model_where_the_api_server_drops_image_volumes() -> None:
    world = World()
    world.cluster.drops_image_volumes = True
    world.put(model=SOURCE)
    run_pass(world)
    assert sets_of(world) == []
    degraded = world.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "ImageVolumesUnsupported")
    assert f"{IMAGE_VOLUMES_DROPPED} (model)" in degraded["message"]
    assert degraded["message"].endswith(f"{ADVICE['ImageVolumesUnsupported']}.")
    assert world.condition("ConfigValid")["status"] == "False"


def test_it_is_tried_again_and_made_once_the_api_server_knows_image_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("toka_operator.refusals.time.monotonic", lambda: now)
    world = World()
    world.cluster.drops_image_volumes = True
    world.put(model=SOURCE)
    world.show()
    for wait_s in (5.0, 10.0, 20.0):
        assert world.reconcile() == pytest.approx(wait_s)
        now += wait_s
        world.show()
    world.cluster.drops_image_volumes = False
    world.reconcile()
    assert len(sets_of(world)) == 1
    run_pass(world)
    assert world.condition("Degraded")["status"] == "False"


def test_a_pod_that_serves_stays_while_a_model_in_an_image_cannot_replace_it() -> None:
    world = World()
    world.put()
    run_pass(world)
    (old,) = sets_of(world)
    world.cluster.drops_image_volumes = True
    world.put(model=SOURCE)
    run_pass(world)
    assert sets_of(world) == [old]
    assert world.cluster.objects["StatefulSet", "apps", old]["spec"]["replicas"] == 1


@pytest.mark.parametrize(
    ("spec", "trials"),
    [({"model": SOURCE}, 1), ({"podTemplate": OWN_VOLUME}, 1), ({"model": {"source": "pvc://claim"}}, 0), ({}, 0)],
)
def test_only_a_set_with_image_volumes_costs_a_trial(spec: dict[str, object], trials: int) -> None:
    world = World()
    world.put(**spec)
    run_pass(world)
    run_pass(world)
    assert world.cluster.trials == ["StatefulSet"] * trials
    assert len(sets_of(world)) == 1


def test_an_api_server_older_than_image_volumes_is_told_as_one() -> None:
    world = World()
    words = 'strict decoding error: unknown field "spec.template.spec.volumes[2].image"'
    error = ApiError(400, "BadRequest", f'StatefulSet in version "v1" cannot be handled: {words}')
    world.cluster.refuse = lambda verb, body: error if body["kind"] == "StatefulSet" else None
    world.put(model=SOURCE)
    run_pass(world)
    degraded = world.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "ImageVolumesUnsupported")
    assert words in degraded["message"]
