"""Every fault of a pod stands in the status within seconds: its own reason, the words of who knows, what to do.

There is no kubelet here: the test writes what kubelets, schedulers and node controllers report, of all pods at about
the same time, and watches the objects. With `-s` it prints how long each took.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from toka_operator.advice import ADVICE
from toka_operator.errors import EXIT_REASONS
from toka_operator.times import format_time

from tests.cluster.operating import HOLD, Json, Operator

TOLD_WITHIN_S = 10.0
SLACK = 4
"""Limits of promised times are so many times as wide, because tests share their processors."""
BACKOFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}


def ago(seconds: float) -> str:
    return format_time(time.time() - seconds)


def run(code: int, seconds: float, message: str = "", word: str = "Error") -> Json:
    """A run of a container that ended just now."""
    times = {"startedAt": ago(seconds + 4), "finishedAt": ago(4)}
    return {"terminated": {"exitCode": code, "reason": word, "message": message, "containerID": "x://y", **times}}


def engine(state: Json, last: Json | None = None, restarts: int = 0) -> Json:
    """The status of a pod, by that of its engine's container."""
    entry = {"name": "engine", "image": "engine:1", "imageID": "", "ready": False, "restartCount": restarts}
    return {"containerStatuses": [{**entry, "state": state, "lastState": last or {}}]}


def waiting(word: str, message: str) -> Json:
    return engine({"waiting": {"reason": word, "message": message}})


def conditions(**found: tuple[str, str, str, float]) -> Json:
    """Conditions of a pod: status, reason, message, and how many seconds old."""
    names = ("status", "reason", "message")
    listed = [{"type": kind, **dict(zip(names, values, strict=False))} for kind, values in found.items()]
    times = [{"lastTransitionTime": ago(values[3])} for values in found.values()]
    return {"conditions": [{**condition, **at} for condition, at in zip(listed, times, strict=True)]}


def gone(reason: str, message: str) -> Json:
    return conditions(DisruptionTarget=("True", reason, message, 1))


def make_faults() -> dict[str, tuple[str, Json]]:
    """Reason -> the words that the status must hold, and what is reported of the pod."""
    running = {"running": {"startedAt": ago(3)}}
    words = "its last words"
    exits = {reason: (words, engine(BACKOFF, run(code, 9, words), 3)) for code, reason in EXIT_REASONS.items() if code}
    return {
        **exits,
        "CrashLoop": ("Segmentation fault", engine(BACKOFF, run(139, 9, "Segmentation fault"), 3)),
        "ImagePullFailed": ("manifest unknown", waiting("ImagePullBackOff", "manifest unknown")),
        "SecretMissing": ('secret "hf" not found', waiting("CreateContainerConfigError", 'secret "hf" not found')),
        "ConfigMapMissing": ('configmap "c" not', waiting("CreateContainerConfigError", 'configmap "c" not found')),
        "ContainerNotStarted": ("no such file", waiting("RunContainerError", "exec: no such file")),
        "StartupTimeout": ("not ready 60 s after", engine(running, run(0, 60, "", "Completed"), 1)),
        "EngineExited": ("by itself", engine(BACKOFF, run(0, 2, "", "Completed"), 2)),
        "NotResponding": (
            "did not answer its probes",
            {**engine(running, run(0, 900, "", "Completed"), 1), **conditions(Ready=("False", "", "", 30))},
        ),
        "NotReady": (
            "containers with unready status",
            {
                **engine({"running": {"startedAt": ago(900)}}),
                **conditions(Ready=("False", "ContainersNotReady", "containers with unready status: [engine]", 20)),
            },
        ),
        "NodeLost": (
            "does not answer",
            conditions(Ready=("False", "", "", 5), ContainersReady=("True", "", "", 500)),
        ),
        "Evicted": ("Eviction API", gone("EvictionByEvictionAPI", "Eviction API: evicting")),
        "Preempted": ("preempting", gone("PreemptionByScheduler", "preempting to accommodate")),
        "NodeRejected": ("no device", {"phase": "Failed", "reason": "UnexpectedAdmissionError",
                                     "message": "no device"}),
        "Unschedulable": ("0/3 nodes", conditions(PodScheduled=("False", "Unschedulable", "0/3 nodes available", 1))),
        "SchedulingGated": ("gated", conditions(PodScheduled=("False", "SchedulingGated", "gated by kueue", 1))),
        "ClaimMissing": (
            "weights",
            conditions(PodScheduled=("False", "Unschedulable", 'persistentvolumeclaim "weights" not found', 1)),
        ),
        "ClaimPending": (
            "unbound",
            conditions(
                PodScheduled=("False", "Unschedulable", "pod has unbound immediate PersistentVolumeClaims", 1)
            ),
        ),
    }  # fmt: skip


