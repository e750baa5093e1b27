"""The deployment bears what breaks: a process, a node, the operator, the image, the memory limit."""

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


def test_a_killed_engine_process_is_named_in_the_status_and_the_pod_recovers(
    installation: Installation, namespace: str
) -> None:
    smollm2 = installation.deploy(namespace)
    smollm2.wait_until_ready()
    (pod,) = smollm2.pods()
    smollm2.kill_process(pod, "toka_engine.manager")
    failure = wait_for_failure(smollm2, "EngineProcessDied")
    assert failure["pod"] == pod["metadata"]["name"]
    assert failure["exitCode"] == 10
    assert "manager" in failure["message"]
    smollm2.wait_until_ready()
    (recovered,) = smollm2.pods()
    assert recovered["metadata"]["uid"] == pod["metadata"]["uid"]
    assert [each["restartCount"] for each in recovered["status"]["containerStatuses"]] == [1]
    assert smollm2.ask()


def test_an_image_that_does_not_exist_is_named(installation: Installation, namespace: str) -> None:
    image = "10.243.0.1:5000/toka-engine:never-built"
    smollm2 = installation.deploy(namespace, engine={"image": image})
    failure = wait_for_failure(smollm2, "ImagePullFailed")
    assert image in failure["message"]
    assert smollm2.condition("Ready")["status"] == "False"
    smollm2.patch({"engine": {"image": None}})
    smollm2.wait_until_ready()


def test_an_engine_that_outgrows_its_memory_is_called_out_of_memory(installation: Installation, namespace: str) -> None:
    # Less than the first process needs of its own: near a limit the kernel drops pages of libraries and reads them
    # again, for minutes if they are not in memory yet.
    smollm2 = installation.deploy(namespace, resources={"device": "cpu", "memory": "64Mi"})
    failure = wait_for_failure(smollm2, "OutOfMemory")
    assert failure["restarts"] >= 0


def test_a_pod_without_a_gpu_to_run_on_says_what_is_lacking(installation: Installation, namespace: str) -> None:
    smollm2 = installation.deploy(namespace, resources={"device": "gpu", "memory": "2Gi"})

    def progressing() -> str | None:
        condition = smollm2.condition("Progressing")
        return condition["message"] if condition.get("reason") == "Unschedulable" else None

    # Waiting for capacity is no failure until the object's patience is over.
    message = installation.cluster.wait_for(progressing, "Progressing/Unschedulable")
    assert message is not None
    assert "Insufficient nvidia.com/gpu" in message
    assert smollm2.condition("Degraded")["status"] == "False"
    smollm2.patch({"scheduling": {"patienceSeconds": 0}})
    failure = wait_for_failure(smollm2, "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in failure["message"]


def test_serving_goes_on_without_the_operator_which_catches_up_when_it_is_back(
    installation: Installation, namespace: str
) -> None:
    cluster = installation.cluster
    smollm2 = installation.deploy(namespace)
    smollm2.wait_until_ready()
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


def test_while_a_node_is_dead_the_other_serves(installation: Installation, namespace: str) -> None:
    cluster = installation.cluster
    one_for_each_node = {"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}
    scheduling = {"topologySpread": [one_for_each_node]}
    smollm2 = installation.deploy(namespace, replicas=2, scheduling=scheduling)
    smollm2.wait_until_ready()
    assert {pod["spec"]["nodeName"] for pod in smollm2.pods()} == {"node1", "node2"}
    cluster.kill_node(2)
    try:
        cluster.wait_for_node(2, is_ready=False)
        cluster.wait_for(
            lambda: smollm2.read()["status"].get("readyReplicas") == 1, "the status to say that one is left"
        )
        cluster.wait_for(smollm2.ask, "the Service to leave the dead pod out", timeout_s=120)
        smollm2.keep_asking(5)
    finally:
        cluster.start_node(2)
        cluster.wait_for_node(2)
    smollm2.wait_until_ready()
