"""The engine pod: how a spec becomes a pod template.

Owns: the engine's command line, environment, volumes, probes and security settings. Pure: the same spec
and image give the same template. The rendered template is stored with its revision, so a change here
reaches only new revisions.
"""

from __future__ import annotations

import math
from typing import Any

from toka_operator.data import (
    data_labels,
    keep_on_one_node,
    render_data_argument,
    render_data_environment,
    render_data_mount,
    render_data_volume,
)
from toka_operator.fields import Json
from toka_operator.fingerprint import STARTUP_STEP_S
from toka_operator.settings import REVISION_LABEL
from toka_operator.spec import SecretKey, TokaDeploymentSpec

ENGINE_CONTAINER = "engine"
IMAGE_VOLUMES_DROPPED = "the API server drops volumes of type image"
"""The words for what an API server does whose feature gate ImageVolume is off: it says nothing itself."""
ENGINE_UID = 65532
CACHE_PATH = "/cache"
MODEL_PATH = "/mnt/model"
KEYS_PATH = "/etc/toka/api-keys"
_KEYS_FILE = "keys"
GRACE_SLACK_S = 15
"""Between the end of draining and the kubelet's SIGKILL: closing connections, ending processes."""
PROBE_PERIOD_S = STARTUP_STEP_S
LOST_NODE_AFTER_S = 30
"""Seconds that a pod stays bound to a node that does not answer. Kubernetes' default is 300 s; an engine has no state
that its successor elsewhere could corrupt: the folder of its batches is locked."""
_LOST_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"

RESTRICTED: Json = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def render_pod_template(
    spec: TokaDeploymentSpec, default_image: str, labels: dict[str, str], service_account: str
) -> Json:
    """The pod template of a new revision. `labels` are the operator's own; the user's are added below
    them."""
    scheduling, additions = spec.scheduling, spec.pod_additions
    name = service_account  # both have the TokaDeployment's
    pod: Json = {
        "serviceAccountName": service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _grace_period_s(spec),
        "securityContext": _pod_security(),
        "containers": [_engine_container(spec, default_image, name), *map(_restrict_sidecar, additions.sidecars)],
        "volumes": _volumes(spec, name),
        "topologySpreadConstraints": _topology_spread(spec, labels),
        "nodeSelector": scheduling.node_selector,
        "tolerations": _tolerations(spec),
        "affinity": _affinity(spec, labels, name),
        "priorityClassName": scheduling.priority_class_name,
        "runtimeClassName": scheduling.runtime_class_name,
        "imagePullSecrets": [{"name": name} for name in spec.engine.pull_secrets],
        "readinessGates": list(additions.readiness_gates),
    }
    of_claim = data_labels(name) if spec.data else {}
    metadata: Json = {"labels": {**additions.labels, **labels, **of_claim}, "annotations": additions.annotations}
    return {"metadata": _without_empty(metadata), "spec": _without_empty(pod)}


def render_arguments(spec: TokaDeploymentSpec) -> list[str]:
    """The engine's command line: key=value settings, the user's extra ones last."""
    model, engine = spec.model, spec.engine
    settings: dict[str, str | int | bool | None] = {
        "model": _engine_model(spec),
        "revision": model.revision,
        "served_model_name": model.served_name,
        "model_aliases": ",".join(model.aliases) or None,
        "tokenizer": model.tokenizer,
        "dtype": model.dtype,
        "device": "cuda" if spec.resources.device == "gpu" else "cpu",
        "port": engine.port,
        "max_tokens_per_forward": engine.max_tokens_per_forward,
        "max_seqs_per_forward": engine.max_seqs_per_forward,
        "target_gap_ms": engine.target_gap_ms,
        "kv_cache_num_tokens": engine.kv_cache_num_tokens,
        "page_size": engine.page_size,
        "use_hydragen": engine.hydragen,
        "use_cudagraphs": engine.cuda_graphs,
        # Said only where it is not the default: arguments of pods that run already stay what they are.
        "tp_size": None if spec.parallelism.tensor == 1 else spec.parallelism.tensor,
        "pp_size": None if spec.parallelism.pipeline == 1 else spec.parallelism.pipeline,
        "dp_size": None if spec.parallelism.data == 1 else spec.parallelism.data,
        "dp_min_size": spec.parallelism.minimum_data,
        "async_tp_threshold": spec.parallelism.async_tensor_threshold,
        "data_dir": render_data_argument() if spec.data else None,
        "log_level": engine.log_level,
        "drain_endpoint_delay_s": spec.rollout.drain_delay_s,
        "drain_timeout_s": spec.rollout.drain_timeout_s,
        "api_keys_file": f"{KEYS_PATH}/{_KEYS_FILE}" if spec.api_key else None,
    }
    return [f"{key}={_render_value(v)}" for key, v in settings.items() if v is not None] + list(engine.extra_args)


