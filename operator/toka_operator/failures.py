"""Failures: why a pod does not run, or does not exist, as the API server shows it.

Owns: reading a pod's status, and events about pods and StatefulSets, for what is wrong, and the reason given to each
cause. Pure. Each failure carries the words of whoever knows: the engine, the kubelet, the scheduler or the API server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toka_operator.errors import EXIT_REASONS
from toka_operator.fields import Json
from toka_operator.podspec import ENGINE_CONTAINER, IMAGE_VOLUMES_DROPPED
from toka_operator.times import parse_time

CAPACITY_REASONS = ("Unschedulable", "SchedulingGated", "ClaimPending")
"""Reasons for which a pod has no node yet, though nothing that the spec names is missing."""
DISRUPTION_REASONS = ("NodeLost", "Evicted", "Preempted", "NodeRejected")
"""Reasons for which a pod that goes was not told to go by the operator."""
CLAIM_ON_ONE_NODE = "ClaimOnOneNode"
"""The pod waits for a claim that another node has mounted."""
IMAGE_VOLUMES_UNSUPPORTED = "ImageVolumesUnsupported"
"""The API server, the kubelet or the container runtime mounts no images."""
NOT_READY = "NotReady"
NOT_READY_S = 10.0
"""Seconds that a pod that served may be unready before that is a failure: a readiness probe may fail once or twice."""
READINESS_GATE_CLOSED = "ReadinessGateClosed"
"""The engine is ready, and somebody else's condition of the pod (a load balancer's, say) is not true."""
READINESS_GATE_CLOSED_S = 60.0
"""Seconds for which that is no failure: a load balancer takes tens of them to try a new pod."""
_GATED = "ReadinessGatesNotReady"
"""The kubelet's word for that, as the reason of the pod's condition Ready."""
SHORT_RUN_S = 10.0
"""The kubelet's probes let every run of the engine last longer (the least startup.timeoutSeconds)."""
_BECAME_UNREADY_S = 10.0
"""Between the end of a container and the pod's condition that follows from it lies less than this."""
_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_START_REASONS = {"CreateContainerError", "RunContainerError", "PreStartHookError", "PostStartHookError"}
_DISRUPTIONS = {
    "PreemptionByScheduler": "Preempted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
}
_IGNORED_EVENTS = {"FailedScheduling", "Unhealthy", "BackOff", "Failed", "Killing"}
"""Warnings about pods whose cause the pod's own status tells better."""
_KILLED_BY_PROBE = (0, 137, 143)
"""Exit codes of an engine that the kubelet ended: after draining, by SIGKILL, or by SIGTERM before it had a handler."""
_NO_IMAGE_VOLUMES = re.compile(
    rf"{IMAGE_VOLUMES_DROPPED}|unknown field \"spec\.template\.spec\.volumes\[\d+\]\.image\""
    r'|no volume plugin matched|failed to mkdir ""'
)
"""The words of API servers with the feature gate ImageVolume off, and before 1.31; of a kubelet with the gate off; of
containerd before 2.1, which is given no path to mount."""
WEBHOOK_FAILS = "failed calling webhook"
"""The API server's words about an admission webhook that does not answer."""
_MAX_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a pod does not (or lately did not) run. `reason` is CamelCase and fit for a condition. Of a pod that does
    not exist, `pod` is the name of its StatefulSet."""

    pod: str
    container: str
    reason: str
    message: str
    exit_code: int | None = None
    restarts: int = 0
    since: float = 0.0
    """Since when (Unix time) it lasts, if that decides whether it counts; else 0.0."""
    is_current: bool = True
    """Whether it is why the pod is not ready now, rather than what ended an earlier run."""

    @property
    def is_waiting_for_capacity(self) -> bool:
        """Whether only a node, a queue or a volume is missing, which may come without anybody's help."""
        return self.reason in CAPACITY_REASONS


