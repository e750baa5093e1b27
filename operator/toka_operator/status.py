"""The status block: what a user sees of a TokaDeployment.

Owns: every field of `status` and the events reported on its transitions. Pure: the same observations give the
same status, so nothing is written while nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from toka_operator.advice import add_advice
from toka_operator.canary import FAILED, PASSED, Canary, describe_canary
from toka_operator.conditions import (
    AVAILABLE,
    CONFIG_VALID,
    DEGRADED,
    MOVING,
    PROGRESSING,
    READY,
    SURGE_BLOCKED,
    Condition,
    Counts,
    Outcome,
    count_pods,
    decide_conditions,
    find_failures,
    find_patience_end,
    merge_conditions,
)
from toka_operator.downloads import describe_cache
from toka_operator.errors import FieldError
from toka_operator.failures import Failure
from toka_operator.fields import Json
from toka_operator.observed import Observed
from toka_operator.plan import Plan
from toka_operator.podspec import ENGINE_CONTAINER
from toka_operator.resources import Owner, selector_labels
from toka_operator.rollback import ROLLED_BACK, Resort, give_up, tell_rollback
from toka_operator.spec import TokaDeploymentSpec
from toka_operator.times import format_time, parse_time

INVALID = "InvalidSpec"
_NO_RESORT = Resort()
MAX_FAILURES = 20
STARTUP_SEEN_WITHIN_S = 30.0
"""A pod that became ready longer ago may have been ready before that: its last transition is not its start."""
START_BATCH_S = 2.0
"""A new object's first status waits this long: of a thousand at once, most are ready soon after."""
READINESS_BATCH_S = 1.0
"""A status with more ready pods waits this long for the others' readiness."""
COUNTS_BATCH_S = 5.0
"""A status in which only counts of pods changed, and no readiness, waits this long."""