def _grace_period_s(spec: TokaDeploymentSpec) -> int:
    return spec.rollout.drain_delay_s + spec.rollout.drain_timeout_s + GRACE_SLACK_S


def _render_value(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "T" if value else "F"
    return str(value)


def _engine_model(spec: TokaDeploymentSpec) -> str:
    source = spec.model.source
    return MODEL_PATH + source.location if source.is_mounted else source.location


def _engine_container(spec: TokaDeploymentSpec, default_image: str, name: str) -> Json:
    engine = spec.engine
    container: Json = {
        "name": ENGINE_CONTAINER,
        "image": engine.image or default_image,
        "imagePullPolicy": engine.pull_policy,
        "args": render_arguments(spec),
        "env": _environment(spec, name),
        "envFrom": list(engine.env_from),
        "ports": [{"name": "http", "containerPort": engine.port, "protocol": "TCP"}],
        "resources": _resources(spec),
        "volumeMounts": _volume_mounts(spec),
        "securityContext": {**RESTRICTED, "runAsUser": ENGINE_UID, "runAsGroup": ENGINE_UID},
        "startupProbe": _probe("/readyz", math.ceil(spec.startup_timeout_s / PROBE_PERIOD_S), PROBE_PERIOD_S),
        "readinessProbe": _probe("/readyz", 2, PROBE_PERIOD_S),
        "livenessProbe": _probe("/livez", 3, 10),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    return _without_empty(container)


def _probe(path: str, num_failures: int, period_s: int) -> Json:
    return {
        "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": 3,
        "failureThreshold": num_failures,
        "successThreshold": 1,
    }


def _environment(spec: TokaDeploymentSpec, name: str) -> list[Json]:
    env: list[Json] = [
        {"name": "TOKA_CACHE_DIR", "value": CACHE_PATH},
        {"name": "HF_HOME", "value": f"{CACHE_PATH}/huggingface"},
        {"name": "XDG_CACHE_HOME", "value": CACHE_PATH},
        {"name": "HOME", "value": "/tmp"},
    ]
    env += _secret_variable("HF_TOKEN", spec.hf_token)
    if spec.data:
        env += render_data_environment(name)
    return env + list(spec.engine.env)


def _secret_variable(name: str, secret: SecretKey | None) -> list[Json]:
    if secret is None:
        return []
    return [{"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}}]


def _resources(spec: TokaDeploymentSpec) -> Json:
    asked, requests, limits = spec.resources, {}, {}
    if asked.cpu:
        requests["cpu"] = asked.cpu
    if asked.cpu and asked.device == "cpu":
        limits["cpu"] = asked.cpu
    if asked.memory:
        requests["memory"] = limits["memory"] = asked.memory
    if asked.device == "gpu":
        requests[asked.gpu_resource] = limits[asked.gpu_resource] = str(spec.parallelism.num_gpus)
    return _without_empty({"requests": requests, "limits": limits})


def _volumes(spec: TokaDeploymentSpec, name: str) -> list[Json]:
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}]
    if (cache_claim := spec.cache.claim_of(name)) is not None:
        volumes.append({"name": "cache", "persistentVolumeClaim": {"claimName": cache_claim}})
    else:
        size = {"sizeLimit": spec.cache.size} if spec.cache.size else {}
        volumes.append({"name": "cache", "emptyDir": size})
    if spec.model.source.kind == "pvc":
        claim = {"claimName": spec.model.source.claim, "readOnly": True}
        volumes.append({"name": "model", "persistentVolumeClaim": claim})
    if spec.model.source.kind == "oci":
        image = {"reference": spec.model.source.image, "pullPolicy": spec.engine.pull_policy}
        volumes.append({"name": "model", "image": image})
    if spec.data:
        volumes.append(render_data_volume(name))
    if spec.resources.device == "gpu":
        shared_memory = {"medium": "Memory", "sizeLimit": spec.resources.shared_memory}
        volumes.append({"name": "shm", "emptyDir": shared_memory})
    if spec.api_key:
        volumes.append(_keys_volume(spec.api_key))
    return volumes + list(spec.pod_additions.volumes)


def find_image_volumes(template: Json) -> set[str]:
    """Return the names of a pod's volumes that are images."""
    return {str(volume.get("name")) for volume in template["spec"].get("volumes") or [] if volume.get("image")}


def _keys_volume(secret: SecretKey) -> Json:
    """The API keys as a file, which follows its Secret; an environment variable would keep the first value."""
    # 288 is 0440: the kubelet makes the file the pod's group's.
    items = [{"key": secret.key, "path": _KEYS_FILE}]
    return {"name": "api-keys", "secret": {"secretName": secret.name, "items": items, "defaultMode": 288}}


def _volume_mounts(spec: TokaDeploymentSpec) -> list[Json]:
    mounts: list[Json] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "cache", "mountPath": CACHE_PATH}]
    if spec.model.source.is_mounted:
        mounts.append({"name": "model", "mountPath": MODEL_PATH, "readOnly": True})
    if spec.resources.device == "gpu":
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if spec.api_key:
        mounts.append({"name": "api-keys", "mountPath": KEYS_PATH, "readOnly": True})
    if spec.data:
        mounts.append(render_data_mount())
    return mounts + list(spec.pod_additions.volume_mounts)