def find_failure(pod: Json) -> Failure | None:
    """The most telling thing that is, or lately was, wrong with a pod."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    statuses = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    containers = sorted(statuses, key=lambda status: status.get("name") != ENGINE_CONTAINER)
    found = [_find_disruption(pod, conditions), _find_rejection(name, status)]
    found += [_container_failure(name, container, conditions) for container in containers]
    found += [_scheduling_failure(name, conditions), _find_unreadiness(name, statuses, conditions)]
    failures = [failure for failure in found if failure is not None]
    return min(failures, key=lambda failure: not failure.is_current, default=None)


def is_on_lost_node(conditions: Mapping[str, Json]) -> bool:
    """Whether the pod's kubelet no longer answers. A kubelet derives Ready from ContainersReady and readiness gates,
    and says so of these; only the node controller, when it has lost the node, turns Ready alone to False without a
    word."""
    ready, containers = conditions.get("Ready", {}), conditions.get("ContainersReady", {})
    is_alone = ready.get("status") == "False" and containers.get("status") == "True"
    return is_alone and ready.get("reason") != _GATED


def explain_missing_pods(set_name: str, events: Sequence[Json]) -> Failure | None:
    """Why a StatefulSet has fewer pods than it asks for, in the words that the API server refused them with."""
    latest = _latest([event for event in events if event.get("reason") == "FailedCreate"])
    if latest is None:
        return None
    message = latest.get("message", "")
    return Failure(set_name, "", name_refusal(message, "PodsRejected"), _shorten(message))


def name_refusal(message: str, otherwise: str) -> str:
    """The reason for which the API server refused an object, by its words; `otherwise` where they tell of nothing that
    has a reason of its own."""
    if "exceeded quota" in message:
        return "QuotaExceeded"
    if "violates PodSecurity" in message:
        return "PodSecurityViolated"
    if WEBHOOK_FAILS in message:
        return "WebhookFailed"
    if _NO_IMAGE_VOLUMES.search(message):
        return IMAGE_VOLUMES_UNSUPPORTED
    return "WebhookRefused" if "admission webhook" in message else otherwise


def explain_waiting_pod(pod_name: str, events: Sequence[Json]) -> Failure | None:
    """Why a pod with a node has no container yet: volumes, the sandbox, whatever the kubelet warned of last."""
    latest = _latest([event for event in events if event.get("reason") not in _IGNORED_EVENTS])
    if latest is None:
        return None
    message, word = latest.get("message", ""), latest.get("reason", "")
    reason = "PodNotStarted"
    if _NO_IMAGE_VOLUMES.search(message):
        reason = IMAGE_VOLUMES_UNSUPPORTED
    elif re.search(r'secret "?[^" ]+"? not found|references non-existent secret key', message):
        reason = "SecretMissing"
    elif re.search(r'configmap "?[^" ]+"? not found', message):
        reason = "ConfigMapMissing"
    elif "Multi-Attach error" in message:
        reason = CLAIM_ON_ONE_NODE
    elif word in ("FailedMount", "FailedAttachVolume", "FailedMapVolume"):
        reason = "VolumeFailed"
    elif word == "FailedCreatePodSandBox":
        reason = "SandboxFailed"
    return Failure(pod_name, "", reason, _shorten(f"{word}: {message}"))


def explain_pending_claim(claim_name: str, events: Sequence[Json]) -> Failure | None:
    """Why a claim has no volume, in the words of whoever was to make one."""
    latest = _latest(events)
    if latest is None:
        return None
    words = f"claim {claim_name} has no volume: {latest.get('reason', '')}: {latest.get('message', '')}"
    first = latest.get("firstTimestamp") or latest.get("eventTime")
    return Failure(claim_name, "", "ClaimPending", _shorten(words), since=parse_time(first))


def is_unscheduled(pod: Json) -> bool:
    """Whether a pod has no node yet."""
    return not (pod.get("spec") or {}).get("nodeName") and not pod["metadata"].get("deletionTimestamp")


def is_creating(pod: Json) -> bool:
    """Whether a pod has a node, and none of its containers began, and not because of an image: nothing in its status
    tells why."""
    status = pod.get("status") or {}
    conditions = {c["type"]: c.get("status") for c in status.get("conditions") or []}
    statuses = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    words = {(s.get("state") or {}).get("waiting", {}).get("reason") for s in statuses}
    is_bound = conditions.get("PodScheduled") == "True" and status.get("phase") == "Pending"
    has_sandbox = conditions.get("PodReadyToStartContainers") == "True"
    return is_bound and not has_sandbox and words <= {"ContainerCreating", "PodInitializing"}


def _latest(events: Sequence[Json]) -> Json | None:
    def time_of(event: Json) -> float:
        series = event.get("series") or {}
        stamps = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
        return max(parse_time(stamp) for stamp in stamps)

    return max(events, key=time_of, default=None)


def _find_disruption(pod: Json, conditions: Mapping[str, Json]) -> Failure | None:
    """That the pod's node is lost, or that somebody else than the operator makes it go."""
    name = pod["metadata"]["name"]
    target = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True":
        reason = _DISRUPTIONS.get(target.get("reason", ""), "Evicted")
        return Failure(name, "", reason, _shorten(f"{target.get('reason', '')}: {target.get('message', '')}"))
    if is_on_lost_node(conditions):
        node = (pod.get("spec") or {}).get("nodeName") or "its node"
        return Failure(name, "", "NodeLost", f"node {node} does not answer: its kubelet reports nothing any more")
    return None


