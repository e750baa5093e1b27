"""spec.data: one claim that outlives revisions, a folder for each ordinal, and what is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from toka_engine.command_line import parse_config
from toka_operator.errors import ApiError
from toka_operator.podspec import render_arguments, render_pod_template
from toka_operator.resources import pod_labels
from toka_operator.rollout import Budgets, RevisionPods, Window, decide_windows
from toka_operator.settings import KIND
from toka_operator.spec import parse

from tests.unit.operator.examples import OWNER, body, child, plan_for, valid
from tests.unit.operator.fakes import World

Json = dict[str, Any]
CLAIM = "PersistentVolumeClaim"
DATA = {"size": "1Gi"}


def template(**spec: Any) -> Json:
    return render_pod_template(valid(**spec), "engine:1", pod_labels("chat", "abc"), "chat")


def claim_of(world: World) -> Json:
    return world.cluster.objects[CLAIM, "apps", "chat-data"]


def converge(world: World) -> None:
    for _ in range(3):
        world.show()
        world.reconcile()


# ---------------------------------------------------------------- the pod


def test_without_a_claim_the_pod_and_its_revision_are_those_of_before() -> None:
    assert valid().fingerprint == valid(data=None).fingerprint
    text = str(template())
    assert not [word for word in ("toka-data", "TOKA_ORDINAL", "podAffinity'") if word in text]
    assert {c["kind"] for c in plan_for(valid()).desired} & {CLAIM} == set()


def test_a_claim_makes_another_revision_and_its_size_class_and_retention_do_not() -> None:
    plain, small = valid().revision, valid(data=DATA).revision
    assert plain != small
    for same in ({"size": "5Gi"}, {"size": "1Gi", "storageClassName": "x"}, {"size": "1Gi", "retention": "Delete"}):
        assert valid(data=same).revision == small
    assert valid(data={"size": "1Gi", "accessMode": "ReadWriteOnce"}).revision == small
    assert valid(data={"size": "1Gi", "accessMode": "ReadWriteMany"}).revision != small
    assert valid(data=DATA).former_revision != valid().former_revision


def test_each_ordinal_has_a_folder_of_its_own_in_the_claim() -> None:
    pod = template(data=DATA)["spec"]
    engine = pod["containers"][0]
    (volume,) = [v for v in pod["volumes"] if v.get("persistentVolumeClaim")]
    assert volume["persistentVolumeClaim"]["claimName"] == "chat-data"
    (mount,) = [m for m in engine["volumeMounts"] if m["name"] == volume["name"]]
    (argument,) = [a for a in engine["args"] if a.startswith("data_dir=")]
    assert argument == f"data_dir={mount['mountPath']}/$(TOKA_ORDINAL)"
    variables = {v["name"]: v for v in engine["env"]}
    assert "pod-index" in variables["TOKA_ORDINAL"]["valueFrom"]["fieldRef"]["fieldPath"]
    peers = [c for c in plan_for(valid(data=DATA)).desired if c["metadata"]["name"] == "chat-peers"]
    assert variables["TOKA_PEERS"]["value"] == "chat-peers"
    assert peers[0]["spec"]["clusterIP"] == "None"
    assert peers[0]["spec"]["publishNotReadyAddresses"], "a pod that drains still has its folder"
    assert parse_config(render_arguments(valid(data=DATA))).data_dir == "/var/lib/toka/$(TOKA_ORDINAL)"


def test_pods_that_share_a_volume_of_one_node_are_kept_on_it_beside_the_users_own_affinity() -> None:
    theirs = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "zone"}]}}
    terms = template(data=DATA, scheduling={"affinity": theirs})["spec"]["affinity"]["podAffinity"]
    first, second = terms["requiredDuringSchedulingIgnoredDuringExecution"]
    assert first == {"topologyKey": "zone"}
    assert second["topologyKey"] == "kubernetes.io/hostname"
    labels = second["labelSelector"]["matchLabels"]
    assert labels.items() <= template(data=DATA)["metadata"]["labels"].items()
    shared = template(data={**DATA, "accessMode": "ReadWriteMany"})["spec"]["affinity"]
    assert "podAffinity" not in shared
    odd = template(data=DATA, scheduling={"affinity": {"podAffinity": "x"}})["spec"]["affinity"]
    assert odd["podAffinity"] == "x", "the API server names what is wrong with it"


def test_data_beside_a_cache_of_one_node_asks_for_the_node_of_the_pods_that_have_the_cache() -> None:
    """The scheduler counts only pods that match all terms: those made before there was data would match one of two, and
    count for nothing."""
    cache = {"type": "SharedPVC", "size": "1Gi", "accessMode": "ReadWriteOnce"}
    before, after = template(cache=cache), template(cache=cache, data=DATA)
    terms = after["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    for pod in (before, after):
        assert all(term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items() for term in terms)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"data": {}}, "spec.data.size"),
        ({"data": {"size": True}}, "spec.data.size"),
        ({"data": {"size": "1Gi", "accessMode": "Any"}}, "spec.data.accessMode"),
        ({"data": {"size": "1Gi", "retention": "Keep"}}, "spec.data.retention"),
        ({"data": DATA, "engine": {"extraArgs": ["data_dir=/x"]}}, "spec.data.size"),
        ({"data": 1}, "spec.data"),
    ],
)
def test_a_faulty_claim_is_named(spec: Json, path: str) -> None:
    errors = parse(body(**spec))
    assert isinstance(errors, list)
    assert path in {error.path for error in errors}


# ---------------------------------------------------------------- the rollout


def keeping(start: int, number: int, available: int | None = None, leaving: tuple[int, ...] = ()) -> RevisionPods:
    there = frozenset(range(start, start + (number if available is None else available))) - frozenset(leaving)
    return RevisionPods(
        Window(start, number), available=there, served=there, leaving=frozenset(leaving), keeps_ordinals=True
    )


def decide(surge: int, unavailable: int, current: str, revisions: dict[str, RevisionPods], number: int = 2) -> Any:
    return decide_windows(Budgets(number, surge, unavailable, keeps_ordinals=True), current, revisions)


def test_a_pod_that_goes_is_succeeded_under_its_own_ordinal() -> None:
    assert decide(1, 0, "a", {"a": keeping(0, 2, leaving=(0,))}) == {"a": Window(0, 2)}
    assert decide(1, 0, "a", {"a": keeping(0, 2, leaving=(0, 1))}) == {"a": Window(0, 2)}


def test_fewer_pods_are_without_the_highest_ordinals() -> None:
    assert decide(1, 0, "a", {"a": keeping(0, 3)}) == {"a": Window(0, 2)}
    paused = Budgets(2, 1, 0, is_paused=True, keeps_ordinals=True)
    assert decide_windows(paused, "b", {"a": keeping(0, 3)}) == {"a": Window(0, 2)}


def test_a_rollout_takes_the_ordinals_over_from_zero_on() -> None:
    assert decide(1, 0, "b", {"a": keeping(0, 2)}) == {"a": Window(0, 2), "b": Window(0, 1)}
    assert decide(1, 0, "b", {"a": keeping(0, 2), "b": keeping(0, 1)}) == {"a": Window(1, 1), "b": Window(0, 1)}
    without_surge = decide(0, 1, "b", {"a": keeping(0, 2)})
    assert without_surge == {"a": Window(1, 1), "b": Window(0, 0)}, "the old pod lets go before its successor is made"


def test_going_back_ends_with_the_ordinals_from_zero_on() -> None:
    halfway = {"a": keeping(1, 1), "b": keeping(0, 1)}
    assert decide(1, 0, "a", halfway)["a"] == Window(0, 2)
    assert decide(1, 0, "a", {"a": keeping(1, 1)}, number=1)["a"] == Window(0, 2), "ordinal 1 goes once 0 is there"
    assert decide(1, 0, "a", {"a": keeping(0, 2)}, number=1)["a"] == Window(0, 1)


# ---------------------------------------------------------------- the claim


def test_a_claim_that_stays_has_no_owner_and_one_that_goes_has_it() -> None:
    kept, gone = (child(plan_for(valid(data={**DATA, "retention": r})), CLAIM) for r in ("Retain", "Delete"))
    assert kept["metadata"]["ownerReferences"] == []
    assert gone["metadata"]["ownerReferences"] == [OWNER.reference()]
    assert kept["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}


def test_the_claim_is_made_once_and_left_alone() -> None:
    world = World()
    world.put(data=DATA)
    converge(world)
    world.cluster.writes.clear()
    converge(world)
    assert world.cluster.writes == []


def test_retention_may_change_and_owners_of_others_stay() -> None:
    world = World()
    world.put(data=DATA)
    converge(world)
    theirs = {"apiVersion": "v1", "kind": "Backup", "name": "b", "uid": "u"}
    world.cluster.store({**claim_of(world), "metadata": {**claim_of(world)["metadata"], "ownerReferences": [theirs]}})
    world.put(data={**DATA, "retention": "Delete"})
    converge(world)
    uid = world.cluster.objects[KIND, "apps", "chat"]["metadata"]["uid"]
    assert [owner["uid"] for owner in claim_of(world)["metadata"]["ownerReferences"]] == ["u", uid]
    world.put(data=DATA)
    converge(world)
    assert [owner["uid"] for owner in claim_of(world)["metadata"]["ownerReferences"]] == ["u"]


def test_a_claim_grows_and_keeps_what_the_api_server_filled_in() -> None:
    world = World()
    world.put(data=DATA)
    converge(world)
    live = claim_of(world)
    world.cluster.store({**live, "spec": {**live["spec"], "storageClassName": "fast", "volumeMode": "Filesystem"}})
    world.put(data={"size": "2048Mi"})
    converge(world)
    spec = claim_of(world)["spec"]
    assert spec["resources"]["requests"]["storage"] == "2048Mi"
    assert spec["storageClassName"] == "fast"


def test_a_claim_that_cannot_grow_is_told_in_the_api_servers_words() -> None:
    world = World()
    world.put(data=DATA)
    converge(world)
    words = "only dynamically provisioned pvc can be resized"
    world.cluster.refuse = lambda verb, body: (
        ApiError(403, "Forbidden", words) if (verb, body["kind"]) == ("patch", CLAIM) else None
    )
    world.put(data={"size": "2Gi"})
    converge(world)
    assert world.condition("ConfigValid")["reason"] == "ChildRejected"
    assert words in world.condition("ConfigValid")["message"]


def test_a_new_object_of_the_name_takes_over_the_claim_that_stayed() -> None:
    world = World()
    world.put(data=DATA)
    converge(world)
    uid = claim_of(world)["metadata"]["uid"]
    for address in [a for a in world.cluster.objects if a[0] != CLAIM]:
        del world.cluster.objects[address]
        world.deployments.forget(address[1:])
        if address[0] in world.stores:
            world.stores[address[0]].forget(address[1:])
    world.cluster.writes.clear()
    spec = body(data=DATA)["spec"]
    world.cluster.store({"kind": KIND, "metadata": {"namespace": "apps", "name": "chat", "uid": "uid-2"}, "spec": spec})
    converge(world)
    assert claim_of(world)["metadata"]["uid"] == uid
    assert ("create", "StatefulSet") in world.cluster.writes
    assert not [kind for _, kind in world.cluster.writes if kind == CLAIM]


def test_no_pod_writes_into_somebody_elses_claim() -> None:
    world = World()
    theirs = {"kind": CLAIM, "metadata": {"namespace": "apps", "name": "chat-data"}, "spec": {}}
    world.cluster.store(theirs)
    world.put(data=DATA)
    world.deployments.put({**world.cluster.objects[KIND, "apps", "chat"]})
    world.reconcile()
    world.reconcile()
    assert world.condition("Degraded")["reason"] == "NameTaken"
    assert "chat-data" in world.condition("Degraded")["message"]
    assert not [a for a in world.cluster.objects if a[0] == "StatefulSet"]


# ---------------------------------------------------------------- what is told


def pending_pod(world: World, **condition: str) -> Json:
    (made,) = [o for (kind, _, _), o in world.cluster.objects.items() if kind == "StatefulSet"]
    metadata = {"namespace": "apps", "name": made["metadata"]["name"] + "-0", "uid": "uid-pod"}
    metadata["labels"] = made["spec"]["template"]["metadata"]["labels"]
    metadata["ownerReferences"] = [{"kind": "StatefulSet", "uid": made["metadata"]["uid"], "controller": True}]
    waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", **condition}
    return {"kind": "Pod", "metadata": metadata, "spec": {}, "status": {"phase": "Pending", "conditions": [waits]}}


def test_a_pending_claim_is_told_in_the_provisioners_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toka_operator.events.SUSPECT_AFTER_S", 0.0)
    world = World()
    world.put(data={**DATA, "storageClassName": "none"}, scheduling={"patienceSeconds": 0})
    converge(world)
    world.cluster.store(replace_status(claim_of(world), phase="Pending"))
    told = "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims"
    world.cluster.store(pending_pod(world, message=told))
    event = {"kind": "Event", "metadata": {"namespace": "apps", "name": "e"}, "reason": "ProvisioningFailed"}
    event |= {"type": "Warning", "message": 'storageclass "none" not found', "firstTimestamp": "2026-01-01T00:00:00Z"}
    event["involvedObject"] = {"uid": claim_of(world)["metadata"]["uid"]}
    world.cluster.store(event)
    converge(world)
    (failure,) = world.status()["failures"]
    assert failure["reason"] == "ClaimPending"
    assert 'storageclass "none" not found' in failure["message"]
    assert 'storageclass "none" not found' in world.condition("Degraded")["message"]


def replace_status(obj: Json, **status: Any) -> Json:
    return {**obj, "status": status}
