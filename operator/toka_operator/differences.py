"""Compares a child as it should be with the child as it is.

Owns: what counts as the same, given that the API server fills in defaults and rewrites quantities, and which parts of
a child are the operator's alone, so that whatever was added to them by hand is taken away. Pure.
"""

from __future__ import annotations

from typing import Any

from toka_operator.fields import Json
from toka_operator.quantities import QUANTITY_FIELDS, QUANTITY_MAPS, are_equal

_NOT_COMPARED = {"apiVersion", "kind", "name", "namespace", "ownerReferences"}
"""In metadata and at the top: the address of the object, and the owner, which is checked by uid before."""
_NOT_COMPARED_LABELS = {"app.kubernetes.io/version"}
"""An upgrade of the operator writes no child for the sake of its own version."""

OWN_PARTS: dict[str, set[tuple[str, ...]]] = {
    "Service": {("spec", "selector")},
    "PodDisruptionBudget": {("spec", "selector")},
    "StatefulSet": {("spec", "template")},
    "NetworkPolicy": {("spec",)},
    "PodMonitor": {("spec", "selector")},
    "InferencePool": {("spec", "selector")},
    "HTTPRoute": {("spec", "parentRefs"), ("spec", "hostnames")},
}
"""Parts of a child that hold nothing but what the operator wrote and the API server's defaults."""

API_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "restartPolicy": ("Always",),
    "dnsPolicy": ("ClusterFirst",),
    "schedulerName": ("default-scheduler",),
    "terminationGracePeriodSeconds": (30,),
    "terminationMessagePath": ("/dev/termination-log",),
    "terminationMessagePolicy": ("File",),
    "imagePullPolicy": ("IfNotPresent", "Always"),
    "pullPolicy": ("IfNotPresent", "Always"),
    "protocol": ("TCP",),
    "scheme": ("HTTP",),
    "path": ("/",),
    "timeoutSeconds": (1,),
    "periodSeconds": (10,),
    "successThreshold": (1,),
    "failureThreshold": (3,),
    "defaultMode": (420,),
    "expirationSeconds": (3600,),
    "volumeMode": ("Filesystem",),
    "apiVersion": ("v1",),
    "divisor": ("0", 0),
    "procMount": ("Default",),
    "enableServiceLinks": (True,),
}
"""Fields of a pod template that the API server fills in, by name, and what it writes there."""


def is_satisfied(desired: Json, live: Json) -> bool:
    """Whether `live` holds everything that `desired` names; what the API server added to it does not
    matter."""
    return not find_corrections(desired, live)


def find_corrections(desired: Json, live: Json) -> Json:
    """A JSON merge patch that makes `live` satisfy `desired`; empty if it does. Lists are replaced whole."""
    patch: Json = {}
    own = OWN_PARTS.get(desired.get("kind", ""), set())
    for key, expected in desired.items():
        if key == "metadata":
            found = _correct_metadata(expected, live.get("metadata", {}))
            if found:
                patch["metadata"] = found
        elif key not in _NOT_COMPARED or "metadata" not in desired:
            _correct(patch, key, expected, live.get(key), own, (key,))
    return patch


def find_uncorrected(corrections: Json, left: Json) -> Json:
    """The part of `left` that a patch of `corrections` was to mend; the rest came about meanwhile."""
    same: Json = {}
    for key in corrections.keys() & left.keys():
        before, after = corrections[key], left[key]
        if isinstance(before, dict) and isinstance(after, dict):
            inner = find_uncorrected(before, after)
            if inner:
                same[key] = inner
        else:
            same[key] = after
    return same


def _correct_metadata(expected: Json, found: Json) -> Json:
    patch: Json = {}
    for key, value in expected.items():
        if key == "labels":
            value = {name: label for name, label in value.items() if name not in _NOT_COMPARED_LABELS}
        if key not in _NOT_COMPARED:
            _correct(patch, key, value, found.get(key), set(), ("metadata", key))
    return patch


