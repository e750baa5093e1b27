"""The conditions of a TokaDeployment: what is true, why, since when.

Owns: each condition's meaning and the order in which reasons win. Pure. Conditions are observed, never
triggers: no module reads them to decide what to do, but for the time of the last progress.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from toka_operator.advice import add_advice
from toka_operator.autoscaling import explain_autoscaled
from toka_operator.canary import CANARY_FAILED, CANARY_WATCHED, FAILED, PASSED, Canary
from toka_operator.downloads import downloads_from_hub, explain_cached
from toka_operator.failures import (
    CLAIM_ON_ONE_NODE,
    DISRUPTION_REASONS,
    NOT_READY,
    NOT_READY_S,
    READINESS_GATE_CLOSED,
    READINESS_GATE_CLOSED_S,
    Failure,
    name_refusal,
)
from toka_operator.fields import Json
from toka_operator.monitoring import explain_monitored
from toka_operator.moves import find_displaced, find_hold_end
from toka_operator.observed import Observed
from toka_operator.plan import Plan, find_surge_fallback
from toka_operator.resources import AUTOSCALER, HTTP_ROUTE, INFERENCE_POOL, POD_MONITOR
from toka_operator.rollout import Window
from toka_operator.routing import explain_routed
from toka_operator.spec import TokaDeploymentSpec
from toka_operator.times import format_time

MODEL_CACHED, MONITORED, AUTOSCALED, ROUTED = "ModelCached", "Monitored", "Autoscaled", "Routed"
MOVING, SURGE_BLOCKED = "NodeCordoned", "SurgeBlocked"
DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
_NO_PODS = Window()
CLAIM_CONFLICT_S = 10.0
"""Seconds that a pod may be created on another node than the one that mounted its claim: some drivers allow it."""
READY, AVAILABLE, PROGRESSING = "Ready", "Available", "Progressing"
DEGRADED, CONFIG_VALID = "Degraded", "ConfigValid"

_PRIORITY = (
    "PodSecurityViolated",
    "QuotaExceeded",
    "WebhookFailed",
    "WebhookRefused",
    "PodsRejected",
    "SecretMissing",
    "ConfigMapMissing",
    "ClaimMissing",
    "ClaimOnOneNode",
    "ImageVolumesUnsupported",
    "ImagePullFailed",
    "ModelNotFound",
    "ModelAuthFailed",
    "ModelInvalid",
    "ConfigInvalid",
    "OutOfMemory",
    "DeviceUnavailable",
    "StorageFailed",
    "HubUnavailable",
    "PortInUse",
    "ContainerNotStarted",
    "VolumeFailed",
    "SandboxFailed",
    "StartupTimeout",
    "NodeLost",
)
"""Causes that a user can mend come before symptoms."""


@dataclass(frozen=True, slots=True)
class Condition:
    type: str
    is_true: bool
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The API server's answers to this pass's writes."""

    rejected: Mapping[str, str] = field(default_factory=dict)
    """Child ("StatefulSet smollm2-1a2b3c4d") -> why the API server refused it, or could not write it."""
    failed: frozenset[str] = frozenset()
    """Those of `rejected` that no rule refused, so that no spec is to blame."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Pods of all revisions, those that go not counted, and of the current revision."""

    num_wanted: int
    num_pods: int
    num_ready: int
    num_available: int
    num_updated: int
    num_updated_available: int
    num_old: int
    """Pods of other revisions, those that go included."""
    num_extra: int = 0
    """Pods of the current revision that are kept beyond those wanted, while some of them move."""

    @property
    def is_underway(self) -> bool:
        """Whether more pods have to become available, or old ones have to be told to go. That those that were told
        finish their streams is no lack of progress."""
        return self.num_wanted > 0 and (
            self.num_pods > self.num_updated or self.num_updated_available < self.num_wanted
        )


def count_pods(spec: TokaDeploymentSpec, observed: Observed, plan: Plan, now: float) -> Counts:
    staying = [pod for pod in observed.pods if not pod.is_terminating]
    current = [pod for pod in staying if pod.revision == spec.revision]
    min_ready_s = spec.rollout.min_ready_s
    return Counts(
        num_wanted=spec.num_wanted,
        num_pods=len(staying),
        num_ready=sum(pod.is_ready for pod in staying),
        num_available=sum(pod.is_available(now, min_ready_s) for pod in staying),
        num_updated=len(current),
        num_updated_available=sum(pod.is_available(now, min_ready_s) for pod in current),
        num_old=sum(pod.revision != spec.revision for pod in observed.pods),
        num_extra=max(0, plan.targets.get(spec.revision, _NO_PODS).replicas - spec.num_wanted),
    )


