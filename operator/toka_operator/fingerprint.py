"""The fingerprint of a spec: the same for all spellings of a spec that mean the same pod.

Owns: what makes no difference to the pod - defaults written down, empty maps and lists, another spelling of a
quantity, the order of entries that have none. Pure. It works on the spec as it is stored and knows nothing of how a pod
is rendered, so that no newer operator, which renders other pods, gives another fingerprint to the same spec. A change
here does: a test compares the fingerprints of specs of every kind with those of earlier versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from toka_operator.fields import Json
from toka_operator.quantities import QUANTITY_FIELDS, QUANTITY_MAPS, read_quantity, spell

POD_FIELDS = ("model", "engine", "resources", "parallelism", "scheduling", "cache", "auth", "startup", "podTemplate")
"""Parts of the spec that alter the pod, besides `POD_ROLLOUT_FIELDS`."""
POD_ROLLOUT_FIELDS = ("drainDelaySeconds", "drainTimeoutSeconds")
"""Fields of `rollout` that alter the pod: the engine's arguments and the grace period."""
NOT_POD_SCHEDULING_FIELDS = ("patienceSeconds",)
"""Fields of `scheduling` that leave the pod as it is."""
KNOWN_FIELDS: dict[str, frozenset[str]] = {
    "model": frozenset(["source", "revision", "servedName", "aliases", "tokenizer", "dtype"]),
    "engine": frozenset(
        [
            "image",
            "pullPolicy",
            "pullSecrets",
            "port",
            "maxTokensPerForward",
            "maxSeqsPerForward",
            "targetGapMs",
            "kvCacheNumTokens",
            "pageSize",
            "hydragen",
            "cudaGraphs",
            "logLevel",
            "extraArgs",
            "env",
            "envFrom",
        ]
    ),
    "resources": frozenset(["device", "gpuResource", "cpu", "memory", "sharedMemory"]),
    "parallelism": frozenset(["tensor", "pipeline", "data", "minimumData", "asyncTensorThreshold"]),
    "scheduling": frozenset(
        [
            "nodeSelector",
            "tolerations",
            "affinity",
            "topologySpread",
            "priorityClassName",
            "runtimeClassName",
            "patienceSeconds",
        ]
    ),
    "cache": frozenset(["type", "size", "storageClassName", "accessMode", "retention", "claimName"]),
    "auth": frozenset(["hfTokenSecretRef", "apiKeySecretRef"]),
    "startup": frozenset(["timeoutSeconds"]),
    "podTemplate": frozenset(["labels", "annotations", "volumes", "volumeMounts", "sidecars", "readinessGates"]),
}
"""The fields of each part that this version knows. A newer CRD shows others, with defaults, also to an operator that is
still of this version: they do not alter the pods that it makes."""
STARTUP_STEP_S = 2
"""The start-up timeout is a whole number of probes this far apart."""

CLAIM_FIELDS = ("size", "storageClassName", "retention")
"""Fields of `cache` that, with a claim of the operator's own, alter the claim and not the pod."""
_SHARED_MEMORY = "8Gi"
_QUANTITIES = ("cpu", "memory", "sharedMemory", "size")
_MEANINGFUL_IF_EMPTY = ("topologySpread",)
_WITHOUT_ORDER = (
    *("aliases", "extraArgs", "pullSecrets", "tolerations", "topologySpread"),
    *("volumes", "volumeMounts", "readinessGates"),
)
_TEXT_MAPS = ("labels", "annotations", "nodeSelector", "matchLabels")
_FALSE_IS_DEFAULT = ("optional", "readOnly", "privileged", "stdin", "stdinOnce", "tty")
_EMPTY_TEXT_IS_DEFAULT = ("value", "effect", "key", "prefix", "subPath", "medium", "type")
_DEFAULTS: dict[str, Any] = {
    "operator": "Equal",
    "maxSkew": 1,
    "whenUnsatisfiable": "ScheduleAnyway",
    "protocol": "TCP",
    "scheme": "HTTP",
    "timeoutSeconds": 1,
    "periodSeconds": 10,
    "successThreshold": 1,
    "failureThreshold": 3,
    "defaultMode": 420,
    "expirationSeconds": 3600,
    "volumeMode": "Filesystem",
    "terminationMessagePath": "/dev/termination-log",
    "procMount": "Default",
}
"""Defaults of the Kubernetes API within tolerations, constraints, volumes and sidecars."""