def _topology_spread(spec: TokaDeploymentSpec, labels: dict[str, str]) -> list[Json]:
    """By default over hosts alone: the scheduler leaves a node that lacks the key of *any* soft constraint out of
    the scoring of all, so a zone beside the host would end the spreading wherever nodes have no zone."""
    constraints = spec.scheduling.topology_spread
    if constraints is None:
        constraints = ({"topologyKey": "kubernetes.io/hostname"},)
    return [
        {
            "topologyKey": constraint["topologyKey"],
            "maxSkew": constraint.get("maxSkew", 1),
            "whenUnsatisfiable": constraint.get("whenUnsatisfiable", "ScheduleAnyway"),
            "labelSelector": {"matchLabels": labels},
        }
        for constraint in constraints
    ]


def _tolerations(spec: TokaDeploymentSpec) -> list[Json]:
    """The user's, and those of a lost node unless the user says how long to wait for one."""
    own = list(spec.scheduling.tolerations)
    answered = {
        toleration.get("key") or None for toleration in own if toleration.get("effect") in (None, "", "NoExecute")
    }
    if None in answered:
        return own
    times = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST_NODE_AFTER_S}
    return own + [{"key": taint, **times} for taint in _LOST_NODE_TAINTS if taint not in answered]


def _affinity(spec: TokaDeploymentSpec, labels: dict[str, str], name: str) -> Json:
    """The user's affinity and, unless the user says how pods spread, a preference for zones with fewer of them.

    What the user wrote in another shape than Kubernetes' is handed on: the API server names what is wrong with it.
    """
    affinity = spec.scheduling.affinity
    if spec.cache.is_of_one_node:  # then every pod mounts the cache, those too that were made before there was data
        affinity = keep_on_one_node(affinity, {k: v for k, v in labels.items() if k != REVISION_LABEL})
    elif spec.data and spec.data.access_mode == "ReadWriteOnce":
        affinity = keep_on_one_node(affinity, data_labels(name))
    apart = affinity.get("podAntiAffinity") or {}
    if spec.scheduling.topology_spread is not None or not isinstance(apart, dict):
        return affinity
    preferred = apart.get(_PREFERRED) or []
    if not isinstance(preferred, list):
        return affinity
    term = {"topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": labels}}
    by_zone = {"weight": 100, "podAffinityTerm": term}
    return {**affinity, "podAntiAffinity": {**apart, _PREFERRED: [*preferred, by_zone]}}


def _pod_security() -> Json:
    return {
        "runAsNonRoot": True,
        "runAsUser": ENGINE_UID,
        "runAsGroup": ENGINE_UID,
        "fsGroup": ENGINE_UID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _restrict_sidecar(container: Json) -> Json:
    """A sidecar passes Pod Security `restricted` too, unless its own securityContext says otherwise, and its last lines
    of log are its last words. One of another shape than Kubernetes' is handed on: the API server names what is wrong
    with it."""
    own: Any = container.get("securityContext") or {}
    if not isinstance(own, dict):
        return container
    defaults = {k: v for k, v in RESTRICTED.items() if k != "readOnlyRootFilesystem"}
    last_words = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    return {**last_words, **container, "securityContext": {**defaults, **own}}


def _without_empty(fields: Json) -> Json:
    return {key: value for key, value in fields.items() if value not in (None, {}, [])}
