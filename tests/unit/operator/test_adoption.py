"""Children that lost their owner: which are taken back, and what becomes of the others."""

from __future__ import annotations

from typing import Any

import pytest
from toka_operator.errors import ApiError

from tests.unit.operator.fakes import World

Json = dict[str, Any]
OURS = [{"manager": "toka-operator", "operation": "Update"}]
THEIRS = [{"manager": "kubectl-client-side-apply", "operation": "Update"}]


def orphaned(managers: list[Json]) -> World:
    """An object whose children have all been made, and then lost their owner."""
    world = World(taken_name_retry_s=30.0)
    world.put(suspend=True)
    world.show()
    world.reconcile()
    for address, obj in list(world.cluster.objects.items()):
        if address[0] != "TokaDeployment":
            metadata = {k: v for k, v in obj["metadata"].items() if k != "ownerReferences"}
            world.cluster.store({**obj, "metadata": {**metadata, "managedFields": managers}})
    world.show()
    world.cluster.writes.clear()
    return world


def owners(world: World) -> set[str]:
    objects = [obj for (kind, _, _), obj in world.cluster.objects.items() if kind not in ("TokaDeployment", "Event")]
    return {owner["uid"] for obj in objects for owner in obj["metadata"].get("ownerReferences", [{"uid": ""}])}


def test_children_that_an_operator_made_are_taken_back_by_one_patch_each() -> None:
    world = orphaned(OURS)
    world.reconcile()
    assert "" not in owners(world)
    assert {verb for verb, kind in world.cluster.writes if kind != "TokaDeployment"} == {"patch"}
    assert world.condition("Degraded")["status"] == "False"


def test_copies_that_somebody_else_made_are_left_alone_and_told() -> None:
    world = orphaned(THEIRS)
    world.reconcile()
    assert owners(world) == {""}
    assert world.condition("Degraded")["reason"] == "NameTaken"
    assert not [verb for verb, kind in world.cluster.writes if verb == "patch"]


@pytest.mark.parametrize("kind", ["Service", "ServiceAccount"])
def test_a_child_that_may_not_be_taken_back_is_told_and_holds_up_no_other(kind: str) -> None:
    """An admission plugin asks for rights that the operator lacks."""
    world = orphaned(OURS)

    def refuse(verb: str, body: Json) -> ApiError | None:
        is_it = verb == "patch" and body["kind"] == kind
        return ApiError(403, "Forbidden", "cannot set an ownerRef on a resource you can't delete") if is_it else None

    world.cluster.refuse = refuse
    world.reconcile()
    assert kind in world.condition("Degraded")["message"]
    assert owners(world) == {"", world.cluster.objects["TokaDeployment", "apps", "chat"]["metadata"]["uid"]}