def decide_conditions(
    spec: TokaDeploymentSpec,
    observed: Observed,
    plan: Plan,
    counts: Counts,
    outcome: Outcome,
    is_late: bool,
    now: float,
    canary: Canary | None = None,
) -> list[Condition]:
    """Every condition. `is_late`: the rollout made no progress within its deadline. `canary`: of the revision that is
    asked for."""
    degraded = _decide_degraded(spec, observed, counts, outcome, is_late, now, canary)
    progressing = _decide_progressing(spec, observed, plan, counts, is_late, now, canary)
    optional = [Condition(MODEL_CACHED, *explain_cached(spec, observed))] if downloads_from_hub(spec) else []
    if spec.pod_monitor == "On":
        optional.append(Condition(MONITORED, *explain_monitored(observed.see(POD_MONITOR))))
    if spec.routing.is_wanted:
        route = next(iter(observed.of_kind(HTTP_ROUTE)), None)
        sights = (observed.see(INFERENCE_POOL), observed.see(HTTP_ROUTE))
        optional.append(Condition(ROUTED, *explain_routed(spec.routing, *sights, route)))
    if spec.autoscaling is not None and not spec.suspend:
        autoscaler = next(iter(observed.of_kind(AUTOSCALER)), None)
        optional.append(Condition(AUTOSCALED, *explain_autoscaled(autoscaler)))
    return [
        _decide_ready(spec, counts, degraded, progressing),
        _decide_available(spec, counts),
        progressing,
        degraded,
        _decide_config_valid(outcome),
        *optional,
    ]


def _is_complete(counts: Counts) -> bool:
    """Whether every wanted pod is of the current revision and available. Old ones may still finish their streams, and
    pods beyond those wanted may move."""
    has_old = counts.num_pods > counts.num_updated
    is_in_number = counts.num_wanted <= counts.num_updated <= counts.num_wanted + counts.num_extra
    return not has_old and is_in_number and counts.num_updated_available >= counts.num_wanted


def _idle_reason(spec: TokaDeploymentSpec) -> str:
    return "Suspended" if spec.suspend else "ScaledToZero"


def _decide_ready(spec: TokaDeploymentSpec, counts: Counts, degraded: Condition, progressing: Condition) -> Condition:
    if counts.num_wanted == 0:
        return Condition(READY, False, _idle_reason(spec), "no pods are wanted")
    summary = f"{counts.num_updated_available} of {counts.num_wanted} pods of the current revision are available"
    if _is_complete(counts):
        return Condition(READY, True, "AllAvailable", summary)
    if degraded.is_true:
        return Condition(READY, False, degraded.reason, degraded.message)
    return Condition(READY, False, progressing.reason, summary)


def _decide_available(spec: TokaDeploymentSpec, counts: Counts) -> Condition:
    if counts.num_wanted == 0:
        return Condition(AVAILABLE, False, _idle_reason(spec), "no pods are wanted")
    needed = max(1, counts.num_wanted - spec.rollout.max_unavailable)
    message = f"{counts.num_available} pods are available, {needed} are needed"
    if counts.num_available >= needed:
        return Condition(AVAILABLE, True, "MinimumAvailable", message)
    return Condition(AVAILABLE, False, "MinimumUnavailable", message)


