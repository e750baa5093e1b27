"""A field that the CRD accepts has an effect on the children or on what the status says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from toka_operator.canary import WAITING, Canary, find_canary
from toka_operator.conditions import Outcome
from toka_operator.observed import Observed, PodView, view_pod
from toka_operator.plan import make_plan
from toka_operator.rollback import find_resort
from toka_operator.settings import Settings
from toka_operator.sight import KNOWN
from toka_operator.spec import TokaDeploymentSpec
from toka_operator.status import build_status
from toka_operator.times import format_time

from tests.unit.operator.examples import IMAGE, NOW, OWNER, body, live, plan_for, pod, seen, valid

Json = dict[str, Any]
CRD = Path(__file__).parents[3] / "crds" / "tokadeployments.yaml"
NAMED = {"name": "x"}
SCALED = {"enabled": True, "maxReplicas": 4, "target": 8}
GATEWAY = [{"name": "x"}]
SHARED = {"type": "SharedPVC", "size": "1Gi"}

CHANGES: dict[str, Any] = {
    "model.source": "file:///m",
    "model.revision": "v1",
    "model.servedName": "x",
    "model.aliases": ["x"],
    "model.tokenizer": "org/x",
    "model.dtype": "float32",
    "engine.image": "x:1",
    "engine.pullPolicy": "Always",
    "engine.pullSecrets": [NAMED],
    "engine.port": 9000,
    "engine.maxTokensPerForward": 64,
    "engine.maxSeqsPerForward": 64,
    "engine.targetGapMs": 20,
    "engine.kvCacheNumTokens": 64,
    "engine.pageSize": 64,
    "engine.hydragen": False,
    "engine.cudaGraphs": False,
    "engine.logLevel": "DEBUG",
    "engine.extraArgs": ["seed=1"],
    "engine.env": [{"name": "X", "value": "1"}],
    "engine.envFrom": [{"secretRef": NAMED}],
    "replicas": 5,
    "resources.device": "cpu",
    "resources.gpuResource": "amd.com/gpu",
    "resources.cpu": "2",
    "resources.memory": "2Gi",
    "resources.sharedMemory": "1Gi",
    "parallelism.tensor": 2,
    "parallelism.pipeline": 2,
    "parallelism.data": 2,
    "parallelism.minimumData": 1,
    "parallelism.asyncTensorThreshold": {"tensor": 2, "asyncTensorThreshold": 4096},
    "scheduling.nodeSelector": {"a": "b"},
    "scheduling.tolerations": [{"key": "x"}],
    "scheduling.affinity": {"nodeAffinity": {"a": "b"}},
    "scheduling.topologySpread": [],
    "scheduling.priorityClassName": "x",
    "scheduling.runtimeClassName": "x",
    "scheduling.patienceSeconds": 60,
    "cache.type": {"type": "ExistingPVC", "claimName": "x"},
    "cache.size": "1Gi",
    "cache.claimName": {"type": "ExistingPVC", "claimName": "x"},
    "cache.storageClassName": {**SHARED, "storageClassName": "x"},
    "cache.accessMode": {**SHARED, "accessMode": "ReadWriteOnce"},
    "cache.retention": {**SHARED, "retention": "Delete"},
    "data.size": {"size": "1Gi"},
    "data.storageClassName": {"size": "1Gi", "storageClassName": "x"},
    "data.accessMode": {"size": "1Gi", "accessMode": "ReadWriteMany"},
    "data.retention": {"size": "1Gi", "retention": "Delete"},
    "auth.hfTokenSecretRef": NAMED,
    "auth.apiKeySecretRef": NAMED,
    "startup.timeoutSeconds": 60,
    "rollout.strategy": "Recreate",
    "rollout.surgeFallbackSeconds": 60,
    "rollout.maxSurge": 2,
    "rollout.maxUnavailable": 1,
    "rollout.minReadySeconds": 10,
    "rollout.progressDeadlineSeconds": 1900,
    "rollout.drainDelaySeconds": 60,
    "rollout.drainTimeoutSeconds": 60,
    "rollout.stuckSeconds": 60,
    "rollout.paused": True,
    "rollout.canary.seconds": 60,
    "rollout.onFailure": "Rollback",
    "rollout.revisionHistoryLimit": 1,
    "disruption.podDisruptionBudget": "Off",
    "service.type": "NodePort",
    "service.port": 8080,
    "service.annotations": {"a": "b"},
    "networkPolicy.mode": "Ingress",
    "networkPolicy.from": {"mode": "Ingress", "from": [{"podSelector": {}}]},
    "routing.inferencePool.endpointPickerRef": NAMED,
    "routing.httpRoute.parentRefs": GATEWAY,
    "routing.httpRoute.hostnames": {"parentRefs": GATEWAY, "hostnames": ["x"]},
    "monitoring.podMonitor": "On",
    "autoscaling.enabled": SCALED,
    "autoscaling.minReplicas": {**SCALED, "minReplicas": 2},
    "autoscaling.maxReplicas": {**SCALED, "maxReplicas": 5},
    "autoscaling.metric": {**SCALED, "metric": "RunningRequests"},
    "autoscaling.target": {**SCALED, "target": 9},
    "autoscaling.scaleDownStabilizationSeconds": {**SCALED, "scaleDownStabilizationSeconds": 60},
    "podTemplate.labels": {"a": "b"},
    "podTemplate.annotations": {"a": "b"},
    "podTemplate.volumes": [NAMED],
    "podTemplate.volumeMounts": [{"name": "x", "mountPath": "/x"}],
    "podTemplate.readinessGates": [{"conditionType": "example.com/balanced"}],
    "podTemplate.sidecars": [{"name": "x", "image": "x"}],
    "suspend": True,
}
"""Each field with another value than its default, or, where it needs a neighbour, the object that holds it."""


def fields_of(schema: Json, path: str = "") -> set[str]:
    """Every field of a schema that is not an object of named fields itself; a reference counts as one."""
    found: set[str] = set()
    for name, field in schema["properties"].items():
        inner = f"{path}.{name}".lstrip(".")
        is_group = field.get("type") == "object" and "properties" in field and not name.endswith("Ref")
        found |= fields_of(field, inner) if is_group else {inner}
    return found


def spec_with(path: str) -> TokaDeploymentSpec:
    """Three replicas of a hub model, with one field changed."""
    spec: Json = {"model": {"source": "hf://org/name"}, "replicas": 3}
    if path:
        *groups, name = path.split(".")
        value = CHANGES[path]
        if groups and isinstance(value, dict) and name in value:
            name = groups.pop()
        holder = spec
        for group in groups:
            holder = holder.setdefault(group, {})
        holder[name] = value
    return valid(**spec)


def look(spec: TokaDeploymentSpec) -> str:
    """The next plan of a rollout from two older revisions to `spec`, and its status, as one text.

    Half way: one old pod serves, a further one outlived its grace period by 45 s, the new revision's first pod was
    ready 7 s ago, its second has waited for a node for 90 s, the last progress was 2,000 s ago. Then 4,000 s later,
    when that rollout may be given up.
    """
    older, old = valid(replicas=3, engine={"pageSize": 8}), valid(replicas=3, engine={"pageSize": 4})
    children = {**seen(plan_for(older)).children, **seen(plan_for(old)).children}
    for gone in (older,):
        del children[("StatefulSet", f"chat-{gone.revision}")]
    children[("ControllerRevision", "chat-oldest")] = _stored_revision(older)
    new = plan_for(spec, Observed(children, (), frozenset()))
    children |= {key: child for key, child in seen(new).children.items() if key not in children}
    pods = (pod(old.revision, 0, is_available=True), pod(old.revision, 1))
    stuck = replace(pod(old.revision, 3), terminating_until=NOW - 45)
    views = (*pods, stuck, _new_pod(spec.revision), _waiting_pod(spec.revision))
    sights = {"InferencePool": KNOWN, "HTTPRoute": KNOWN}
    observed = Observed(children, views, frozenset(), sights=sights)
    canary = find_canary(spec, observed, Canary(spec.revision, WAITING), "", NOW)
    plan = make_plan(OWNER, spec, observed, Settings(IMAGE), NOW, canary.limit if canary is not None else None)
    previous = {"observedGeneration": 1, "currentRevision": spec.revision, "lastProgressTime": format_time(NOW - 2000)}
    previous |= {"revisions": [{"name": spec.revision, "available": 1, "replicas": 1}]}
    status = build_status(OWNER, spec, observed, plan, Outcome(), previous, NOW, canary=canary)
    for key in ("currentRevision", "revisions"):
        status.pop(key)
    observed = replace(observed, complete_revision=old.revision)
    resort = find_resort(OWNER, body(replicas=3), spec, observed)
    late = build_status(OWNER, spec, observed, plan, Outcome(), previous, NOW + 4000, resort)
    given_up = late.get("rollback", {}).get("reason")
    text = json.dumps([plan.desired, plan.deletions, status, given_up], sort_keys=True, default=str)
    return text.replace(spec.revision, "REVISION")


def _stored_revision(like: TokaDeploymentSpec) -> Json:
    (stored,) = [c for c in plan_for(like).desired if c["kind"] == "ControllerRevision"]
    labels = {**stored["metadata"]["labels"], "toka.dev/revision": "oldest"}
    return live({**stored, "metadata": {**stored["metadata"], "name": "chat-oldest", "labels": labels}})


def _new_pod(revision: str) -> PodView:
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": format_time(NOW - 7)}
    name = f"chat-{revision}-0"
    raw = {"metadata": {"name": name, "labels": {"toka.dev/revision": revision}}, "status": {"conditions": [ready]}}
    return view_pod(raw, frozenset([name]))


def _waiting_pod(revision: str) -> PodView:
    waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    return pod(revision, 1, {"conditions": [{**waits, "lastTransitionTime": format_time(NOW - 90)}]})


def test_every_field_of_the_crd_is_tried() -> None:
    crd = yaml.safe_load(CRD.read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert fields_of(schema) == CHANGES.keys()


@pytest.mark.parametrize("path", CHANGES)
def test_each_field_changes_something(path: str) -> None:
    assert look(spec_with(path)) != look(spec_with(""))
