"""A pod's fault stands in the status, in the engine's own words.

There is no kubelet here, so each test writes what a kubelet reports; the e2e tests have the real reports.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from toka_operator.advice import ADVICE

from tests.cluster.operating import HOLD, Operator

ENDED = {"containerID": "x://y", "finishedAt": "2026-01-01T00:00:01Z", "startedAt": "2026-01-01T00:00:00Z"}


def report(operator: Operator, restarts: int = 0, **state: Any) -> None:
    """The status of the engine container of the only pod."""
    operator.wait_for(lambda: operator.pods("chat"), "the pod")
    (pod,) = operator.pods("chat")
    entry = {
        "name": "engine",
        "image": "engine:1",
        "imageID": "",
        "ready": False,
        "restartCount": restarts,
        **state,
    }
    operator.set_pod_status(pod["metadata"]["name"], containerStatuses=[entry])


@pytest.mark.parametrize(
    ("reason", "waiting"),
    [
        ("ImagePullFailed", {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "none:1"'}),
        ("SecretMissing", {"reason": "CreateContainerConfigError", "message": 'secret "hf" not found'}),
        ("ConfigMapMissing", {"reason": "CreateContainerConfigError", "message": 'configmap "c" not found'}),
    ],
)
def test_a_container_that_cannot_start_is_told(operator: Operator, reason: str, waiting: dict[str, str]) -> None:
    operator.apply("chat", **HOLD)
    report(operator, state={"waiting": waiting})
    degraded = operator.wait_for_condition("chat", "Degraded", "True", reason)
    assert waiting["message"] in degraded["message"]
    (failure,) = operator.require("td", "chat")["status"]["failures"]
    assert failure["reason"] == reason
    assert operator.require("td", "chat")["status"]["phase"] == "Degraded"


@pytest.mark.parametrize(
    ("reason", "code", "word"),
    [("ModelNotFound", 3, "Error"), ("EngineProcessDied", 10, "Error"), ("OutOfMemory", 137, "OOMKilled"),
     ("CrashLoop", 1, "Error")],
)  # fmt: skip
def test_the_engines_last_words_and_exit_code_are_told(operator: Operator, reason: str, code: int, word: str) -> None:
    operator.apply("chat", **HOLD)
    last = {"exitCode": code, "reason": word, "message": "toka: model=/none: no such folder", **ENDED}
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 10s"}
    report(operator, 4, state={"waiting": waiting}, lastState={"terminated": last})
    degraded = operator.wait_for_condition("chat", "Degraded", "True", reason)
    assert "no such folder" in degraded["message"]
    (failure,) = operator.require("td", "chat")["status"]["failures"]
    assert (failure["exitCode"], failure["restarts"], failure["container"]) == (code, 4, "engine")
    assert failure["message"] == "toka: model=/none: no such folder"


def test_a_recovered_pod_is_no_longer_degraded_but_its_failure_stays_visible(operator: Operator) -> None:
    operator.apply("chat", **HOLD)
    last = {"exitCode": 10, "reason": "Error", "message": "toka: the worker died", **ENDED}
    report(operator, 1, state={"running": {}}, lastState={"terminated": last})
    operator.wait_for_condition("chat", "Degraded", "True", "EngineProcessDied")
    (pod,) = operator.pods("chat")
    now = "2026-01-01T00:00:00Z"
    ready = [{"type": t, "status": "True", "lastTransitionTime": now} for t in ("Ready", "ContainersReady")]
    operator.set_pod_status(
        pod["metadata"]["name"],
        phase="Running",
        conditions=ready,
        podIP="10.1.1.1",
        podIPs=[{"ip": "10.1.1.1"}],
    )
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")
    (failure,) = operator.require("td", "chat")["status"]["failures"]
    assert failure["reason"] == "EngineProcessDied"


def test_a_missing_claim_is_told_and_nothing_needs_a_restart_once_it_is_there(operator: Operator) -> None:
    operator.apply("chat", model={"source": "pvc://weights/llama"})
    missing = operator.wait_for_condition("chat", "Degraded", "True", "ClaimMissing")
    assert "weights" in missing["message"]
    (failure,) = operator.require("td", "chat")["status"]["failures"]
    (pod,) = operator.pods("chat")
    assert (failure["pod"], failure["reason"]) == (pod["metadata"]["name"], "ClaimMissing")
    size = {"storage": "1Gi"}
    common = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    claim = {**common, "volumeName": operator.namespace, "resources": {"requests": size}}
    owner = {"namespace": operator.namespace, "name": "weights"}
    volume = {**common, "capacity": size, "claimRef": owner, "hostPath": {"path": "/nowhere"}}
    for kind, name, spec in (
        ("PersistentVolume", operator.namespace, volume),
        ("PersistentVolumeClaim", "weights", claim),
    ):
        manifest = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        operator.server.apply(manifest, namespace=operator.namespace)
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")
    assert [p["metadata"]["uid"] for p in operator.pods("chat")] == [pod["metadata"]["uid"]]
    operator.server.kubectl("delete", "pv", operator.namespace, "--wait=false")


def test_a_pod_that_fits_on_no_node_is_told_in_the_schedulers_words(operator: Operator) -> None:
    operator.apply("chat", resources={"device": "gpu", "gpuResource": "example.com/none"})
    waiting = operator.wait_for_condition("chat", "Progressing", "True", "Unschedulable")
    assert "Insufficient example.com/none" in waiting["message"]
    operator.wait_for_condition("chat", "Degraded", "False")
    operator.patch("chat", scheduling={"patienceSeconds": 0})
    degraded = operator.wait_for_condition("chat", "Degraded", "True", "Unschedulable")
    (failure,) = operator.require("td", "chat")["status"]["failures"]
    assert failure["reason"] == "Unschedulable"
    assert "Insufficient example.com/none" in failure["message"]
    assert failure["message"] in degraded["message"]


LIMITS = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}}
LIMITS |= {"spec": {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]}}
QUOTA = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "0"}}}


@pytest.mark.parametrize(
    ("reason", "words", "obstacle"),
    [("QuotaExceeded", "exceeded quota: few", QUOTA), ("PodsRejected", "maximum memory usage per Container", LIMITS)],
)
def test_pods_that_are_refused_are_told_and_made_soon_after_they_may(
    operator: Operator, reason: str, words: str, obstacle: dict[str, Any]
) -> None:
    operator.server.apply(obstacle, namespace=operator.namespace)
    operator.apply("chat", resources={"device": "cpu", "memory": "2Gi"})
    began = time.monotonic()
    degraded = operator.wait_for_condition("chat", "Degraded", "True", reason)
    print(f"{reason}: told after {time.monotonic() - began:.1f} s")
    assert words in degraded["message"]
    assert degraded["message"].endswith(f"{ADVICE[reason]}.")
    assert operator.require("td", "chat")["status"]["failures"][0]["reason"] == reason
    operator.kubectl("delete", obstacle["kind"], obstacle["metadata"]["name"])
    began = time.monotonic()
    operator.wait_until_ready("chat")
    print(f"{reason}: ready {time.monotonic() - began:.1f} s after the obstacle went")


@pytest.mark.parametrize("late_s", [0.0, 33.0])
def test_a_kubelets_warning_about_a_volume_is_told(operator: Operator, late_s: float) -> None:
    """A watch tells that there is news also when the pod's events are listed but once in half a minute."""
    operator.apply("chat", **HOLD)
    operator.wait_for(lambda: operator.pods("chat"), "the pod")
    (pod,) = operator.pods("chat")
    time.sleep(late_s)
    involved = {"kind": "Pod", "namespace": operator.namespace}
    involved |= {key: pod["metadata"][key] for key in ("name", "uid")}
    message = 'MountVolume.SetUp failed for volume "data": secret "certificates" not found'
    event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": "mount"}, "involvedObject": involved}
    event |= {"type": "Warning", "reason": "FailedMount", "message": message, "source": {"component": "kubelet"}}
    operator.server.apply(event, namespace=operator.namespace)
    began = time.monotonic()
    degraded = operator.wait_for_condition("chat", "Degraded", "True", "SecretMissing")
    took_s = time.monotonic() - began
    print(f"a Warning {late_s:.0f} s after the pod: told after {took_s:.1f} s")
    assert message in degraded["message"]
    assert took_s < 20.0