def _find_rejection(name: str, status: Json) -> Failure | None:
    """That the kubelet took the pod not on, or gave it up."""
    if status.get("phase") != "Failed":
        return None
    word, message = status.get("reason") or "", status.get("message") or ""
    if not word:
        return None  # its containers tell
    return Failure(name, "", "Evicted" if word == "Evicted" else "NodeRejected", _shorten(f"{word}: {message}"))


def _scheduling_failure(name: str, conditions: Mapping[str, Json]) -> Failure | None:
    condition = conditions.get("PodScheduled", {})
    message, reason = condition.get("message", ""), condition.get("reason", "")
    if condition.get("status") == "True" or reason not in ("Unschedulable", "SchedulingGated"):
        return None
    if re.search(r'persistentvolumeclaim "([^"]+)" not found', message):
        reason = "ClaimMissing"
    elif "unbound immediate PersistentVolumeClaims" in message:
        reason = "ClaimPending"
    return Failure(name, "", reason, _shorten(message), since=parse_time(condition.get("lastTransitionTime")))


def _find_unreadiness(name: str, statuses: Sequence[Json], conditions: Mapping[str, Json]) -> Failure | None:
    """That a readiness gate is closed, or that an engine which served, and still runs, does not answer its probe."""
    ready = conditions.get("Ready", {})
    if ready.get("status") == "False" and ready.get("reason") == _GATED:
        answers = conditions.get("ContainersReady", {})
        since = max(parse_time(each.get("lastTransitionTime")) for each in (ready, answers))
        return Failure(name, "", READINESS_GATE_CLOSED, _shorten(ready.get("message") or _GATED), since=since)
    engine: Json = next((s for s in statuses if s.get("name") == ENGINE_CONTAINER), {})
    running = (engine.get("state") or {}).get("running")
    since = parse_time(ready.get("lastTransitionTime"))
    if ready.get("status") != "False" or not running or since <= parse_time(running.get("startedAt")) + 1.0:
        return None
    message = f"the pod runs, but is not ready: {ready.get('message') or 'its readiness probe fails'}"
    return Failure(name, "", NOT_READY, _shorten(message), restarts=int(engine.get("restartCount", 0)), since=since)


