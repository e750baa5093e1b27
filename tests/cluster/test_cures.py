"""The cures of docs/operations.md's runbook, each run on an object that says so, and its commands.

There is no kubelet here: what one reports is written, as in `test_faults_are_told`; the change of the spec that cures
it, and what becomes of the pods, are real. Other cures have tests of their own, which the runbook names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.gateways import make_gateway, with_kinds
from tests.cluster.harness.paths import REPOSITORY
from tests.cluster.operating import HOLD, Json, Operator
from tests.cluster.test_faults_are_told import WARNINGS, make_faults, report
from tests.cluster.test_kubectl_toka import Plugin

RUNBOOK = REPOSITORY / "docs" / "operations.md"
CURES: dict[str, Json] = {
    "ConfigInvalid": {"engine": {"extraArgs": ["seed=2"]}},
    "ContainerNotStarted": {"engine": {"image": "engine:2"}},
    "CrashLoop": {"engine": {"image": "engine:2"}},
    "DeviceUnavailable": {"engine": {"image": "engine:2"}},
    "EngineExited": {"engine": {"image": "engine:2"}},
    "HubUnavailable": {"engine": {"env": [{"name": "HF_ENDPOINT", "value": "http://hub.example"}]}},
    "ImagePullFailed": {"engine": {"image": "engine:2"}},
    "ModelAuthFailed": {"auth": {"hfTokenSecretRef": {"name": "token"}}},
    "ModelInvalid": {"model": {"source": "file:///models/whole"}},
    "ModelNotFound": {"model": {"source": "file:///models/right"}},
    "OutOfMemory": {"resources": {"memory": "4Gi"}},
    "PortInUse": {"engine": {"port": 9000}},
    "SandboxFailed": {"resources": {"memory": "4Gi"}},
    "StartupTimeout": {"startup": {"timeoutSeconds": 3000}},
    "StorageFailed": {"cache": {"size": "20Gi"}},
    "VolumeFailed": {"podTemplate": {"volumes": None, "volumeMounts": None}},
}
"""Reason -> the change of the spec that its row tells to make."""
BEFORE: dict[str, Json] = {
    "VolumeFailed": {
        "podTemplate": {
            **HOLD["podTemplate"],
            "volumes": [{"name": "more", "emptyDir": {}}],
            "volumeMounts": [{"name": "more", "mountPath": "/more"}],
        }
    },
}
"""Reason -> what the object had that is wrong, where that is not left out."""
UNHELD: Json = {"annotations": None}


def see_gone(operator: Operator, name: str) -> None:
    """Waits until a pod is told to go, and lets it."""

    def is_leaving() -> bool:
        found = operator.get("pod", name)
        return found is None or "deletionTimestamp" in found["metadata"]

    operator.wait_for(is_leaving, f"{name} to be told to go")
    if operator.get("pod", name) is not None:
        operator.release_pod(name)


@pytest.mark.timeout(240)
def test_the_cures_in_the_spec_work_on_objects_that_fail(operator: Operator) -> None:
    faults = make_faults() | {reason: (message, {}) for reason, (_, message) in WARNINGS.items()}
    operator.num_edits = 12 * len(CURES)
    pods: dict[str, Json] = {}
    for reason in CURES:
        operator.apply(reason.lower(), **{**HOLD, **BEFORE.get(reason, {})})
    for reason in CURES:
        (pods[reason],) = operator.wait_for(partial(operator.pods, reason.lower()), f"a pod of {reason}")
        report(operator, reason, pods[reason], faults[reason][1])
    for reason, cure in CURES.items():
        operator.wait_for_condition(reason.lower(), "Degraded", "True", reason)
        operator.patch(reason.lower(), **{**cure, "podTemplate": {**UNHELD, **cure.get("podTemplate", {})}})
    for reason, pod in pods.items():
        see_gone(operator, pod["metadata"]["name"])
        operator.wait_until_ready(reason.lower())
        operator.wait_for_condition(reason.lower(), "Degraded", "False")
    for reason in CURES:  # the next test's passes are counted
        operator.delete("td", reason.lower())
    operator.wait_for(lambda: not operator.list("td,statefulset,pod"), "all to be gone", 120.0)


def test_a_node_for_the_pods_cures_what_was_unschedulable(operator: Operator) -> None:
    operator.apply("chat", scheduling={"nodeSelector": {"example.com/none": "x"}, "patienceSeconds": 0})
    operator.wait_for_condition("chat", "Degraded", "True", "Unschedulable")
    operator.patch("chat", scheduling={"nodeSelector": None})
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_a_rollout_beyond_its_deadline_goes_on_once_its_pods_can(operator: Operator) -> None:
    operator.apply("chat", **HOLD, startup={"timeoutSeconds": 10}, rollout={"progressDeadlineSeconds": 11})
    operator.wait_for_condition("chat", "Degraded", "True", "ProgressDeadlineExceeded")
    operator.patch("chat", podTemplate=UNHELD)
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_an_autoscaler_that_rests_goes_on_with_a_replica(operator: Operator) -> None:
    scaled = {"enabled": True, "minReplicas": 1, "maxReplicas": 2, "target": 10}
    operator.apply("chat", replicas=0, autoscaling=scaled)
    operator.wait_for_condition("chat", "Autoscaled", "False", "ScalingDisabled")
    operator.scale("chat", 1)
    operator.wait_for_condition("chat", "Autoscaled", "False", "FailedGetPodsMetric")
    operator.wait_until_ready("chat")


def list_commands() -> list[str]:
    """The commands of the runbook, but those that read logs, which need a kubelet."""
    section = RUNBOOK.read_text().split("\n## Runbook\n")[1].split("\n## ")[0]
    found = dict.fromkeys(re.findall(r"`(kubectl [^`]+)`", section))
    return [command for command in found if " logs " not in command]


@contextmanager
def something_of_everything(operator: Operator) -> Iterator[dict[str, str]]:
    """The objects that the runbook's commands ask for are there meanwhile. Yields its words -> their names."""
    operator.apply("chat", replicas=2, autoscaling={"enabled": True, "maxReplicas": 3, "target": 8})
    operator.wait_until_ready("chat")
    pod = operator.pods("chat")[0]
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    manifest = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": claim}
    operator.server.apply(manifest, namespace=operator.namespace)
    operator.wait_for(lambda: operator.get("hpa", "chat"), "the autoscaler")
    names = {"NAME": "chat", "POD": pod["metadata"]["name"], "NODE": pod["spec"]["nodeName"], "CLAIM": "models"}
    with with_kinds(operator.server, "Gateway", "HTTPRoute"):
        make_gateway(operator, "web")
        route: Json = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "chat"}}
        operator.server.apply({**route, "spec": {"parentRefs": [{"name": "web"}]}}, namespace=operator.namespace)
        yield {**names, "GATEWAY": "web"}


def test_every_command_of_the_runbook_runs(operator: Operator, tmp_path: Path) -> None:
    toka = Plugin(operator, tmp_path)
    commands = list_commands()
    assert len(commands) >= 8
    with something_of_everything(operator) as names:
        for command in commands:
            words = [
                re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], w) for w in shlex.split(command)
            ]
            if words[1] == "toka":
                assert "chat" in toka(*words[2:], "--namespace", operator.namespace)
            else:
                operator.kubectl(*words[1:])  # raises where kubectl refuses it