WARNINGS = {
    "VolumeFailed": ("FailedMount", "MountVolume.SetUp failed for volume nfs: exit status 32"),
    "SandboxFailed": ("FailedCreatePodSandBox", "failed to setup network for sandbox: no addresses left"),
    "PodNotStarted": ("FailedPostStartHook", "nothing that has a reason of its own"),
}
"""Reason -> the Event of a pod that has a node and no container yet, of which its status tells nothing."""


def warn(operator: Operator, reason: str, pod: Json) -> None:
    """Post what a kubelet warns of."""
    word, message = WARNINGS[reason]
    involved = {"kind": "Pod", "namespace": operator.namespace}
    involved |= {key: pod["metadata"][key] for key in ("name", "uid")}
    event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": reason.lower()}, "involvedObject": involved}
    event |= {"type": "Warning", "reason": word, "message": message, "source": {"component": "kubelet"}}
    operator.server.apply(event, namespace=operator.namespace)


def report(operator: Operator, reason: str, pod: Json, status: Any) -> None:
    """Write what is reported of the pod; one that is evicted is told to go."""
    name = pod["metadata"]["name"]
    if reason in WARNINGS:
        warn(operator, reason, pod)
        return
    operator.hold_pod(name)
    operator.set_pod_status(name, **status)
    if reason in ("Evicted", "Preempted"):
        operator.delete("pod", name)


@pytest.mark.timeout(240)
def test_every_fault_is_told_within_10_s_and_none_is_called_completed(operator: Operator) -> None:
    told = [*make_faults(), *WARNINGS]
    assert len(set(told)) >= 31
    # Of each: the object, its children, its pod, two edits of that, questions, and the end of all of them.
    operator.num_edits = 10 * len(told)
    names = {reason: reason.lower() for reason in told}
    for name in names.values():
        operator.apply(name, **HOLD, scheduling={"patienceSeconds": 0})
    pods = {
        reason: operator.wait_for(lambda name=name: next(iter(operator.pods(name)), None), f"a pod of {name}")
        for reason, name in names.items()
    }
    faults = make_faults() | {reason: (message, {}) for reason, (_, message) in WARNINGS.items()}
    reported = {}
    for reason, pod in pods.items():
        report(operator, reason, pod, faults[reason][1])
        reported[reason] = time.monotonic()
    seconds: dict[str, float] = {}

    def see() -> bool:
        for obj in operator.list("td"):
            degraded = {c["type"]: c for c in obj.get("status", {}).get("conditions", [])}.get("Degraded", {})
            reason = next(reason for reason, name in names.items() if name == obj["metadata"]["name"])
            assert degraded.get("reason") != "Completed"
            if (degraded.get("status"), degraded.get("reason")) == ("True", reason) and reason not in seconds:
                seconds[reason] = time.monotonic() - reported[reason]
                assert faults[reason][0] in degraded["message"]
                assert degraded["message"].endswith(f"{ADVICE[reason]}.")
        return len(seconds) == len(names)

    try:
        operator.wait_for(see, "every fault to be told", timeout_s=120.0)
    finally:
        print({reason: round(took, 1) for reason, took in sorted(seconds.items())}, set(names) - set(seconds))
        for pod in pods.values():
            if operator.get("pod", pod["metadata"]["name"]):
                operator.release_pod(pod["metadata"]["name"])
        for name in names.values():  # the next file's operator would begin with all of them
            operator.delete("td", name)
        operator.wait_for(lambda: not operator.list("td") and not operator.list("pod"), "all to be gone", 300.0)
    assert max(seconds.values()) < TOLD_WITHIN_S * SLACK