def _container_failure(pod_name: str, status: Json, conditions: Mapping[str, Json]) -> Failure | None:
    name, restarts = status.get("name", ""), int(status.get("restartCount", 0))
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    word, message = waiting.get("reason", ""), waiting.get("message", "")
    if word in _IMAGE_REASONS:
        return Failure(pod_name, name, "ImagePullFailed", _shorten(message or word), None, restarts)
    if word == "CreateContainerError" and _NO_IMAGE_VOLUMES.search(message):
        return Failure(pod_name, name, IMAGE_VOLUMES_UNSUPPORTED, _shorten(message), None, restarts)
    if word == "CreateContainerConfigError":
        return Failure(pod_name, name, _config_reason(message), _shorten(message), None, restarts)
    if word in _START_REASONS:
        return Failure(pod_name, name, "ContainerNotStarted", _shorten(message or word), None, restarts)
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated")
    if ended and (ended.get("exitCode", 0) != 0 or word == "CrashLoopBackOff" or _is_engine_restart(name, restarts)):
        is_current = bool(word or state.get("terminated")) or _made_unready(ended, conditions)
        return _ended_failure(pod_name, name, ended, restarts, conditions, is_current)
    if word == "CrashLoopBackOff":
        return Failure(pod_name, name, "CrashLoop", _shorten(message), None, restarts)
    return None


def _is_engine_restart(container: str, restarts: int) -> bool:
    """An engine never ends well by itself: if it was started again, something ended it."""
    return container == ENGINE_CONTAINER and restarts > 0


def _made_unready(ended: Json, conditions: Mapping[str, Json]) -> bool:
    """Whether the end of a run is why the pod is not ready: it has not been ready since. The pod that an engine's
    death of last month made unready has been ready in between."""
    finished, ready = parse_time(ended.get("finishedAt")), conditions.get("Ready", {})
    return finished == 0.0 or finished + _BECAME_UNREADY_S >= parse_time(ready.get("lastTransitionTime"))


def _config_reason(message: str) -> str:
    lowered = message.lower()
    if "secret" in lowered:
        return "SecretMissing"
    return "ConfigMapMissing" if "configmap" in lowered else "ContainerNotStarted"


def _ended_failure(
    pod_name: str, container: str, ended: Json, restarts: int, conditions: Mapping[str, Json], is_current: bool
) -> Failure:
    code = int(ended.get("exitCode", 0))
    reason, words = "CrashLoop", f"container {container} ended with exit code {code}"
    if ended.get("reason") == "OOMKilled":
        reason = "OutOfMemory"
        words = f"container {container} was killed for want of memory"
    elif container == ENGINE_CONTAINER and code in _KILLED_BY_PROBE:
        reason, words = _explain_killed(ended, conditions, code)
    elif container == ENGINE_CONTAINER:
        reason = EXIT_REASONS.get(code, "CrashLoop")
    words = (ended.get("message") or "").strip() or words
    return Failure(pod_name, container, reason, _shorten(words), code, restarts, is_current=is_current)


def _explain_killed(ended: Json, conditions: Mapping[str, Json], code: int) -> tuple[str, str]:
    """Reason and words for an engine that ended as one does that is told to, though its pod was to stay."""
    started, finished = parse_time(ended.get("startedAt")), parse_time(ended.get("finishedAt"))
    run_s = finished - started
    if run_s < SHORT_RUN_S:
        by_itself = ("EngineExited", "the engine's container ended by itself, as if it had been told to")
        return by_itself if code == 0 else ("CrashLoop", f"container {ENGINE_CONTAINER} ended with exit code {code}")
    if parse_time(conditions.get("Ready", {}).get("lastTransitionTime")) > started + 1.0:
        return (
            "NotResponding",
            f"the engine served, did not answer its probes any more, and was ended after {run_s:.0f} s",
        )
    return "StartupTimeout", f"the engine was not ready {run_s:.0f} s after its start, so the kubelet ended it"


def _shorten(message: str) -> str:
    """The end of a long message: last words say why."""
    text = message.strip()
    return text if len(text) <= _MAX_MESSAGE else "..." + text[-(_MAX_MESSAGE - 3) :]