def _decide_progressing(
    spec: TokaDeploymentSpec,
    observed: Observed,
    plan: Plan,
    counts: Counts,
    is_late: bool,
    now: float,
    canary: Canary | None,
) -> Condition:
    if counts.num_wanted == 0 and not observed.pods:
        return Condition(PROGRESSING, False, _idle_reason(spec), "no pods are wanted")
    if _is_complete(counts) and counts.num_old:
        return Condition(PROGRESSING, True, "Draining", f"{counts.num_old} old pods finish their streams")
    if _is_complete(counts) and counts.num_extra:
        return Condition(PROGRESSING, True, MOVING, _explain_move(spec, observed, now))
    if _is_complete(counts):
        return Condition(PROGRESSING, False, "Complete", f"revision {spec.revision} is rolled out")
    if spec.rollout.paused:
        return Condition(PROGRESSING, False, "Paused", "rollout.paused is set")
    if canary is not None and canary.phase == FAILED:
        return Condition(PROGRESSING, False, CANARY_FAILED, canary.message)
    if is_late:
        return Condition(PROGRESSING, False, DEADLINE_EXCEEDED, _explain_deadline(spec, canary))
    waiting = _find_waiting(spec, observed)
    if waiting is not None and counts.num_old:
        return Condition(PROGRESSING, True, SURGE_BLOCKED, _explain_blocked_surge(spec, observed, waiting, now))
    if waiting is not None:
        return Condition(PROGRESSING, True, waiting.reason, f"pod {waiting.pod} waits: {waiting.message}")
    if canary is not None and canary.is_measured:
        return Condition(PROGRESSING, True, CANARY_WATCHED, canary.message)
    if canary is not None and canary.phase == PASSED:
        text = f"revision {spec.revision} replaces older pods. Its canary passed: {canary.message}"
        return Condition(PROGRESSING, True, "RolloutUnderway", text)
    if len(plan.targets) > 1 or counts.num_old:
        return Condition(PROGRESSING, True, "RolloutUnderway", f"revision {spec.revision} replaces older pods")
    return Condition(PROGRESSING, True, "Scaling", f"revision {spec.revision} goes to {counts.num_wanted} pods")


def _explain_deadline(spec: TokaDeploymentSpec, canary: Canary | None) -> str:
    text = f"no progress within {spec.rollout.progress_deadline_s} s"
    return f"{text}: {canary.message}" if canary is not None and canary.is_measured else text


def _explain_blocked_surge(spec: TokaDeploymentSpec, observed: Observed, waiting: Failure, now: float) -> str:
    """The new pod that has no room, and what is done about it."""
    text = f"no room for the new revision's pod {waiting.pod}: {waiting.message.rstrip('.')}. "
    fallback = find_surge_fallback(spec, observed)
    if spec.rollout.max_surge == 0:
        return f"{text}It gets the room of an old pod that goes"
    if fallback is None:
        return f"{text}Free or add a node, or set rollout.strategy to InPlace, so that an old pod goes first"
    after = f"rollout.surgeFallbackSeconds ({spec.rollout.surge_fallback_s} s)"
    return f"{text}An old pod goes first {'now, since it waited for' if now >= fallback else 'after'} {after}"


def _explain_move(spec: TokaDeploymentSpec, observed: Observed, now: float) -> str:
    """The pods that leave a cordoned node, and what their successors wait for."""
    displaced, end = find_displaced(spec, observed), find_hold_end(spec, observed, now)
    if not displaced:
        return "a pod was moved from a cordoned node; one more than wanted stays until its successor is available"
    pods = ", ".join(f"{pod.name} ({pod.node})" for pod in displaced)
    text = f"a pod goes from a cordoned node when another serves in its place: {pods}"
    waiting = _find_waiting(spec, observed)
    if waiting is not None:
        text += f"; the new pod {waiting.pod} waits: {waiting.message}"
    if spec.num_wanted == 1 and end is not None and end <= now:
        text += "; it waited for too long, so evictions are no longer held up"
    return text


def _find_waiting(spec: TokaDeploymentSpec, observed: Observed) -> Failure | None:
    """The first pod of the current revision that waits for capacity, or may not be made for want of quota."""
    failures = (p.failure for p in observed.pods if p.revision == spec.revision and p.is_failing)
    waiting = [f for f in failures if f is not None and f.is_waiting_for_capacity]
    return next(iter([*waiting, *(f for f in observed.missing_pods if f.reason == "QuotaExceeded")]), None)


def find_patience_end(spec: TokaDeploymentSpec, failure: Failure | None) -> float | None:
    """The Unix time at which waiting for capacity, for a readiness gate or an answer to a probe begins to count as a
    failure; None for whatever is one at once."""
    if failure is None:
        return None
    if failure.reason == NOT_READY:
        return failure.since + NOT_READY_S
    if failure.reason == READINESS_GATE_CLOSED:
        return failure.since + READINESS_GATE_CLOSED_S
    if failure.reason == CLAIM_ON_ONE_NODE:
        return failure.since + CLAIM_CONFLICT_S
    return failure.since + spec.scheduling.patience_s if failure.is_waiting_for_capacity else None