def compute_fingerprint(raw: Mapping[str, Any], defaults: Json) -> str:
    """64 hex digits over what alters the pod. `raw` is a valid spec; values equal to `defaults` are left out."""
    parts: Json = {}
    for group in POD_FIELDS:
        kept = _canonical_group(raw.get(group), defaults.get(group, {}), KNOWN_FIELDS[group].__contains__)
        for name in NOT_POD_SCHEDULING_FIELDS if group == "scheduling" else ():
            kept.pop(name, None)
        parts[group] = kept
    parts["rollout"] = _canonical_group(raw.get("rollout"), defaults["rollout"], POD_ROLLOUT_FIELDS.__contains__)
    _leave_out_implied(parts)
    if isinstance(raw.get("data"), Mapping):  # that there is a claim makes another pod, not how large it is
        parts["data"] = {"accessMode": raw["data"].get("accessMode") or defaults["data"]["accessMode"]}
    text = json.dumps({k: v for k, v in parts.items() if v}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def pick_pod_fields(raw: Mapping[str, Any]) -> Json:
    """The parts of a spec that alter the pod, as they are written."""
    picked: Json = {group: raw[group] for group in POD_FIELDS if raw.get(group) is not None}
    rollout = raw.get("rollout")
    if isinstance(rollout, Mapping):
        picked["rollout"] = {name: rollout[name] for name in POD_ROLLOUT_FIELDS if name in rollout}
    return picked


def compute_former_revision(raw: Mapping[str, Any], defaults: Json) -> str:
    """The name that version 0.1 gave to the revision of a spec: 8 hex digits over its text, less written defaults."""
    parts = {name: _without_defaults(raw.get(name), defaults.get(name, {})) for name in POD_FIELDS}
    for name in NOT_POD_SCHEDULING_FIELDS:
        parts["scheduling"].pop(name, None)
    rollout = raw.get("rollout")
    if isinstance(rollout, Mapping):
        keep = {k: v for k, v in rollout.items() if k in POD_ROLLOUT_FIELDS}
        parts["rollout"] = _without_defaults(keep, defaults["rollout"])
    if isinstance(raw.get("data"), Mapping):  # that version knew no claims: the name is none of its own
        parts["data"] = dict(raw["data"])
    text = json.dumps({k: v for k, v in parts.items() if v}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _without_defaults(raw: Any, defaults: Json) -> Json:
    if not isinstance(raw, Mapping):
        return {}
    return {k: v for k, v in raw.items() if v is not None and not (k in defaults and defaults[k] == v)}


def _canonical_group(raw: Any, defaults: Json, is_kept: Callable[[str], bool]) -> Json:
    """One object of the spec. Without what is empty, and without defaults."""
    if not isinstance(raw, Mapping):
        return {}
    kept: Json = {}
    for name, value in raw.items():
        canonical = spell(value) if name in _QUANTITIES else canonicalize(value, name)
        is_empty = canonical in (None, {}, []) and not (canonical == [] and name in _MEANINGFUL_IF_EMPTY)
        if is_kept(name) and not is_empty and not (name in defaults and defaults[name] == canonical):
            kept[name] = canonical
    return kept


def _leave_out_implied(parts: Json) -> None:
    """Drop values that other fields imply, and those without effect beside them."""
    model, resources, startup, auth = parts["model"], parts["resources"], parts["startup"], parts["auth"]
    if model.get("servedName") == str(model.get("source", "")).rstrip("/").rsplit("/", 1)[-1]:
        del model["servedName"]
    cache = parts["cache"]
    if cache.get("type") == "SharedPVC":
        for name in CLAIM_FIELDS:
            cache.pop(name, None)
        if cache.get("accessMode") == "ReadWriteMany":
            del cache["accessMode"]
    is_gpu = resources.get("device") != "cpu"
    if not is_gpu or read_quantity(resources.get("sharedMemory")) == read_quantity(_SHARED_MEMORY):
        resources.pop("sharedMemory", None)
    if not is_gpu:
        resources.pop("gpuResource", None)
    if "timeoutSeconds" in startup:
        startup["timeoutSeconds"] += -startup["timeoutSeconds"] % STARTUP_STEP_S
        if startup["timeoutSeconds"] == 1800:
            del startup["timeoutSeconds"]
    for name, key in (("hfTokenSecretRef", "token"), ("apiKeySecretRef", "key")):
        if name in auth and auth[name].get("key") == key:
            del auth[name]["key"]


def canonicalize(value: Any, name: str = "") -> Any:
    """A value of the field `name` in one of its spellings. What is left out of an object makes no difference to it."""
    if isinstance(value, Mapping):
        return {k: v for k, v in _canonical_items(value, name) if not _makes_no_difference(name, k, v)}
    if isinstance(value, list):
        items = [canonicalize(item, name) for item in value]
        is_orderless = name in _WITHOUT_ORDER or (name == "env" and not _refer_to_others(items))
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True)) if is_orderless else items
    return spell(value) if name in QUANTITY_FIELDS else value


def _canonical_items(value: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    if name in QUANTITY_MAPS:
        return [(k, spell(v)) for k, v in value.items()]
    if name in _TEXT_MAPS:
        return list(value.items())
    return [(k, canonicalize(v, k)) for k, v in value.items()]


def _makes_no_difference(parent: str, name: str, value: Any) -> bool:
    if value is None:
        return True
    if parent in _TEXT_MAPS:
        return False
    if value == {}:
        return not name.endswith("Selector")
    if isinstance(value, bool):
        return not value and name in _FALSE_IS_DEFAULT
    if value == "":
        return name in _EMPTY_TEXT_IS_DEFAULT
    return bool(value == [] or (name in _DEFAULTS and value == _DEFAULTS[name]))


def _refer_to_others(env: list[Any]) -> bool:
    """Whether a variable's value may name another one, which then has to come first."""
    return any("$(" in str(entry.get("value", "")) for entry in env if isinstance(entry, Mapping))
