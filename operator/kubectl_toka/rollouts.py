"""`kubectl toka restart`, `rollback` and `history`: changes of a spec that the operator then rolls out.

A rollback gives the parts of the spec that alter the pod the values that they had; replicas, the Service, claims (which
cannot shrink) and the rules of rollouts stay as they are. The operator keeps these parts on each revision, and
recognises the revision: pods of it that still live are used again.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from kubectl_toka.kubectl import Kubectl, KubectlError
from kubectl_toka.names import (
    CLAIM_FIELDS,
    NOT_POD_SCHEDULING_FIELDS,
    POD_FIELDS,
    POD_ROLLOUT_FIELDS,
    RESTARTED_ANNOTATION,
    REVISION_LABEL,
    SERVED_ANNOTATION,
    SHARED_PVC,
    SPEC_ANNOTATION,
    revision_selector,
)

Json = dict[str, Any]


def restart(kubectl: Kubectl, name: str) -> str:
    """Replace every pod by one of the same spec, as a rollout does it."""
    found = kubectl.deployment(name)
    spec = found["spec"]
    template = spec.setdefault("podTemplate", {})
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    template["annotations"] = {**(template.get("annotations") or {}), RESTARTED_ANNOTATION: now}
    kubectl.replace_spec(name, found["metadata"]["resourceVersion"], spec)
    return f"{name} restarts"


def history(kubectl: Kubectl, name: str) -> str:
    """The revisions that are remembered, the newest first."""
    current = (kubectl.deployment(name).get("status") or {}).get("currentRevision")
    lines = [f"{'NUMBER':8}{'REVISION':12}{'SERVED':8}IMAGE"]
    for stored in _newest_first(kubectl, name):
        revision = stored["metadata"]["labels"][REVISION_LABEL]
        containers = stored["data"]["template"]["spec"]["containers"]
        is_current = revision == current
        served = "now" if is_current else "yes" if _has_served(stored) else "no"
        lines.append(f"{stored['revision']:<8}{revision:12}{served:8}{containers[0]['image']}")
    return "\n".join(lines)


def rollback(kubectl: Kubectl, name: str, to: str | None) -> str:
    """Go back to revision `to` (its name or number), or to the newest older one that has served, else the newest."""
    found = kubectl.deployment(name)
    current = (found.get("status") or {}).get("currentRevision")
    stored = _choose(_newest_first(kubectl, name), current, to)
    text = (stored["metadata"].get("annotations") or {}).get(SPEC_ANNOTATION)
    revision = stored["metadata"]["labels"][REVISION_LABEL]
    if text is None:
        raise KubectlError(f"revision {revision} was made by an older operator, which did not keep the spec")
    spec = restore(found["spec"], json.loads(text))
    kubectl.replace_spec(name, found["metadata"]["resourceVersion"], spec)
    return f"{name} goes back to revision {revision} (number {stored['revision']})"


def restore(spec: Json, kept: Json) -> Json:
    """The spec with the parts that alter the pod as they were."""
    restored = {group: value for group, value in spec.items() if group not in POD_FIELDS}
    restored |= {group: kept[group] for group in POD_FIELDS if group in kept}
    staying: dict[str, tuple[str, ...]] = {"scheduling": NOT_POD_SCHEDULING_FIELDS}
    if (spec.get("cache") or {}).get("type") == SHARED_PVC:
        staying["cache"] = CLAIM_FIELDS
    for group, fields in staying.items():
        now, then = spec.get(group) or {}, restored.get(group) or {}
        merged = {k: v for k, v in then.items() if k not in fields} | {k: now[k] for k in fields if k in now}
        if merged or group in restored:
            restored[group] = merged
    rollout = {k: v for k, v in (spec.get("rollout") or {}).items() if k not in POD_ROLLOUT_FIELDS}
    return {**restored, "rollout": {**rollout, **(kept.get("rollout") or {})}}


def _newest_first(kubectl: Kubectl, name: str) -> list[Json]:
    found = kubectl.list("controllerrevisions", revision_selector(name))
    return sorted(found, key=lambda stored: -int(stored["revision"]))


def _choose(revisions: list[Json], current: str | None, to: str | None) -> Json:
    others = [stored for stored in revisions if stored["metadata"]["labels"][REVISION_LABEL] != current]
    if to is not None:
        named = [s for s in revisions if to in (s["metadata"]["labels"][REVISION_LABEL], str(s["revision"]))]
        if not named:
            raise KubectlError(f"there is no revision {to}: see kubectl toka history")
        return named[0]
    if not others:
        raise KubectlError("there is no other revision to go back to")
    return next(iter([*filter(_has_served, others), *others]))


def _has_served(stored: Json) -> bool:
    return (stored["metadata"].get("annotations") or {}).get(SERVED_ANNOTATION) == "true"
