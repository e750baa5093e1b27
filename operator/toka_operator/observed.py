"""What the watches have seen of one TokaDeployment's children, as small immutable values.

Owns: reading pods, StatefulSets and EndpointSlices as the API server shows them. Pure. Everything later
decides on these values, so no other module knows the shape of a pod's status.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from toka_operator.errors import EXIT_REASONS
from toka_operator.fields import Json
from toka_operator.podspec import ENGINE_CONTAINER
from toka_operator.settings import REVISION_LABEL

_IMAGE_REASONS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
}
_MAX_MESSAGE = 1024
CAPACITY_REASONS = ("Unschedulable", "SchedulingGated", "ClaimPending")
"""Reasons for which a pod has no node yet, though nothing that the spec names is missing."""
STARTS_TOGETHER_S = 1.0
"""A kubelet writes a pod's start time and its first, unready, condition together; their seconds may differ by one."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a pod does not (or lately did not) run. `reason` is CamelCase and fit for a condition."""

    pod: str
    container: str
    reason: str
    message: str
    exit_code: int | None = None
    restarts: int = 0
    since: float = 0.0
    """Since when (Unix time) the pod waits for a node; 0.0 for other failures."""

    @property
    def is_waiting_for_capacity(self) -> bool:
        """Whether only a node, a queue or a volume is missing, which may come without anybody's help."""
        return self.reason in CAPACITY_REASONS


@dataclass(frozen=True, slots=True)
class Startup:
    """What a pod waited for until it was ready, in whole seconds: the pod's own times have no finer ones."""

    schedule_s: int
    """From its creation until a node was found."""
    start_s: int
    """From there until the engine's container ran: volumes, the pull of images, init containers."""
    load_s: int
    """From there until the pod was ready: what the engine loads and warms up."""


@dataclass(frozen=True, slots=True)
class PodView:
    """One engine pod. `ready_since`: since when (Unix time) it is, or is not, ready. `has_served`: it has been ready
    since it was made. `failure`: its latest, also when it runs again. `startup`: None unless it is ready and its times
    tell of its first start."""

    name: str
    uid: str
    revision: str
    ordinal: int
    is_ready: bool
    has_served: bool
    ready_since: float
    is_on_lost_node: bool
    is_in_endpoints: bool
    terminating_until: float | None
    failure: Failure | None
    startup: Startup | None

    @property
    def is_terminating(self) -> bool:
        return self.terminating_until is not None

    def is_available(self, now: float, min_ready_s: float) -> bool:
        """Ready for min_ready_s, and seen in the Service's endpoints, so that clients really reach it."""
        return (
            self.is_ready and not self.is_terminating and self.is_in_endpoints and now >= self.ready_since + min_ready_s
        )

    def is_stuck(self, now: float, stuck_s: float) -> bool:
        """Whether it outlived its grace period by so much that it sits on a dead node, and is not waited for."""
        return self.terminating_until is not None and now > self.terminating_until + stuck_s

    @property
    def is_failing(self) -> bool:
        """Not ready, for a reason that waiting alone does not mend."""
        return self.failure is not None and not self.is_ready and not self.is_terminating


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything seen of one TokaDeployment's children. `children` and `sets` hold only objects that it
    owns."""

    children: Mapping[tuple[str, str], Json]
    """(kind, name) -> live object, of every kind but pods and endpoints."""
    pods: tuple[PodView, ...]
    strangers: frozenset[tuple[str, str]]
    """Names of children that another owner's object holds."""
    other_pods: frozenset[str] = frozenset()
    """Names of pods labelled as ours that no StatefulSet of ours controls: a new pod cannot have such a name."""

    def of_kind(self, kind: str) -> list[Json]:
        return [child for (k, _), child in sorted(self.children.items()) if k == kind]


