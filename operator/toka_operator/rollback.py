"""Going back from a revision that failed to the last one that was complete.

Owns: when that is done, for how long it holds, and how the status tells it. Pure. The status itself remembers the
failed revision, so that another leader goes on with it; another spec, in its pods or in `rollout`, is tried anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toka_operator.advice import add_advice
from toka_operator.caches import SHARED_PVC
from toka_operator.conditions import AVAILABLE, DEADLINE_EXCEEDED, DEGRADED, PROGRESSING, READY, Condition
from toka_operator.fields import Json
from toka_operator.fingerprint import CLAIM_FIELDS, NOT_POD_SCHEDULING_FIELDS, POD_FIELDS, POD_ROLLOUT_FIELDS
from toka_operator.observed import Observed
from toka_operator.resources import CONTROLLER_REVISION, Owner, set_name
from toka_operator.revisions import with_stored_revision
from toka_operator.settings import SPEC_ANNOTATION
from toka_operator.spec import DEFAULTS, TokaDeploymentSpec, parse
from toka_operator.times import format_time

ROLLED_BACK, ROLLING_BACK = "RolledBack", "RollingBack"


@dataclass(frozen=True, slots=True)
class Resort:
    """The last revision that was complete, beside the one that is asked for. `failed`: the entry of the status about
    the rollout that was given up, while that holds."""

    wish: str = ""
    """The same as long as the same is asked for."""
    spec: TokaDeploymentSpec | None = None
    """The spec of that revision; None if there is none to go back to."""
    failed: Json | None = None


_NO_RESORT = Resort()


def find_resort(owner: Owner, body: Mapping[str, Any], spec: TokaDeploymentSpec, observed: Observed) -> Resort:
    """The way back from `spec`, and whether it was taken. `observed.complete_revision` says where it leads to."""
    failed = (body.get("status") or {}).get("rollback")
    former = observed.complete_revision
    if spec.rollout.on_failure != "Rollback" or not former or former == spec.revision:
        return _NO_RESORT
    wish = describe_wish(body["spec"], spec)
    back = _restore(owner, body, former, observed)
    is_in_force = back is not None and failed is not None and failed.get("wish") == wish
    return Resort(wish, back, failed if is_in_force else None)


def give_up(
    resort: Resort, spec: TokaDeploymentSpec, observed: Observed, degraded: Condition, now: float
) -> Json | None:
    """The status's entry about a rollout that ran out of time; None if there is nothing to go back to.

    An engine that crashes again and again may run at this very moment: then what ended it last is the cause.
    """
    if resort.spec is None:
        return None
    new = (pod for pod in observed.pods if pod.revision == spec.revision and not pod.is_ready)
    last = next((pod.failure for pod in new if pod.failure is not None), None)
    reason, message = degraded.reason, degraded.message
    if reason == DEADLINE_EXCEEDED and last is not None:
        reason, message = last.reason, f"pod {last.pod}: {last.message}"
    entry: Json = {"revision": spec.revision, "wish": resort.wish, "time": format_time(now)}
    return {**entry, "reason": reason, "message": message[:1024]}


def tell_rollback(conditions: list[Condition], failed: Json, revision: str) -> list[Condition]:
    """The conditions while the pods are of another revision than was asked for."""
    found = {condition.type: condition for condition in conditions}
    why = f"revision {failed['revision']} was given up ({failed['reason']}: {failed['message'].rstrip('.')})"
    text = add_advice(ROLLED_BACK, f"{why}; the pods are of revision {revision} again")
    is_going = found[PROGRESSING].is_true
    progressing = Condition(PROGRESSING, is_going, ROLLING_BACK if is_going else ROLLED_BACK, text)
    is_worse = found[DEGRADED].is_true and not found[AVAILABLE].is_true
    told = {
        READY: Condition(READY, False, ROLLED_BACK, text),
        PROGRESSING: progressing,
        DEGRADED: found[DEGRADED] if is_worse else Condition(DEGRADED, True, ROLLED_BACK, text),
    }
    return [told.get(condition.type, condition) for condition in conditions]


def _restore(owner: Owner, body: Mapping[str, Any], revision: str, observed: Observed) -> TokaDeploymentSpec | None:
    """The spec with the pods of an earlier revision, as that keeps them; None if it does not, or they are others."""
    stored = observed.children.get((CONTROLLER_REVISION, set_name(owner.name, revision)))
    kept = _read_kept_spec(((stored or {}).get("metadata", {}).get("annotations") or {}).get(SPEC_ANNOTATION))
    if kept is None:
        return None
    pod_fields, pod_rollout = kept
    present = body["spec"]
    raw = {name: value for name, value in present.items() if name not in POD_FIELDS}
    rollout = {k: v for k, v in (raw.get("rollout") or {}).items() if k not in POD_ROLLOUT_FIELDS}
    raw = {**raw, **pod_fields, "rollout": {**rollout, **pod_rollout}}
    # These are not the pods': the scheduler's patience, and a claim, which cannot shrink.
    raw |= _with_present("scheduling", raw, present, NOT_POD_SCHEDULING_FIELDS)
    if (present.get("cache") or {}).get("type") == SHARED_PVC:
        raw |= _with_present("cache", raw, present, CLAIM_FIELDS)
    spec = parse({**body, "spec": raw})
    if isinstance(spec, list):
        return None
    spec = with_stored_revision(owner, spec, observed)
    return spec if spec.revision == revision else None


def _with_present(group: str, former: Json, present: Mapping[str, Any], names: tuple[str, ...]) -> Json:
    """The group of a former spec, with these fields as they are now; nothing if it has neither."""
    now, then = present.get(group) or {}, former.get(group) or {}
    merged = {k: v for k, v in then.items() if k not in names} | {k: now[k] for k in names if k in now}
    return {group: merged} if merged else {}


def _read_kept_spec(text: str | None) -> tuple[Json, Json] | None:
    """The fields of the pods, and those of them in `rollout`; None if there are none, or somebody wrote something
    else there."""
    try:
        kept = json.loads(text or "")
    except ValueError:
        return None
    if not isinstance(kept, Mapping):
        return None
    rollout = kept.get("rollout")
    pod_rollout = rollout if isinstance(rollout, Mapping) else {}
    return (
        {name: kept[name] for name in POD_FIELDS if name in kept},
        {name: pod_rollout[name] for name in POD_ROLLOUT_FIELDS if name in pod_rollout},
    )


def describe_wish(raw: Mapping[str, Any], spec: TokaDeploymentSpec) -> str:
    """The same text as long as the same pods are asked for, to be rolled out in the same way."""
    defaults = DEFAULTS["rollout"]
    rollout = {k: v for k, v in (raw.get("rollout") or {}).items() if k not in defaults or defaults[k] != v}
    text = json.dumps([spec.fingerprint, rollout], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