def _decide_degraded(
    spec: TokaDeploymentSpec,
    observed: Observed,
    counts: Counts,
    outcome: Outcome,
    is_late: bool,
    now: float,
    canary: Canary | None,
) -> Condition:
    if observed.taken_names:
        names = ", ".join(f"{kind} {name}" for kind, name in sorted(observed.taken_names))
        message = f"{names}: the name is taken by an object that does not belong to this TokaDeployment"
        return _degraded("NameTaken", message)
    if outcome.rejected:
        child, why = sorted(outcome.rejected.items())[0]
        otherwise = "ChildFailed" if child in outcome.failed else "ChildRejected"
        return _degraded(name_refusal(why, otherwise), f"{child}: {why}")
    failing = [pod.failure for pod in observed.pods if pod.is_failing and pod.failure is not None]
    failing += observed.missing_pods
    is_short = counts.num_available < counts.num_wanted
    failing += [f for f in _find_leaving(spec, observed, now) if is_short or f.reason == "PodStuckTerminating"]
    failing = [failure for failure in failing if now >= (find_patience_end(spec, failure) or 0.0)]
    if (counts.num_old or counts.num_extra) and counts.num_available >= counts.num_wanted:
        failing = [failure for failure in failing if not _is_want_of_room(failure)]
    if failing:
        worst = min(failing, key=_rank)
        return _degraded(worst.reason, _describe(worst, len(failing)))
    if canary is not None and canary.phase == FAILED:
        return _degraded(CANARY_FAILED, f"revision {spec.revision} was given up. {canary.message}")
    if is_late:
        return _degraded(DEADLINE_EXCEEDED, _explain_deadline(spec, canary))
    return Condition(DEGRADED, False, "AsExpected")


def _degraded(reason: str, message: str) -> Condition:
    return Condition(DEGRADED, True, reason, add_advice(reason, message))


def _is_want_of_room(failure: Failure) -> bool:
    """Whether a new revision's pod only lacks room, while the old ones serve: then the rollout says so."""
    return failure.is_waiting_for_capacity or failure.reason == "QuotaExceeded"


def find_failures(spec: TokaDeploymentSpec, observed: Observed, now: float) -> list[Failure]:
    """The failure of each pod that has one, or is missing. Pods that go are left out, unless they are stuck or were
    not told to go by us."""
    failures = [pod.failure for pod in observed.pods if pod.failure is not None and not pod.is_terminating]
    return [*failures, *observed.missing_pods, *_find_leaving(spec, observed, now)]


def _find_leaving(spec: TokaDeploymentSpec, observed: Observed, now: float) -> list[Failure]:
    """Pods that go since their node is lost, or somebody evicts them, or that do not come to an end."""
    message = "the pod is still there after its grace period: its node is probably gone"
    leaving = [pod for pod in observed.pods if pod.is_terminating]
    found = [pod.failure for pod in leaving if pod.failure is not None and pod.failure.reason in DISRUPTION_REASONS]
    named = {failure.pod for failure in found}
    stuck = [pod for pod in leaving if pod.is_stuck(now, spec.rollout.stuck_s) and pod.name not in named]
    return [*found, *(Failure(pod.name, "", "PodStuckTerminating", message) for pod in stuck)]


def _rank(failure: Failure) -> tuple[int, str]:
    return (_PRIORITY.index(failure.reason) if failure.reason in _PRIORITY else len(_PRIORITY), failure.pod)


def _describe(failure: Failure, num_failing: int) -> str:
    others = f" ({num_failing - 1} more pods fail)" if num_failing > 1 else ""
    code = f" (exit code {failure.exit_code}, {failure.restarts} restarts)" if failure.exit_code is not None else ""
    return f"pod {failure.pod}{code}: {failure.message}{others}"


def _decide_config_valid(outcome: Outcome) -> Condition:
    refused = {child: why for child, why in outcome.rejected.items() if child not in outcome.failed}
    if refused:
        child, why = sorted(refused.items())[0]
        return Condition(CONFIG_VALID, False, "ChildRejected", f"the API server refused {child}: {why}")
    return Condition(CONFIG_VALID, True, "Valid")


def merge_conditions(
    conditions: Iterable[Condition], previous: Iterable[Json], generation: int, now: float
) -> list[Json]:
    """Conditions as stored: the time of a transition moves only when the status does."""
    before = {c.get("type"): c for c in previous}
    merged = []
    for condition in conditions:
        status = "True" if condition.is_true else "False"
        old = before.get(condition.type, {})
        since = old.get("lastTransitionTime") if old.get("status") == status else None
        merged.append(
            {
                "type": condition.type,
                "status": status,
                "reason": condition.reason,
                "message": condition.message[:4096],
                "observedGeneration": generation,
                "lastTransitionTime": since or format_time(now),
            }
        )
    return merged
