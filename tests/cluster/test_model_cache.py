"""The claim of a shared cache of models, with a volume as a provisioner would make it."""

from __future__ import annotations

from tests.cluster.operating import Json, Operator

HUB = {"source": "hf://org/name"}


def offer_volume(operator: Operator) -> Json:
    """Make a volume; return the cache that asks for it."""
    storage = f"shared-{operator.namespace}"
    spec: Json = {
        "storageClassName": storage,
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteMany"],
        "hostPath": {"path": "/nowhere"},
    }
    operator.server.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": storage}, "spec": spec})
    return {"type": "SharedPVC", "size": "1Gi", "storageClassName": storage}


def claim_of(operator: Operator) -> Json:
    return operator.require("persistentvolumeclaim", "chat-cache")


def test_a_shared_cache_is_made_kept_used_again_and_goes_when_it_may(operator: Operator) -> None:
    cache = offer_volume(operator)
    operator.apply("chat", replicas=2, model=HUB, cache=cache)
    ready = operator.wait_until_ready("chat")
    assert ready["status"]["cache"] == {"claim": "chat-cache", "claimPhase": "Bound", "progress": "done"}
    assert operator.wait_for_condition("chat", "ModelCached", "True")["reason"] == "Cached"
    made = claim_of(operator)
    assert made["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = [pod["spec"]["volumes"] for pod in operator.pods("chat")]
    mounted = {"name": "cache", "persistentVolumeClaim": {"claimName": "chat-cache"}}
    assert all(mounted in each for each in volumes)

    operator.delete_and_wait("td", "chat")
    operator.wait_for(lambda: not operator.list("statefulset"), "the other children to go")
    assert claim_of(operator)["metadata"]["uid"] == made["metadata"]["uid"]

    operator.apply("chat", model=HUB, cache=cache)
    operator.wait_until_ready("chat")
    assert claim_of(operator)["metadata"]["uid"] == made["metadata"]["uid"]
    operator.patch("chat", cache={"retention": "Delete"})
    operator.wait_for(lambda: claim_of(operator)["metadata"].get("ownerReferences"), "the claim to have an owner")
    operator.delete_and_wait("td", "chat")
    operator.wait_for(lambda: operator.get("persistentvolumeclaim", "chat-cache") is None, "the claim to go")
