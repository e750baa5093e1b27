"""The canary of a rollout: the first new pod has traffic for a while and is judged, before any other pod is replaced.

Owns: when there is one, when it is watched, and its verdict. Pure. The status keeps the state, with what the engines
had counted when the time began, so that another leader, or the same operator after a restart, goes on with it. A
verdict holds for its revision: a failed one is tried again when the pods or `rollout` change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from toka_operator.fields import Json
from toka_operator.figures import MIN_REQUESTS, Figures, add_up, compare, fails_more, is_slower
from toka_operator.observed import Observed, PodView
from toka_operator.spec import TokaDeploymentSpec
from toka_operator.times import format_time, parse_time

WAITING, WATCHED, PASSED, FAILED = "Waiting", "Watched", "Passed", "Failed"
CANARY_FAILED, CANARY_WATCHED = "CanaryFailed", "CanaryWatched"
MAX_COMPARED = 8
"""Old pods whose figures are read, at most."""
ANSWERS_WITHIN_S = 10.0
"""An old pod that has not answered for so long is left out."""


@dataclass(frozen=True, slots=True)
class Canary:
    """The state of one revision's canary, as the status has it."""

    revision: str
    phase: str
    wish: str = ""
    """The wish that it failed for."""
    pod: str = ""
    uid: str = ""
    restarts: int = 0
    since: float = 0.0
    """The time at which its time began (Unix time)."""
    message: str = ""
    before: Mapping[str, Figures] = field(default_factory=dict)
    """By uid of a pod, what it had counted when the time began."""

    @property
    def limit(self) -> int | None:
        """The number of pods of its revision that there may be; None: the rollout goes on."""
        return {WAITING: 1, WATCHED: 1, FAILED: 0}.get(self.phase)

    @property
    def is_measured(self) -> bool:
        return bool(self.pod) and self.phase in (WAITING, WATCHED)


def find_canary(
    spec: TokaDeploymentSpec, observed: Observed, previous: Canary | None, wish: str, now: float
) -> Canary | None:
    """The canary of the revision that is asked for; None if there is none. `wish`: the same as long as the same is
    asked for."""
    if spec.rollout.canary_s == 0 or spec.num_wanted == 0:
        return None
    if previous is not None and previous.revision != spec.revision:
        previous = None
    if previous is not None and previous.phase == FAILED and previous.wish != wish:
        previous = None
    if previous is not None and previous.phase in (PASSED, FAILED):
        return previous
    staying = [pod for pod in observed.pods if not pod.is_terminating]
    current = sorted((p for p in staying if p.revision == spec.revision), key=lambda pod: pod.ordinal)
    if previous is None and not _begins(spec, observed, current, now):
        return None
    watched = next((pod for pod in current if previous is not None and pod.uid == previous.uid), None)
    if previous is not None and previous.phase == WATCHED and watched is not None:
        return _watch(spec, observed, previous, watched, wish, now)
    available = [pod for pod in current if pod.is_available(now, spec.rollout.min_ready_s)]
    if not available:
        return Canary(spec.revision, WAITING, message="no pod of the revision is available yet")
    return _begin(spec, observed, available[0], now)


def find_measured(spec: TokaDeploymentSpec, observed: Observed, canary: Canary | None, now: float) -> list[PodView]:
    """The pods whose figures are to be read: the canary, and those that it is compared with."""
    if canary is None or not canary.is_measured:
        return []
    own = [pod for pod in observed.pods if pod.uid == canary.uid]
    known = [pod for pod in observed.pods if pod.uid in canary.before and pod.uid != canary.uid]
    others = known if canary.phase == WATCHED else _find_compared(spec, observed, now)
    return [pod for pod in (*own, *others) if pod.address and not pod.is_terminating]


def _begins(spec: TokaDeploymentSpec, observed: Observed, current: list[PodView], now: float) -> bool:
    """Whether a rollout begins, from pods that serve. What was complete before needs no trial."""
    is_new = spec.revision != observed.complete_revision and len(current) <= 1
    old = [pod for pod in observed.pods if pod.revision != spec.revision]
    return is_new and not spec.rollout.paused and any(p.is_available(now, spec.rollout.min_ready_s) for p in old)


def _find_compared(spec: TokaDeploymentSpec, observed: Observed, now: float) -> list[PodView]:
    """The old pods that it is compared with: those of the last complete revision, rather than another canary."""
    old = [p for p in observed.pods if p.revision != spec.revision and p.is_available(now, spec.rollout.min_ready_s)]
    proven = [pod for pod in old if pod.revision == observed.complete_revision]
    return sorted(proven or old, key=lambda pod: pod.name)[:MAX_COMPARED]