def parse_time(text: str | None) -> float:
    """Unix time of an RFC 3339 time; 0.0 for none."""
    if not text:
        return 0.0
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def format_time(now: float) -> str:
    return datetime.fromtimestamp(now, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_owned_by(child: Json, uid: str) -> bool:
    """Whether the object with this uid is the controller of `child`."""
    owners = child["metadata"].get("ownerReferences") or []
    return any(owner.get("controller") and owner.get("uid") == uid for owner in owners)


def ready_addresses(slices: Iterable[Json]) -> frozenset[str]:
    """Names of the pods that the Service sends requests to."""
    return frozenset(
        endpoint["targetRef"]["name"]
        for endpoint_slice in slices
        for endpoint in endpoint_slice.get("endpoints") or []
        if (endpoint.get("conditions") or {}).get("ready") is not False and endpoint.get("targetRef")
    )


def view_pod(pod: Json, endpoints: frozenset[str]) -> PodView:
    """The view of one engine pod; `endpoints` are the pod names that the Service sends requests to."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    ready = conditions.get("Ready", {})
    ordinal = metadata["name"].rsplit("-", 1)[-1]
    deletion = metadata.get("deletionTimestamp")
    return PodView(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        revision=(metadata.get("labels") or {}).get(REVISION_LABEL, ""),
        ordinal=int(ordinal) if ordinal.isdigit() else 0,
        is_ready=ready.get("status") == "True",
        has_served=has_been_ready(status, ready),
        ready_since=parse_time(ready.get("lastTransitionTime")),
        is_on_lost_node=is_on_lost_node(conditions),
        is_in_endpoints=metadata["name"] in endpoints,
        terminating_until=parse_time(deletion) if deletion else None,
        failure=find_failure(metadata["name"], status),
        startup=find_startup(metadata, status, conditions),
    )


def has_been_ready(status: Json, ready: Json) -> bool:
    """Whether a pod is ready or was once: only then its condition changed after the kubelet had taken the pod on."""
    if ready.get("status") == "True":
        return True
    changed, started = parse_time(ready.get("lastTransitionTime")), parse_time(status.get("startTime"))
    return started > 0.0 and changed > started + STARTS_TOGETHER_S


def is_on_lost_node(conditions: Mapping[str, Json]) -> bool:
    """Whether the pod's kubelet no longer answers. A kubelet derives Ready from ContainersReady (engine pods have no
    readiness gates); only the node controller, when it has lost the node, turns Ready alone to False."""
    ready, containers = conditions.get("Ready", {}), conditions.get("ContainersReady", {})
    return ready.get("status") == "False" and containers.get("status") == "True"


def find_startup(metadata: Json, status: Json, conditions: Mapping[str, Json]) -> Startup | None:
    """How a ready pod came up. None if its engine was restarted, or if its times are missing or go backwards (a
    node's clock may differ from the API server's): then they do not tell."""
    ready, scheduled = conditions.get("Ready", {}), conditions.get("PodScheduled", {})
    engines = (s for s in status.get("containerStatuses") or [] if s.get("name") == ENGINE_CONTAINER)
    engine: Json = next(engines, {})
    running = (engine.get("state") or {}).get("running") or {}
    is_told = ready.get("status") == scheduled.get("status") == "True" and not engine.get("restartCount")
    stamps = (metadata.get("creationTimestamp"), scheduled.get("lastTransitionTime"), running.get("startedAt"))
    times = [parse_time(stamp) for stamp in (*stamps, ready.get("lastTransitionTime"))]
    if not is_told or 0.0 in times or times != sorted(times):
        return None
    created, bound, started, up = times
    return Startup(int(bound - created), int(started - bound), int(up - started))


def find_failure(pod_name: str, status: Json) -> Failure | None:
    """The most telling thing that is, or lately was, wrong with a pod."""
    statuses = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    failures = [f for f in (_container_failure(pod_name, s) for s in statuses) if f is not None]
    if failures:
        return next((f for f in failures if f.container == ENGINE_CONTAINER), failures[0])
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") in ("Unschedulable", "SchedulingGated"):
            return _scheduling_failure(pod_name, condition)
    if status.get("phase") == "Failed":
        reason = status.get("reason") or "PodFailed"
        return Failure(pod_name, "", reason, _shorten(status.get("message", "")))
    return None


def _scheduling_failure(pod_name: str, condition: Json) -> Failure:
    message, reason = condition.get("message", ""), condition["reason"]
    if re.search(r'persistentvolumeclaim "([^"]+)" not found', message):
        reason = "ClaimMissing"
    elif "unbound immediate PersistentVolumeClaims" in message:
        reason = "ClaimPending"
    return Failure(pod_name, "", reason, _shorten(message), since=parse_time(condition.get("lastTransitionTime")))


def _container_failure(pod_name: str, status: Json) -> Failure | None:
    name, restarts = status.get("name", ""), int(status.get("restartCount", 0))
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    word, message = waiting.get("reason", ""), waiting.get("message", "")
    if word in _IMAGE_REASONS:
        return Failure(pod_name, name, "ImagePullFailed", _shorten(message or word), None, restarts)
    if word == "CreateContainerConfigError":
        return Failure(pod_name, name, _config_reason(message), _shorten(message), None, restarts)
    if word in ("CreateContainerError", "RunContainerError", "PreStartHookError", "PostStartHookError"):
        return Failure(pod_name, name, "ContainerNotStarted", _shorten(message or word), None, restarts)
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated")
    if ended and (ended.get("exitCode", 0) != 0 or word == "CrashLoopBackOff"):
        return _ended_failure(pod_name, name, ended, restarts)
    if word == "CrashLoopBackOff":
        return Failure(pod_name, name, "CrashLoop", _shorten(message), None, restarts)
    return None


def _config_reason(message: str) -> str:
    lowered = message.lower()
    if "secret" in lowered:
        return "SecretMissing"
    return "ConfigMapMissing" if "configmap" in lowered else "ContainerNotStarted"


def _ended_failure(pod_name: str, container: str, ended: Json, restarts: int) -> Failure:
    code = int(ended.get("exitCode", 0))
    reason = "CrashLoop"
    if ended.get("reason") == "OOMKilled":
        reason = "OutOfMemory"
    elif container == ENGINE_CONTAINER:
        reason = EXIT_REASONS.get(code, "CrashLoop")
    words = (ended.get("message") or "").strip() or f"container {container} ended with exit code {code}"
    return Failure(pod_name, container, reason, _shorten(words), code, restarts)


def _shorten(message: str) -> str:
    """The end of a long message: last words say why."""
    text = message.strip()
    return text if len(text) <= _MAX_MESSAGE else "..." + text[-(_MAX_MESSAGE - 3) :]
