"""The children of a TokaDeployment as manifests: pure functions from spec to dict.

Owns: names, labels and selectors of children, and which child exists when. Pure. It never says when a
child is written; `plan` does. Names are checked by the CRD: at most 43 characters, so that every label
made from them fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from toka_operator import __version__
from toka_operator.autoscaling import render_autoscaler_spec
from toka_operator.caches import SHARED_PVC, cache_claim_name
from toka_operator.data import Data, claim_name, peers_name
from toka_operator.fields import Json
from toka_operator.monitoring import render_pod_monitor_spec, wants_pod_monitor
from toka_operator.network_policy import render_ingress
from toka_operator.routing import render_pool_spec, render_route_spec
from toka_operator.settings import (
    API_VERSION,
    FINGERPRINT_ANNOTATION,
    KIND,
    MANAGED_BY,
    REVISION_LABEL,
    SERVED_ANNOTATION,
    SERVICE_ANNOTATIONS_KEY,
    SPEC_ANNOTATION,
)
from toka_operator.sight import KNOWN
from toka_operator.spec import TokaDeploymentSpec

SERVICE_ACCOUNT, SERVICE, STATEFUL_SET = "ServiceAccount", "Service", "StatefulSet"
POD_DISRUPTION_BUDGET, CONTROLLER_REVISION = "PodDisruptionBudget", "ControllerRevision"
CLAIM, NETWORK_POLICY = "PersistentVolumeClaim", "NetworkPolicy"
AUTOSCALER = "HorizontalPodAutoscaler"
POD, POD_MONITOR = "Pod", "PodMonitor"
INFERENCE_POOL, HTTP_ROUTE = "InferencePool", "HTTPRoute"
API_VERSIONS = {
    SERVICE_ACCOUNT: "v1",
    SERVICE: "v1",
    CLAIM: "v1",
    STATEFUL_SET: "apps/v1",
    CONTROLLER_REVISION: "apps/v1",
    POD_DISRUPTION_BUDGET: "policy/v1",
    NETWORK_POLICY: "networking.k8s.io/v1",
    POD_MONITOR: "monitoring.coreos.com/v1",
    INFERENCE_POOL: "inference.networking.k8s.io/v1",
    HTTP_ROUTE: "gateway.networking.k8s.io/v1",
    AUTOSCALER: "autoscaling/v2",
}
OPTIONAL_KINDS = (POD_DISRUPTION_BUDGET, NETWORK_POLICY, POD_MONITOR, INFERENCE_POOL, HTTP_ROUTE, AUTOSCALER)
"""Children that go when the spec no longer asks for them."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The TokaDeployment that children belong to."""

    namespace: str
    name: str
    uid: str
    generation: int

    def reference(self) -> Json:
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def selector_labels(name: str) -> dict[str, str]:
    """Return the labels that the Service and the disruption budget select: the engine pods of every revision."""
    return {
        "app.kubernetes.io/name": "toka-engine",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": "engine",
    }


def pod_labels(name: str, revision: str) -> dict[str, str]:
    return {
        **selector_labels(name),
        "app.kubernetes.io/part-of": "toka",
        "app.kubernetes.io/managed-by": MANAGED_BY,
        REVISION_LABEL: revision,
    }


def set_name(name: str, revision: str) -> str:
    return f"{name}-{revision}"


def render_service_account(owner: Owner) -> Json:
    account = _child(owner, SERVICE_ACCOUNT, owner.name, "engine")
    return {**account, "automountServiceAccountToken": False}


def render_service(owner: Owner, spec: TokaDeploymentSpec) -> Json:
    service = _child(owner, SERVICE, owner.name, "endpoint")
    if spec.service.annotations:
        keys = ",".join(sorted(spec.service.annotations))
        service["metadata"]["annotations"] = {**spec.service.annotations, SERVICE_ANNOTATIONS_KEY: keys}
    service["spec"] = {
        "type": spec.service.type,
        "selector": selector_labels(owner.name),
        "publishNotReadyAddresses": False,
        "sessionAffinity": "None",
        "externalIPs": [],
        "ports": [{"name": "http", "port": spec.service.port, "targetPort": "http", "protocol": "TCP"}],
    }
    return service


def render_peers_service(owner: Owner, spec: TokaDeploymentSpec) -> Json:
    """The Service by which engines find each other: the addresses of all pods, of those too that are not ready or go,
    because a pod that drains still has its folder."""
    service = _child(owner, SERVICE, peers_name(owner.name), "peers")
    service["spec"] = {
        "type": "ClusterIP",
        "clusterIP": "None",
        "selector": selector_labels(owner.name),
        "publishNotReadyAddresses": True,
        "sessionAffinity": "None",
        "ports": [{"name": "http", "port": spec.engine.port, "targetPort": "http", "protocol": "TCP"}],
    }
    return service


def render_claim(owner: Owner, data: Data) -> Json:
    """The claim of all ordinals."""
    return _claim(owner, claim_name(owner.name), "data", data)


def render_cache_claim(owner: Owner, spec: TokaDeploymentSpec) -> Json | None:
    """The claim of the models' cache, if the operator makes it."""
    if spec.cache.type != SHARED_PVC or spec.cache.size is None:
        return None
    cache = spec.cache
    wanted = Data(spec.cache.size, cache.storage_class, cache.access_mode, cache.retention)
    return _claim(owner, cache_claim_name(owner.name), "cache", wanted)


def _claim(owner: Owner, name: str, component: str, wanted: Data) -> Json:
    """A claim. One that is to stay has no owner, so that nothing deletes it."""
    claim = _child(owner, CLAIM, name, component)
    if wanted.retention == "Retain":
        claim["metadata"]["ownerReferences"] = []
    claim["spec"] = {"accessModes": [wanted.access_mode], "resources": {"requests": {"storage": wanted.size}}}
    if wanted.storage_class is not None:
        claim["spec"]["storageClassName"] = wanted.storage_class
    return claim


