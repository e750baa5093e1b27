"""The status names the cause, in the words of whoever knows it, and says nothing is wrong when nothing is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from toka_operator.advice import ADVICE
from toka_operator.conditions import Outcome
from toka_operator.errors import EXIT_REASONS
from toka_operator.failures import explain_missing_pods, explain_waiting_pod, is_creating
from toka_operator.observed import Observed, PodView, view_pod
from toka_operator.resources import Owner
from toka_operator.spec import TokaDeploymentSpec
from toka_operator.status import build_status, find_events, find_next_moment_s
from toka_operator.times import format_time

from tests.unit.operator.examples import NOW, OWNER, plan_for, seen, valid

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]


def at(offset_s: float) -> str:
    return format_time(NOW + offset_s)


def condition(status: Json, kind: str) -> Json:
    (found,) = [c for c in status["conditions"] if c["type"] == kind]
    return dict(found)


def pod(
    revision: str,
    engine: Json | None = None,
    phase: str = "Running",
    conditions: dict[str, Json] | None = None,
    **metadata: Any,
) -> PodView:
    """A pod that was made 1,000 s ago and is not ready since 999 s ago, unless `conditions` say otherwise."""
    name = f"chat-{revision}-0"
    all_conditions = {
        "PodScheduled": {"status": "True", "lastTransitionTime": at(-1000)},
        "Ready": {"status": "False", "lastTransitionTime": at(-999)},
        "ContainersReady": {"status": "False", "lastTransitionTime": at(-999)},
        **(conditions or {}),
    }
    entry = {"name": "engine", "restartCount": 0, "state": {"running": {"startedAt": at(-990)}}, **(engine or {})}
    raw = {
        "metadata": {"name": name, "uid": name, "labels": {"toka.dev/revision": revision}, **metadata},
        "spec": {"nodeName": "node7"},
        "status": {
            "phase": phase,
            "startTime": at(-1000),
            "conditions": [{"type": kind, **c} for kind, c in all_conditions.items()],
            "containerStatuses": [entry],
        },
    }
    is_ready = all_conditions["Ready"]["status"] == "True"
    return view_pod(raw, frozenset([name] if is_ready else []))


def status_of(spec: TokaDeploymentSpec, *pods: PodView, **more: Any) -> Json:
    observed = seen(plan_for(spec), pods)
    previous, now, owner = more.pop("previous", {}), more.pop("now", NOW), more.pop("owner", OWNER)
    observed = Observed(observed.children, pods, frozenset(), **more)
    return build_status(owner, spec, observed, plan_for(spec, observed), Outcome(), previous, now)


def ended(code: int, run: tuple[float, float], message: str = "", word: str = "Error") -> Json:
    """A run of a container between two moments."""
    times = {"startedAt": at(run[0]), "finishedAt": at(run[1])}
    return {"terminated": {"exitCode": code, "reason": word, "message": message, **times}}


def waiting(word: str, message: str = "") -> Json:
    return {"state": {"waiting": {"reason": word, "message": message}}}


BACKOFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
RUNNING = {"running": {"startedAt": at(-3)}}
READY = {"Ready": {"status": "True", "lastTransitionTime": at(-500)}}
FAULTS: dict[str, tuple[str, str, Json]] = {
    "an image that is not there": ("ImagePullFailed", "manifest unknown", {
        "engine": waiting("ErrImagePull", "manifest unknown")}),
    "a model's image that a container runtime does not mount": ("ImageVolumesUnsupported", "failed to mkdir", {
        "engine": waiting("CreateContainerError", 'failed to generate spec: failed to mkdir "": mkdir : no such')}),
    "a Secret for the environment": ("SecretMissing", 'secret "hf" not found', {
        "engine": waiting("CreateContainerConfigError", 'secret "hf" not found')}),
    "a ConfigMap for the environment": ("ConfigMapMissing", 'configmap "c" not found', {
        "engine": waiting("CreateContainerConfigError", 'configmap "c" not found')}),
    "a command that is not there": ("ContainerNotStarted", "no such file", {
        "engine": waiting("RunContainerError", "exec: no such file")}),
    "a node that is missing": ("Unschedulable", "0/3 nodes", {"phase": "Pending", "engine": waiting(""), "conditions": {
        "PodScheduled": {"status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}}}),
    "a queue that holds the pod": ("SchedulingGated", "gated", {"phase": "Pending", "conditions": {
        "PodScheduled": {"status": "False", "reason": "SchedulingGated", "message": "gated by kueue"}}}),
    "a claim that is missing": ("ClaimMissing", "weights", {"phase": "Pending", "conditions": {
        "PodScheduled": {"status": "False", "reason": "Unschedulable",
                         "message": 'persistentvolumeclaim "weights" not found'}}}),
    "a claim without a volume": ("ClaimPending", "unbound", {"phase": "Pending", "conditions": {
        "PodScheduled": {"status": "False", "reason": "Unschedulable",
                         "message": "pod has unbound immediate PersistentVolumeClaims"}}}),
    **{f"exit code {code}": (reason, "its last words", {"engine": {
        "state": BACKOFF, "restartCount": 3, "lastState": ended(code, (-30, -20), "its last words")}})
       for code, reason in EXIT_REASONS.items() if code != 0},
    "another exit code": ("CrashLoop", "Segmentation fault", {"engine": {
        "state": BACKOFF, "restartCount": 3, "lastState": ended(139, (-30, -20), "Segmentation fault")}}),
    "killed by the kernel": ("OutOfMemory", "want of memory", {"engine": {
        "state": BACKOFF, "restartCount": 1, "lastState": ended(137, (-30, -20), "", "OOMKilled")}}),
    "a start that takes too long, told while it is tried again": ("StartupTimeout", "not ready 60 s after", {
        "engine": {"state": RUNNING, "restartCount": 1, "lastState": ended(0, (-64, -4), "", "Completed")}}),
    "a start that takes too long, in the backoff": ("StartupTimeout", "not ready 60 s after", {"engine": {
        "state": BACKOFF, "restartCount": 2, "lastState": ended(0, (-64, -4), "", "Completed")}}),
    "a start that has to be killed": ("StartupTimeout", "not ready 60 s after", {"engine": {
        "state": RUNNING, "restartCount": 1, "lastState": ended(137, (-64, -4))}}),
    "an engine that hung after it had served": ("NotResponding", "served", {
        "engine": {"state": RUNNING, "restartCount": 1, "lastState": ended(0, (-900, -4), "", "Completed")},
        "conditions": {"Ready": {"status": "False", "lastTransitionTime": at(-34)}}}),
    "another program in the image": ("EngineExited", "by itself", {"engine": {
        "state": BACKOFF, "restartCount": 2, "lastState": ended(0, (-6, -4), "", "Completed")}}),
    "an engine that served and is unready": ("NotReady", "containers with unready status", {
        "conditions": {"Ready": {"status": "False", "lastTransitionTime": at(-20), "reason": "ContainersNotReady",
                                 "message": "containers with unready status: [engine]"}}}),
    "a load balancer that does not take the pod": ("ReadinessGateClosed", "example.com/balanced", {"conditions": {
        "Ready": {"status": "False", "lastTransitionTime": at(-900), "reason": "ReadinessGatesNotReady",
                  "message": 'corresponding condition of pod readiness gate "example.com/balanced" does not exist.'},
        "ContainersReady": {"status": "True", "lastTransitionTime": at(-61)}}}),
    "a node that is lost": ("NodeLost", "node7", {"conditions": {
        "Ready": {"status": "False", "lastTransitionTime": at(-20)},
        "ContainersReady": {"status": "True", "lastTransitionTime": at(-500)}}}),
    "a node that is given up": ("NodeLost", "NoExecute taint", {
        "deletionTimestamp": at(30), "conditions": {"DisruptionTarget": {
            "status": "True", "reason": "DeletionByTaintManager", "message": "deleting due to NoExecute taint"}}}),
    "a drain": ("Evicted", "Eviction API", {
        "deletionTimestamp": at(30), "conditions": {"DisruptionTarget": {
            "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}}}),
    "a more important pod": ("Preempted", "preempting", {
        "deletionTimestamp": at(30), "conditions": {"DisruptionTarget": {
            "status": "True", "reason": "PreemptionByScheduler", "message": "preempting to accommodate"}}}),
    "a node that a device lacks": ("NodeRejected", "UnexpectedAdmissionError", {
        "phase": "Failed", "podReason": "UnexpectedAdmissionError"}),
    "a pod that does not end": ("PodStuckTerminating", "grace period", {"deletionTimestamp": at(-31)}),
}  # fmt: skip


def faulty_pod(revision: str, fault: Json) -> PodView:
    fault = dict(fault)
    word = fault.pop("podReason", None)
    if word is None:
        return pod(revision, **fault)
    name = f"chat-{revision}-0"
    raw = {"metadata": {"name": name}, "status": {"phase": "Failed", "reason": word, "message": "device plugin"}}
    raw["metadata"]["labels"] = {"toka.dev/revision": revision}  # type: ignore[assignment]
    return view_pod(raw, frozenset())


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_reason_the_words_of_who_knows_and_what_to_do(fault: str) -> None:
    reason, words, given_pod = FAULTS[fault]
    spec = valid(scheduling={"patienceSeconds": 0})
    status = status_of(spec, faulty_pod(spec.revision, given_pod))
    degraded = condition(status, "Degraded")
    assert (degraded["status"], degraded["reason"], status["reason"]) == ("True", reason, reason)
    assert words in degraded["message"]
    assert degraded["message"].endswith(f"{ADVICE[reason]}.")
    assert [f["reason"] for f in status["failures"]] == [reason]
    assert condition(status, "Ready")["status"] == "False"


def test_a_closed_readiness_gate_is_no_fault_for_a_minute_and_no_lost_node_while_the_pod_drains() -> None:
    _, _, given = FAULTS["a load balancer that does not take the pod"]
    closed = {**given["conditions"], "ContainersReady": {"status": "True", "lastTransitionTime": at(-59)}}
    spec = valid()
    young = pod(spec.revision, conditions=closed)
    assert condition(status_of(spec, young), "Degraded")["status"] == "False"
    assert condition(status_of(spec, young, now=NOW + 2), "Degraded")["reason"] == "ReadinessGateClosed"
    draining = pod(spec.revision, conditions=given["conditions"], deletionTimestamp=at(600))
    assert not draining.is_on_lost_node
    assert plan_for(spec, seen(plan_for(spec), (draining,))).dead_pods == ()


def test_at_least_24_faults_of_pods_have_a_reason_of_their_own() -> None:
    reasons = {reason for reason, *_ in FAULTS.values()}
    assert len(reasons) >= 24
    assert "Completed" not in reasons


def warning(word: str, message: str, at_s: float = 0.0) -> Json:
    return {"reason": word, "message": message, "type": "Warning", "lastTimestamp": at(at_s)}


MISSING = {
    "QuotaExceeded": 'create Pod x in StatefulSet x failed error: pods "x" is forbidden: exceeded quota: q, requested',
    "PodSecurityViolated": 'pods "x" is forbidden: violates PodSecurity "restricted:latest": privileged',
    "WebhookFailed": 'Internal error occurred: failed calling webhook "policy.example.com": EOF',
    "WebhookRefused": 'admission webhook "policy.example.com" denied the request: no',
    "PodsRejected": 'pods "x" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi',
}


@pytest.mark.parametrize("reason", MISSING)
def test_pods_that_may_not_be_made_are_told_in_the_api_servers_words(reason: str) -> None:
    spec = valid()
    events = [warning("FailedCreate", MISSING[reason]), warning("FailedCreate", "older", -60), warning("Odd", "x", 9)]
    failure = explain_missing_pods(f"chat-{spec.revision}", events)
    assert failure is not None
    status = status_of(spec, missing_pods=(failure,))
    degraded = condition(status, "Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", reason)
    assert MISSING[reason].rstrip(".") in degraded["message"]
    assert degraded["message"].endswith(f"{ADVICE[reason]}.")


@pytest.mark.parametrize(
    ("reason", "word", "message"),
    [
        ("SecretMissing", "FailedMount", 'MountVolume.SetUp failed for volume "v": secret "s" not found'),
        (
            "SecretMissing",
            "FailedMount",
            'MountVolume.SetUp failed for volume "v" : references non-existent secret key: k',
        ),
        ("ConfigMapMissing", "FailedMount", 'MountVolume.SetUp failed for volume "v": configmap "c" not found'),
        ("ClaimOnOneNode", "FailedAttachVolume", "Multi-Attach error for volume pvc-1"),
        ("VolumeFailed", "FailedMount", "mount failed: exit status 32"),
        (
            "ImageVolumesUnsupported",
            "FailedMount",
            'failed to get Plugin from volumeSpec for volume "model" err=no volume plugin matched',
        ),
        ("SandboxFailed", "FailedCreatePodSandBox", "failed to start sandbox container: memory limit too low"),
        ("PodNotStarted", "NetworkNotReady", "network is not ready: cni plugin not initialized"),
    ],
)
def test_what_a_kubelet_waits_for_is_told_from_its_events(reason: str, word: str, message: str) -> None:
    failure = explain_waiting_pod("p", [warning(word, message), warning("FailedScheduling", "earlier", 5)])
    assert failure is not None
    assert (failure.reason, message in failure.message) == (reason, True)
    assert explain_waiting_pod("p", [warning("BackOff", "of a container")]) is None


@pytest.mark.parametrize(
    ("expected", "phase", "conditions", "word"),
    [
        (True, "Pending", {"PodScheduled": "True"}, "ContainerCreating"),
        (False, "Pending", {"PodScheduled": "True", "PodReadyToStartContainers": "True"}, "ContainerCreating"),
        (False, "Pending", {"PodScheduled": "False"}, ""),
        (False, "Pending", {"PodScheduled": "True"}, "ErrImagePull"),
        (False, "Running", {"PodScheduled": "True"}, "ContainerCreating"),
    ],
)
def test_only_a_pod_whose_status_tells_nothing_is_asked_about(
    expected: bool, phase: str, conditions: dict[str, str], word: str
) -> None:
    statuses = [{"name": "engine", **waiting(word)}] if word else []
    listed = [{"type": kind, "status": value} for kind, value in conditions.items()]
    raw = {"metadata": {"name": "p"}, "status": {"phase": phase, "conditions": listed, "containerStatuses": statuses}}
    assert is_creating(raw) is expected


def test_a_death_of_last_month_is_no_reason_for_todays_unreadiness() -> None:
    spec = valid()
    old = {"restartCount": 4, "lastState": ended(7, (-90_000, -80_000), "CUDA out of memory"), "state": {
        "running": {"startedAt": at(-80_000)}}}  # fmt: skip
    view = pod(spec.revision, old, conditions={"Ready": {"status": "False", "lastTransitionTime": at(-3)}})
    observed = seen(plan_for(spec), (view,))
    status = status_of(spec, view)
    assert condition(status, "Degraded")["status"] == "False"
    assert find_next_moment_s(spec, observed, status, NOW) == pytest.approx(7.0, abs=0.1)
    assert condition(status_of(spec, view, now=NOW + 8), "Degraded")["reason"] == "NotReady"


def test_a_surge_that_the_quota_forbids_is_told_by_the_rollout_while_the_old_pods_serve() -> None:
    old, new = valid(), valid(engine={"pageSize": 8})
    failure = explain_missing_pods(f"chat-{new.revision}", [warning("FailedCreate", MISSING["QuotaExceeded"])])
    assert failure is not None
    status = status_of(new, pod(old.revision, conditions=READY), missing_pods=(failure,))
    assert condition(status, "Progressing")["reason"] == "SurgeBlocked"
    assert "exceeded quota" in condition(status, "Progressing")["message"]
    assert condition(status, "Degraded")["status"] == "False"


def test_old_pods_that_finish_their_streams_hold_up_neither_readiness_nor_the_deadline() -> None:
    old = valid(startup={"timeoutSeconds": 10}, rollout={"progressDeadlineSeconds": 11, "minReadySeconds": 0})
    new = valid(
        startup={"timeoutSeconds": 10},
        rollout={"progressDeadlineSeconds": 11, "minReadySeconds": 0},
        engine={"pageSize": 8},
    )
    pods = (pod(new.revision, conditions=READY), pod(old.revision, deletionTimestamp=at(600), conditions=READY))
    first = status_of(new, *pods)
    late = status_of(new, *pods, previous=first, now=NOW + 300)
    assert condition(late, "Ready")["status"] == "True"
    assert (condition(late, "Progressing")["status"], condition(late, "Progressing")["reason"]) == ("True", "Draining")
    assert condition(late, "Degraded")["status"] == "False"


def test_losing_the_last_serving_pod_is_told_as_an_event() -> None:
    spec = valid(rollout={"minReadySeconds": 0})
    well = status_of(spec, pod(spec.revision, conditions=READY))
    gone = status_of(spec, previous=well)
    events = {event.reason: event.is_warning for event in find_events(well, gone)}
    assert events["Unavailable"] is True
    suspended = status_of(valid(suspend=True), previous=well)
    assert {e.reason: e.is_warning for e in find_events(well, suspended)}["Unavailable"] is False


# ---- no Degraded from age alone


DEADLINE_S, LOAD_S = 60, 20
STEADY = {"startup": {"timeoutSeconds": 10}, "rollout": {"progressDeadlineSeconds": DEADLINE_S, "minReadySeconds": 0}}
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["scale", "suspend", "resume", "pause", "go on", "change", "nothing"]), st.integers(1, 5)
    ),
    min_size=4,
    max_size=8,
)


def simulate(actions: list[tuple[str, int]], wait_s: int) -> Iterator[Json]:
    """Statuses of an object whose pods become ready LOAD_S after they are asked for, with `wait_s` between actions:
    a status a second at first, then one before the next action."""
    spec: Json = {"replicas": 1, "suspend": False, "rollout": {**STEADY["rollout"], "paused": False}}
    pages, generation, now, previous = 8, 1, NOW, {}  # type: tuple[int, int, float, Json]
    asked_at: dict[int, float] = {}
    for action, number in actions:
        match action:
            case "scale":
                spec["replicas"] = number
            case "suspend" | "resume":
                spec["suspend"] = action == "suspend"
            case "pause" | "go on":
                spec["rollout"]["paused"] = action == "pause"
            case "change" if not spec["rollout"]["paused"]:
                pages, asked_at = pages + 1, {}
        generation += 1
        owner = Owner("apps", "chat", "uid-1", generation)
        parsed = valid(**{**STEADY, **spec}, engine={"pageSize": pages})
        for offset in (*range(LOAD_S + 2), wait_s):
            moment = now + offset
            asked_at = {n: asked_at.get(n, moment) for n in range(parsed.num_wanted)}
            pods = tuple(simulated_pod(parsed.revision, n, since + LOAD_S, moment) for n, since in asked_at.items())
            previous = status_of(parsed, *pods, previous=previous, now=moment, owner=owner)
            yield previous
        now += wait_s


def simulated_pod(revision: str, ordinal: int, ready_at: float, now: float) -> PodView:
    is_ready = now >= ready_at
    since = format_time(ready_at if is_ready else ready_at - LOAD_S)
    name = f"chat-{revision}-{ordinal}"
    raw = {
        "metadata": {"name": name, "labels": {"toka.dev/revision": revision}},
        "status": {"conditions": [{"type": "Ready", "status": str(is_ready), "lastTransitionTime": since}]},
    }
    return view_pod(raw, frozenset([name] if is_ready else []))


@hypothesis_settings(max_examples=40, deadline=None)
@given(ACTIONS, st.integers(LOAD_S + 3, 2 * 3600))
def test_nothing_is_degraded_from_age_alone(actions: list[tuple[str, int]], wait_s: int) -> None:
    for status in simulate([("none", 1), *actions], wait_s):
        assert condition(status, "Degraded")["status"] == "False", status


def test_a_pause_holds_the_deadline() -> None:
    spec = valid(**{**STEADY, "rollout": {**STEADY["rollout"], "paused": True}}, engine={"pageSize": 8})
    first = status_of(spec, pod(valid().revision, conditions=READY))
    late = status_of(spec, pod(valid().revision, conditions=READY), previous=first, now=NOW + 10_000)
    assert condition(late, "Degraded")["status"] == "False"
    assert condition(late, "Progressing")["reason"] == "Paused"
    assert find_next_moment_s(spec, seen(plan_for(spec)), late, NOW + 10_000) is None


def test_a_deadline_that_is_over_calls_for_no_more_passes() -> None:
    """Pods that have to go do not go: Progressing stays True, and nothing changes by time."""
    spec = valid(**STEADY)
    scaling_down = status_of(spec, *(simulated_pod(spec.revision, n, NOW - 9, NOW) for n in range(3)))
    assert condition(scaling_down, "Progressing")["status"] == "True"
    observed = seen(plan_for(spec))
    assert find_next_moment_s(spec, observed, scaling_down, NOW + DEADLINE_S + 1) is None


def test_every_reason_has_advice_and_stands_in_the_documentation() -> None:
    modules = ("conditions", "failures", "status")
    source = "".join((ROOT / "operator" / "toka_operator" / f"{name}.py").read_text() for name in modules)
    named = set(re.findall(r'"([A-Z][a-z]+(?:[A-Z][a-z]+)+)"', source)) & (ADVICE.keys() | set(EXIT_REASONS.values()))
    assert named | set(EXIT_REASONS.values()) - {"Completed"} <= ADVICE.keys()
    documented = (ROOT / "docs" / "operations.md").read_text()
    assert [reason for reason in ADVICE if f"`{reason}`" not in documented] == []