def _correct(
    patch: Json,
    key: str,
    expected: Any,
    found: Any,
    own: set[tuple[str, ...]],
    path: tuple[str, ...],
    is_own: bool = False,
) -> None:
    """Adds to `patch` what makes `found` satisfy `expected`. `own`: paths that are the operator's alone; `is_own`: this
    is within one."""
    is_own = is_own or path in own
    if is_own and expected == found:
        return  # the API server types these parts, so that True is never 1
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        if not _is_same(key, expected, found, is_own):
            patch[key] = expected if is_own else _fill_in(expected, found)
        return
    inner: Json = {}
    for name, value in expected.items():
        is_quantity = key in QUANTITY_MAPS and name in found and are_equal(value, found[name])
        if not is_quantity:
            _correct(inner, name, value, found.get(name), own, (*path, name), is_own)
    if is_own:
        inner |= dict.fromkeys(_find_added(key, expected, found))
    if inner:
        patch[key] = inner


def _find_added(key: str, expected: Json, found: Json) -> list[str]:
    """Names in a map of the operator's that it did not write, nor the API server."""
    return [
        name for name, value in found.items() if name not in expected and not _is_default(key, name, value, expected)
    ]


def _is_default(key: str, name: str, value: Any, expected: Json) -> bool:
    if key in ("labels", "annotations", "nodeSelector", "matchLabels", "selector"):
        return value is None
    if name == "serviceAccount":  # an older name of the same field
        return bool(value == expected.get("serviceAccountName"))
    if value in (None, "", [], 0, False) or (value == {} and not name.endswith("Selector")):
        return True
    return value in API_DEFAULTS.get(name, ())


def _fill_in(expected: Any, found: Any) -> Any:
    """A list to replace another, its items with what the API server gave those of the same name (a
    nodePort, say)."""
    if not (isinstance(expected, list) and isinstance(found, list)):
        return expected
    named = {item["name"]: item for item in found if isinstance(item, dict) and "name" in item}
    return [{**named.get(w.get("name"), {}), **w} if isinstance(w, dict) else w for w in expected]


def _is_same(key: str, expected: Any, found: Any, is_own: bool) -> bool:
    if is_own and expected == found:
        return True
    if found is None:
        if isinstance(expected, dict):
            return all(_is_same(name, value, None, is_own) for name, value in expected.items())
        return expected in (None, "", [], 0, False)
    if isinstance(expected, dict) and isinstance(found, dict):
        patch: Json = {}
        _correct(patch, key, expected, found, set(), (), is_own)
        return not patch
    if isinstance(expected, list) and isinstance(found, list):
        pairs = zip(expected, found, strict=False)
        return len(expected) == len(found) and all(_is_same(key, a, b, is_own) for a, b in pairs)
    if key in QUANTITY_FIELDS:
        return are_equal(expected, found)
    return bool(expected == found and type(expected) is type(found))


def find_owner_correction(desired: Json, live: Json) -> Json:
    """A merge patch that gives a claim its owner, or takes it away, as its retention says; no other child's owner
    ever changes."""
    if desired["kind"] != "PersistentVolumeClaim":
        return {}
    expected = desired["metadata"]["ownerReferences"]
    found = live["metadata"].get("ownerReferences") or []
    others = [owner for owner in found if not owner.get("controller")]
    controllers = [owner["uid"] for owner in found if owner.get("controller")]
    if controllers == [owner["uid"] for owner in expected]:
        return {}
    return {"metadata": {"ownerReferences": [*others, *expected]}}


def find_stale_annotations(desired: Json, live: Json, keys_annotation: str) -> Json:
    """A merge patch that removes annotations of ours (listed on the child under `keys_annotation`) no
    longer asked for."""
    expected = desired["metadata"].get("annotations", {})
    present = live["metadata"].get("annotations") or {}
    listed = present.get(keys_annotation)
    ours = {keys_annotation, *listed.split(",")} if listed else set()
    stale = {key: None for key in sorted(ours) if key in present and key not in expected}
    return {"metadata": {"annotations": stale}} if stale else {}