def test_transitions_are_told_as_events_once(operator: Operator) -> None:
    operator.apply("chat", replicas=1)
    operator.wait_until_ready("chat")
    operator.patch("chat", engine={"pageSize": 32})
    operator.wait_for(lambda: len(operator.sets("chat")) == 1, "the rollout to end")
    operator.wait_until_ready("chat")

    def reasons() -> list[str]:
        events = json.loads(operator.kubectl("get", "events", "-o", "json"))["items"]
        ours = [e for e in events if e["involvedObject"]["kind"] == "TokaDeployment"]
        return sorted(e["reason"] for e in ours for _ in range(e["count"]))

    operator.wait_for(
        lambda: reasons() == ["Ready", "Ready", "RolloutStarted"],
        "three events, of which the second Ready is counted up",
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"podTemplate": {"sidecars": [{"name": "log", "image": "log:1", "mispelt": 1}]}},
        {"scheduling": {"affinity": {"mispelt": 1}}},
    ],
)
def test_a_misspelt_field_that_the_crd_does_not_know_is_refused_by_its_name(
    operator: Operator, spec: dict[str, Any]
) -> None:
    operator.expected.append("rejected=")
    operator.apply("chat", **spec)
    rejected = operator.wait_for_condition("chat", "ConfigValid", "False", "ChildRejected")
    assert "mispelt" in rejected["message"]