def _begin(spec: TokaDeploymentSpec, observed: Observed, pod: PodView, now: float) -> Canary:
    """The time begins when the engines have told what they had counted by then."""
    others = _find_compared(spec, observed, now)
    waiting = Canary(spec.revision, WAITING, pod=pod.name, uid=pod.uid, restarts=pod.restarts)
    if pod.uid not in observed.figures:
        return replace(waiting, message=f"pod {pod.name} does not answer at /metrics")
    is_patient = now < pod.ready_since + spec.rollout.min_ready_s + ANSWERS_WITHIN_S
    if is_patient and any(other.uid not in observed.figures for other in others):
        return replace(waiting, message="the old pods are asked for their figures")
    before = {each.uid: observed.figures[each.uid] for each in (pod, *others) if each.uid in observed.figures}
    since = float(int(now))  # as the status has it
    message = (
        f"pod {pod.name} has traffic since {format_time(since)}; after {spec.rollout.canary_s} s its errors and first "
        f"tokens are compared with those of {len(before) - 1} old pods"
    )
    return replace(waiting, phase=WATCHED, since=since, message=message, before=before)


def _watch(spec: TokaDeploymentSpec, observed: Observed, canary: Canary, pod: PodView, wish: str, now: float) -> Canary:
    """The verdict, if there is one. Errors alone are enough at any time."""
    if pod.restarts > canary.restarts:
        failure = pod.failure
        why = f" ({failure.reason}: {failure.message})" if failure is not None else ""
        return _end(canary, FAILED, f"the engine of pod {pod.name} ended while it had traffic{why}", wish)
    latest = observed.figures.get(pod.uid)
    new = latest.since(canary.before.get(pod.uid, Figures())) if latest is not None else None
    if latest is None or new is None:
        return canary
    end = canary.since + spec.rollout.canary_s
    others = [p for p in observed.pods if p.uid in canary.before and p.uid != pod.uid and not p.is_terminating]
    readings = {other.uid: observed.figures.get(other.uid) for other in others}
    is_over = latest.at >= end and pod.is_available(now, spec.rollout.min_ready_s)
    is_whole = all(reading is not None and reading.at >= end for reading in readings.values())
    if is_over and not is_whole and now < end + ANSWERS_WITHIN_S:
        return canary
    found = [
        reading.since(canary.before[uid])
        for uid, reading in readings.items()
        if reading is not None and (reading.at >= end or not is_over)
    ]
    old = add_up(each for each in found if each is not None)
    told = f"pod {pod.name}: {compare(new, old)}"
    if fails_more(new, old):
        return _end(canary, FAILED, f"too many errors. {told}", wish)
    if is_over and is_slower(new, old):
        return _end(canary, FAILED, f"first tokens come too late. {told}", wish)
    if not is_over:
        return canary
    few = f"only {new.requests} requests in {latest.at - canary.since:.0f} s, of {MIN_REQUESTS} at least: not judged. "
    return _end(canary, PASSED, f"{few if new.requests < MIN_REQUESTS else ''}{told}", wish)


def _end(canary: Canary, phase: str, message: str, wish: str) -> Canary:
    return replace(canary, phase=phase, message=message[:1024], wish=wish if phase == FAILED else "", before={})


def describe_canary(canary: Canary) -> Json:
    """The entry of the status."""
    told: Json = {"revision": canary.revision, "phase": canary.phase, "message": canary.message}
    if canary.wish:
        told["wish"] = canary.wish
    if canary.pod:
        told |= {"pod": canary.pod, "podUID": canary.uid, "restarts": canary.restarts}
    if canary.since:
        told["since"] = format_time(canary.since)
    if canary.before:
        told["before"] = [_describe_figures(uid, each) for uid, each in sorted(canary.before.items())]
    return told


def read_canary(status: Mapping[str, Any]) -> Canary | None:
    """The entry of a status; None if there is none, or somebody wrote something else there."""
    told: Any = status.get("canary")
    try:
        return Canary(
            revision=str(told["revision"]),
            phase=str(told["phase"]),
            wish=str(told.get("wish", "")),
            pod=str(told.get("pod", "")),
            uid=str(told.get("podUID", "")),
            restarts=int(told.get("restarts", 0)),
            since=parse_time(told.get("since")),
            message=str(told.get("message", "")),
            before=dict(_read_figures(each) for each in told.get("before", [])),
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _describe_figures(uid: str, figures: Figures) -> Json:
    return {
        "podUID": uid,
        "requests": figures.requests,
        "failed": figures.failed,
        "firstTokens": figures.first_tokens,
        "firstTokenSeconds": f"{figures.first_token_s:.6f}",
        "firstTokensWithin": dict(figures.within),
    }


def _read_figures(told: Json) -> tuple[str, Figures]:
    counts = (int(told["requests"]), int(told["failed"]), int(told["firstTokens"]))
    within = {str(bound): int(count) for bound, count in told["firstTokensWithin"].items()}
    return str(told["podUID"]), Figures(0.0, *counts, float(told["firstTokenSeconds"]), within)