def render_disruption_budget(owner: Owner, spec: TokaDeploymentSpec, holds_only_pod: bool) -> Json | None:
    """One pod (or maxUnavailable) at a time may be evicted. `holds_only_pod`: none of a single replica, which has no
    budget else."""
    if not spec.has_disruption_budget or spec.num_wanted < (1 if holds_only_pod else 2):
        return None
    budget = _child(owner, POD_DISRUPTION_BUDGET, owner.name, "endpoint")
    budget["spec"] = {
        "minAvailable": max(1, spec.num_wanted - max(1, spec.rollout.max_unavailable)),
        "selector": {"matchLabels": selector_labels(owner.name)},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return budget


def render_network_policy(
    owner: Owner, spec: TokaDeploymentSpec, templates: Iterable[Json], operator_namespace: str | None
) -> Json | None:
    """The policy that lets in whom the spec names, and what the product needs. `templates`: of all live revisions."""
    if not spec.network_policy.is_ingress:
        return None
    labels = selector_labels(owner.name)
    siblings = labels if spec.data is not None else None
    policy = _child(owner, NETWORK_POLICY, owner.name, "endpoint")
    policy["spec"] = {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress"],
        "ingress": render_ingress(spec.network_policy, templates, siblings, operator_namespace),
    }
    return policy


def render_pod_monitor(owner: Owner, spec: TokaDeploymentSpec, sight: str, labels: Mapping[str, str]) -> Json | None:
    """The PodMonitor, where there is to be one. `labels`: those by which a Prometheus selects it."""
    if not wants_pod_monitor(spec.pod_monitor, sight):
        return None
    monitor = _child(owner, POD_MONITOR, owner.name, "endpoint")
    monitor["metadata"]["labels"] = {**labels, **monitor["metadata"]["labels"]}
    monitor["spec"] = render_pod_monitor_spec(selector_labels(owner.name))
    return monitor


def render_inference_pool(owner: Owner, spec: TokaDeploymentSpec, sight: str, port: int) -> Json | None:
    """The InferencePool, where there is to be one, of pods that listen on `port`."""
    if spec.routing.picker is None or sight != KNOWN:
        return None
    pool = _child(owner, INFERENCE_POOL, owner.name, "endpoint")
    return {**pool, "spec": render_pool_spec(spec.routing.picker, selector_labels(owner.name), port)}


def render_http_route(owner: Owner, spec: TokaDeploymentSpec, sight: str, has_pool: bool) -> Json | None:
    """The HTTPRoute, where there is to be one: to the InferencePool if there is one, else to the Service."""
    if not spec.routing.gateways or sight != KNOWN:
        return None
    route = _child(owner, HTTP_ROUTE, owner.name, "endpoint")
    return {**route, "spec": render_route_spec(spec.routing, owner.name, None if has_pool else spec.service.port)}


def render_autoscaler(owner: Owner, spec: TokaDeploymentSpec) -> Json | None:
    """The autoscaler of the TokaDeployment's replicas. None while suspended: there is nothing to measure."""
    if spec.autoscaling is None or spec.suspend:
        return None
    autoscaler = _child(owner, AUTOSCALER, owner.name, "endpoint")
    target = {"apiVersion": API_VERSION, "kind": KIND, "name": owner.name}
    return {**autoscaler, "spec": render_autoscaler_spec(spec.autoscaling, target)}


def render_revision(
    owner: Owner,
    revision: str,
    template: Json,
    number: int,
    fingerprint: str | None,
    was_serving: bool = False,
    kept_spec: str | None = None,
) -> Json:
    """A revision's memory: the pod template as it was rendered, which no newer operator renders again.

    `fingerprint` and `kept_spec` None: they stay as they are stored. `was_serving`: it is replaced, and its pods have
    served. `kept_spec`: the parts of the spec that it was made for.
    """
    stored = _child(owner, CONTROLLER_REVISION, set_name(owner.name, revision), "revision")
    stored["metadata"]["labels"][REVISION_LABEL] = revision
    annotations = {} if fingerprint is None else {FINGERPRINT_ANNOTATION: fingerprint}
    if was_serving:
        annotations[SERVED_ANNOTATION] = "true"
    if kept_spec is not None:
        annotations[SPEC_ANNOTATION] = kept_spec
    if annotations:
        stored["metadata"]["annotations"] = annotations
    return {**stored, "data": {"template": template}, "revision": number}


def render_stateful_set(owner: Owner, revision: str, template: Json, replicas: int, start: int = 0) -> Json:
    """The pods of one revision, `replicas` of them from ordinal `start`.

    OnDelete: the template is not to change, and a hand-made change must restart nothing.
    """
    stateful_set = _child(owner, STATEFUL_SET, set_name(owner.name, revision), "engine")
    stateful_set["metadata"]["labels"][REVISION_LABEL] = revision
    stateful_set["spec"] = {
        "replicas": replicas,
        "ordinals": {"start": start},
        "minReadySeconds": 0,
        "serviceName": owner.name,
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "OnDelete"},
        "revisionHistoryLimit": 1,
        "selector": {"matchLabels": {**selector_labels(owner.name), REVISION_LABEL: revision}},
        "template": template,
    }
    return stateful_set


def _child(owner: Owner, kind: str, name: str, component: str) -> Json:
    labels = {
        **selector_labels(owner.name),
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "toka",
        "app.kubernetes.io/managed-by": MANAGED_BY,
        "app.kubernetes.io/version": __version__,
    }
    return {
        "apiVersion": API_VERSIONS[kind],
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": labels,
            "ownerReferences": [owner.reference()],
        },
    }