_STARTING = {READY: "False", AVAILABLE: "False", DEGRADED: "False", CONFIG_VALID: "True"}
"""The conditions of a new object with which nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Event:
    """One transition, as reported to the user."""

    is_warning: bool
    reason: str
    message: str


def build_status(
    owner: Owner,
    spec: TokaDeploymentSpec,
    observed: Observed,
    plan: Plan,
    outcome: Outcome,
    previous: Json,
    now: float,
    resort: Resort = _NO_RESORT,
    canary: Canary | None = None,
) -> Json:
    """The whole status. `previous` gives what cannot be seen twice, and nothing else: the times of transitions
    and of the last progress, how the revision's first pod came up, and the last revision that was complete. `resort`:
    the way back from a rollout that fails, or was taken from one that did. `canary`: of the revision asked for."""
    counts = count_pods(spec, observed, plan, now)
    revisions = _describe_revisions(spec, observed, plan, now)
    last_progress = _find_last_progress(owner, spec, revisions, previous, now, canary)
    is_overdue = now >= parse_time(last_progress) + spec.rollout.progress_deadline_s
    is_late = counts.is_underway and is_overdue and not spec.rollout.paused
    on_trial = canary if canary is not None and canary.revision == spec.revision else None
    conditions = decide_conditions(spec, observed, plan, counts, outcome, is_late, now, on_trial)
    rollback = resort.failed
    is_complete = next(c.is_true for c in conditions if c.type == READY) and rollback is None
    if rollback is not None:
        conditions = tell_rollback(conditions, rollback, spec.revision)
    elif is_late or (on_trial is not None and on_trial.phase == FAILED):
        rollback = give_up(resort, spec, observed, next(c for c in conditions if c.type == DEGRADED), now)
    phase, reason = _decide_phase(spec, counts, {c.type: c for c in conditions})
    status: Json = {
        "observedGeneration": owner.generation,
        "url": _url(owner, spec),
        "model": spec.model.served_name,
        "image": _image(plan.templates.get(spec.revision)),
        "phase": phase,
        "reason": reason,
        "ready": f"{counts.num_ready}/{counts.num_wanted}",
        "replicas": counts.num_pods,
        "readyReplicas": counts.num_ready,
        "updatedReplicas": counts.num_updated,
        "availableReplicas": counts.num_available,
        "gpus": counts.num_pods * spec.parallelism.num_gpus if spec.resources.device == "gpu" else 0,
        "selector": ",".join(f"{k}={v}" for k, v in sorted(selector_labels(owner.name).items())),
        "currentRevision": spec.revision,
        "lastProgressTime": last_progress,
        "revisions": revisions,
        "failures": _describe_failures(find_failures(spec, observed, now)),
    }
    complete = spec.revision if is_complete else observed.complete_revision
    status |= {"completeRevision": complete} if complete else {}
    status |= {"rollback": rollback} if rollback is not None else {}
    status |= {"canary": describe_canary(canary)} if canary is not None else {}
    startup = _describe_startup(spec, observed, previous, now)
    if startup is not None:
        status["startup"] = startup
    cache = describe_cache(owner.name, spec, observed)
    if cache is not None:
        status["cache"] = cache
    merged = merge_conditions(conditions, previous.get("conditions", []), owner.generation, now)
    return {**status, "conditions": merged}


def build_invalid_status(
    owner: Owner, errors: Sequence[FieldError], observed: Observed, previous: Json, now: float
) -> Json:
    """The status of an object whose spec cannot be used: every bad field named. Its pods stay, and are counted."""
    pods = [pod for pod in observed.pods if not pod.is_terminating]
    num_ready, num_available = sum(pod.is_ready for pod in pods), sum(pod.is_available(now, 0.0) for pod in pods)
    wanted = str(previous.get("ready", "")).rpartition("/")[2] or str(len(pods))
    message = add_advice("InvalidSpec", "; ".join(str(error) for error in errors))
    serving = f"{num_available} pods are available, of those that the last valid spec asked for"
    conditions = [
        Condition(READY, False, INVALID, message),
        Condition(AVAILABLE, num_available > 0, "MinimumAvailable" if num_available else "MinimumUnavailable", serving),
        Condition(PROGRESSING, False, INVALID, "nothing is changed until the spec is valid"),
        Condition(DEGRADED, True, INVALID, message),
        Condition(CONFIG_VALID, False, INVALID, message),
    ]
    return {
        **previous,
        "observedGeneration": owner.generation,
        "phase": "Invalid",
        "reason": INVALID,
        "ready": f"{num_ready}/{wanted}",
        "replicas": len(pods),
        "readyReplicas": num_ready,
        "availableReplicas": num_available,
        "failures": _describe_failures(pod.failure for pod in pods if pod.failure is not None),
        "conditions": merge_conditions(conditions, previous.get("conditions", []), owner.generation, now),
    }


def find_next_moment_s(spec: TokaDeploymentSpec, observed: Observed, status: Json, now: float) -> float | None:
    """Seconds until time alone changes the status: a deadline passes, or a pod has waited for a node for too long.

    None if there is no such moment to come. One that is past asks for nothing: it is in the status already.
    """
    moments = [find_patience_end(spec, pod.failure) for pod in observed.pods if pod.is_failing]
    progressing = next((c for c in status["conditions"] if c["type"] == PROGRESSING), None)
    if progressing is not None and progressing["status"] == "True":
        moments.append(parse_time(status["lastProgressTime"]) + spec.rollout.progress_deadline_s)
    return min((moment - now + 0.01 for moment in moments if moment is not None and moment > now), default=None)


def find_batching_delay_s(previous: Json, status: Json) -> float:
    """Return how long a change of the status may wait for the next one, so that a start of many pods is a few writes.

    Not at all if somebody waits for it: another condition or reason, a failure, or that a new spec was seen. Counts
    of something under way, and that a new object starts, may wait; longest, what says nothing of readiness.
    """
    before = {c.get("type"): (c.get("status"), c.get("reason")) for c in previous.get("conditions", [])}
    after = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
    if after.get(PROGRESSING, ("", ""))[0] != "True" or status["failures"] != previous.get("failures", []):
        return 0.0
    if not previous:
        is_well = all(after[kind][0] == expected for kind, expected in _STARTING.items())
        return START_BATCH_S if is_well else 0.0
    if previous.get("canary") != status.get("canary"):
        return 0.0
    if before != after or previous.get("observedGeneration") != status["observedGeneration"]:
        return 0.0
    return COUNTS_BATCH_S if _readiness(previous) == _readiness(status) else READINESS_BATCH_S


def _readiness(status: Json) -> dict[str, tuple[int, int]]:
    """(ready, available) pods of each revision that has any."""
    revisions = status.get("revisions", [])
    return {r["name"]: (r["ready"], r["available"]) for r in revisions if r["ready"]}


def find_events(previous: Json, status: Json) -> list[Event]:
    """The transitions to report: of Ready, Available, Degraded and ConfigValid and of the current revision, and
    that pods leave a cordoned node, or have no room to be replaced."""
    before = {c["type"]: c for c in previous.get("conditions", [])}
    events = []
    old, new = previous.get("currentRevision"), status.get("currentRevision")
    if old and new and old != new:
        events.append(Event(False, "RolloutStarted", f"revision {new} replaces {old}"))
    canary = status.get("canary") or {}
    if canary.get("phase") == PASSED and previous.get("canary") != canary:
        events.append(Event(False, "CanaryPassed", canary["message"]))
    for condition in status["conditions"]:
        kind, is_true = condition["type"], condition["status"] == "True"
        was = before.get(kind, {})
        is_new_status = was.get("status", "") != condition["status"]
        is_new_reason = was.get("reason", "") != condition["reason"]
        if kind == AVAILABLE and not is_true and was.get("status") == "True":
            events.append(Event(bool(condition["reason"] == "MinimumUnavailable"), "Unavailable", condition["message"]))
        if kind == PROGRESSING and condition["reason"] in (MOVING, SURGE_BLOCKED) and is_new_reason:
            events.append(Event(False, condition["reason"], condition["message"]))
        if kind == READY and is_true and is_new_status:
            events.append(Event(False, "Ready", condition["message"]))
        if kind == DEGRADED and is_true and (is_new_status or is_new_reason):
            events.append(Event(True, condition["reason"], condition["message"]))
        if kind == CONFIG_VALID and not is_true and condition["reason"] != INVALID and (is_new_status or is_new_reason):
            events.append(Event(True, condition["reason"], condition["message"]))
    return events


def _url(owner: Owner, spec: TokaDeploymentSpec) -> str:
    port = "" if spec.service.port == 80 else f":{spec.service.port}"
    return f"http://{owner.name}.{owner.namespace}.svc{port}/v1"


def _image(template: Json | None) -> str:
    containers = template["spec"]["containers"] if template else []
    return next((c["image"] for c in containers if c["name"] == ENGINE_CONTAINER), "")


def _describe_revisions(spec: TokaDeploymentSpec, observed: Observed, plan: Plan, now: float) -> list[Json]:
    described = []
    for revision in sorted(set(plan.targets) | set(plan.revisions), key=lambda r: (r != spec.revision, r)):
        pods = [p for p in observed.pods if p.revision == revision and not p.is_terminating]
        if revision != spec.revision and not any(p.revision == revision for p in observed.pods):
            continue
        described.append(
            {
                "name": revision,
                "image": _image(plan.templates.get(revision)),
                "replicas": len(pods),
                "ready": sum(p.is_ready for p in pods),
                "available": sum(p.is_available(now, spec.rollout.min_ready_s) for p in pods),
            }
        )
    return described


def _describe_startup(spec: TokaDeploymentSpec, observed: Observed, previous: Json, now: float) -> Json | None:
    """Return how the first ready pod of the current revision came up; just the revision, if that cannot be seen.

    It stays as it is for as long as the revision: a pod that is ready again later did not start then.
    """
    reported: Json | None = previous.get("startup")
    if reported is not None and reported.get("revision") == spec.revision:
        return reported
    ready = [p for p in observed.pods if p.revision == spec.revision and p.is_ready and not p.is_terminating]
    if not ready:
        return None
    first = min(ready, key=lambda pod: (pod.ready_since, pod.ordinal))
    if first.startup is None or now >= first.ready_since + STARTUP_SEEN_WITHIN_S:
        return {"revision": spec.revision}
    return {
        "revision": spec.revision,
        "pod": first.name,
        "scheduleSeconds": first.startup.schedule_s,
        "startSeconds": first.startup.start_s,
        "loadSeconds": first.startup.load_s,
    }


def _find_last_progress(
    owner: Owner, spec: TokaDeploymentSpec, revisions: list[Json], previous: Json, now: float, canary: Canary | None
) -> str:
    """The time of the last progress: another wish, more available pods of the current revision, fewer old ones, or a
    canary that passed.

    A deadline counts from the wish, however old the object is, and from when something that was complete is not.
    """
    before = {r["name"]: r for r in previous.get("revisions", [])}
    after = {r["name"]: r for r in revisions}
    last = previous.get("lastProgressTime")
    is_same_wish = previous.get("observedGeneration") == owner.generation
    is_same_wish = is_same_wish and previous.get("currentRevision") == spec.revision
    is_same_wish = is_same_wish and previous.get("phase") != "Invalid"
    if not last or not is_same_wish:
        return format_time(now)
    if _was_over(previous):
        return str(last) if before == after else format_time(now)
    more_new = _number(after, spec.revision, "available") > _number(before, spec.revision, "available")
    old_before = sum(r["replicas"] for name, r in before.items() if name != spec.revision)
    old_after = sum(r["replicas"] for name, r in after.items() if name != spec.revision)
    was_passed = (previous.get("canary") or {}).get("phase") == PASSED
    has_passed = canary is not None and canary.phase == PASSED and not was_passed
    return format_time(now) if more_new or old_after < old_before or has_passed else str(last)


def _was_over(previous: Json) -> bool:
    """Whether nothing was under way, so that whatever starts now has its whole deadline."""
    conditions = {c["type"]: c for c in previous.get("conditions", [])}
    reason = conditions.get(PROGRESSING, {}).get("reason")
    return reason in ("Complete", MOVING, ROLLED_BACK, "Paused", "Suspended", "ScaledToZero")


def _number(revisions: dict[str, Json], name: str, key: str) -> int:
    return int(revisions.get(name, {}).get(key, 0))


def _describe_failures(failures: Iterable[Failure]) -> list[Json]:
    described = []
    for failure in sorted(failures, key=lambda failure: failure.pod)[:MAX_FAILURES]:
        entry: Json = {"pod": failure.pod, "reason": failure.reason, "message": failure.message}
        entry["restarts"] = failure.restarts
        if failure.container:
            entry["container"] = failure.container
        if failure.exit_code is not None:
            entry["exitCode"] = failure.exit_code
        described.append(entry)
    return described


def _decide_phase(spec: TokaDeploymentSpec, counts: Counts, conditions: dict[str, Condition]) -> tuple[str, str]:
    """The one word for a table, and why."""
    degraded, progressing = conditions[DEGRADED], conditions[PROGRESSING]
    reason = degraded.reason if degraded.is_true else progressing.reason
    if counts.num_wanted == 0:
        return ("Suspended" if spec.suspend else "ScaledToZero"), reason
    if conditions[READY].is_true:
        return "Running", reason
    if degraded.is_true:
        return "Degraded", reason
    if counts.num_old:
        return "Updating", reason
    return ("Starting" if counts.num_available == 0 else "Scaling"), reason
