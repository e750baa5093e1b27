"""The deployment bears what breaks: a process, the operator, the image, the memory limit, a volume."""

from __future__ import annotations

import pytest

from tests.cluster.harness.handle import Object
from tests.e2e.installation import OPERATOR_NAMESPACE, Deployment, Installation

pytestmark = pytest.mark.timeout(900)


def wait_for_failure(deployment: Deployment, reason: str, timeout_s: float = 120.0) -> Object:
    """Wait until Degraded names `reason`, and return the failure that says so."""

    def failure() -> Object | None:
        status = deployment.read()["status"]
        found = [each for each in status.get("failures", []) if each["reason"] == reason]
        degraded = deployment.condition("Degraded")
        return found[0] if found and degraded.get("reason") == reason else None

    found = deployment.cluster.wait_for(failure, f"Degraded/{reason}: {deployment.explain}", timeout_s)
    assert found is not None
    return found


def test_an_image_that_does_not_exist_is_named_and_one_that_does_mends_it(broken: dict[str, Deployment]) -> None:
    smollm2 = broken["image"]
    failure = wait_for_failure(smollm2, "ImagePullFailed")
    assert "10.243.0.1:5000/toka-engine:never-built" in failure["message"]
    assert smollm2.condition("Ready")["status"] == "False"
    smollm2.patch({"engine": {"image": None}})
    smollm2.wait_until_ready()


def test_an_engine_that_outgrows_its_memory_is_called_out_of_memory(broken: dict[str, Deployment]) -> None:
    failure = wait_for_failure(broken["memory"], "OutOfMemory")
    assert failure["restarts"] >= 0


def test_a_volume_of_a_secret_that_does_not_exist_is_told_in_the_kubelets_words(broken: dict[str, Deployment]) -> None:
    failure = wait_for_failure(broken["secret"], "SecretMissing")
    assert 'secret "certificates" not found' in failure["message"]


@pytest.mark.slow
def test_a_secret_that_comes_lets_the_pod_start_by_itself(broken: dict[str, Deployment]) -> None:
    waiting = broken["secret"]
    wait_for_failure(waiting, "SecretMissing")
    before = [pod["metadata"]["uid"] for pod in waiting.pods()]
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "certificates"}, "stringData": {"a": "b"}}
    waiting.cluster.apply(secret, namespace=waiting.namespace)
    waiting.wait_until_ready()  # the kubelet tries again after two minutes at most
    assert [pod["metadata"]["uid"] for pod in waiting.pods()] == before


def test_a_pod_without_a_gpu_to_run_on_says_what_is_lacking(broken: dict[str, Deployment]) -> None:
    smollm2 = broken["gpu"]

    def progressing() -> str | None:
        condition = smollm2.condition("Progressing")
        return condition["message"] if condition.get("reason") == "Unschedulable" else None

    # Waiting for capacity is no failure until the object's patience is over.
    message = smollm2.cluster.wait_for(progressing, "Progressing/Unschedulable")
    assert message is not None
    assert "Insufficient nvidia.com/gpu" in message
    assert smollm2.condition("Degraded")["status"] == "False"
    smollm2.patch({"scheduling": {"patienceSeconds": 0}})
    failure = wait_for_failure(smollm2, "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in failure["message"]


def test_a_killed_engine_process_is_named_in_the_status_and_the_pod_recovers(smollm2: Deployment) -> None:
    pod = smollm2.pods()[0]
    smollm2.kill_process(pod, "toka_engine.manager")
    failure = wait_for_failure(smollm2, "EngineProcessDied")
    assert failure["pod"] == pod["metadata"]["name"]
    assert failure["exitCode"] == 10
    assert "manager" in failure["message"]
    smollm2.wait_until_ready()
    recovered = next(each for each in smollm2.pods() if each["metadata"]["uid"] == pod["metadata"]["uid"])
    restarts = [each["restartCount"] for each in pod["status"]["containerStatuses"]]
    assert [each["restartCount"] - 1 for each in recovered["status"]["containerStatuses"]] == restarts
    logs = ["logs", pod["metadata"]["name"], "-c", "engine", "--namespace", smollm2.namespace]  # as the runbook says
    assert "manager" in smollm2.cluster.kubectl(*logs, "--previous")
    assert "ready" in smollm2.cluster.kubectl(*logs)
    assert smollm2.ask()


def test_serving_goes_on_without_the_operator_which_catches_up_when_it_is_back(
    installation: Installation, smollm2: Deployment
) -> None:
    cluster = installation.cluster
    smollm2.scale_to(1)
    (before,) = smollm2.pods()
    operators = ["deployment", "--all", "--namespace", OPERATOR_NAMESPACE]
    cluster.kubectl("scale", *operators, "--replicas=0")
    try:
        cluster.wait_for(lambda: not cluster.list_objects("pods", OPERATOR_NAMESPACE), "the operator to be gone")
        assert smollm2.ask()
        smollm2.patch({"replicas": 2})
    finally:  # the tests that follow need it
        cluster.kubectl("scale", *operators, "--replicas=2")
    smollm2.wait_until_ready()
    after = smollm2.pods()
    assert len(after) == 2
    assert before["metadata"]["uid"] in {pod["metadata"]["uid"] for pod in after}
