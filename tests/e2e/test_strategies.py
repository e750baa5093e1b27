"""Rollouts in place, and one that fails and goes back, under load on real nodes: clients lose nothing."""

from __future__ import annotations

import argparse
import time

import pytest

from tests.e2e.installation import Installation
from tests.e2e.rollouts import Load, deploy

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.slow
def test_in_place_and_back_from_a_broken_revision_no_request_is_lost(installation: Installation) -> None:
    cluster = installation.cluster
    deployment = deploy(installation, "tiny", drain_delay_s=5, replicas=2)
    rollout = {"strategy": "InPlace", "onFailure": "Rollback", "progressDeadlineSeconds": 150}
    deployment.patch({"rollout": rollout, "startup": {"timeoutSeconds": 120}})
    deployment.wait_until_ready(600.0)
    load = Load(deployment, argparse.Namespace(clients=8, tokens=64, pause=0.2))
    cluster.wait_for(lambda: len(load.requests()) >= 8, "an answer for each client", 300.0)

    first = deployment.read()["status"]["currentRevision"]
    deployment.patch({"podTemplate": {"annotations": {"example.com/round": "1"}}})
    cluster.wait_for(lambda: deployment.read()["status"]["currentRevision"] != first, "the new revision to be seen")
    deployment.wait_until_ready(600.0)
    second = deployment.read()["status"]["currentRevision"]
    serving = {pod["metadata"]["uid"] for pod in deployment.pods() if "deletionTimestamp" not in pod["metadata"]}
    assert len(serving) == 2

    deployment.patch({"engine": {"extraArgs": ["num_threads=1", "no_such_key=1"]}})
    cluster.wait_for(lambda: deployment.condition("Degraded").get("reason") == "RolledBack", "the way back", 400.0)
    status = deployment.read()["status"]
    assert (status["currentRevision"], status["rollback"]["reason"]) == (second, "ConfigInvalid")
    assert "no_such_key" in status["rollback"]["message"]
    cluster.wait_for(lambda: deployment.read()["status"]["availableReplicas"] == 2, "two pods to serve again", 400.0)
    after = {pod["metadata"]["uid"] for pod in deployment.pods() if "deletionTimestamp" not in pod["metadata"]}
    assert len(after & serving) == 1, "the one that still served was used again"
    requests = [line for line in load.stop() if "began" in line]
    assert [each for each in requests if "error" in each] == []
    print(f"{len(requests)} requests, none failed")


@pytest.mark.slow
def test_a_canary_with_another_name_of_the_model_is_taken_away_and_one_that_serves_alike_passes(
    installation: Installation,
) -> None:
    """The engines are real, and so is the fault: clients ask for a name that the new revision does not have."""
    cluster = installation.cluster
    deployment = deploy(installation, "tiny", drain_delay_s=5, replicas=2)
    deployment.patch({"rollout": {"canary": {"seconds": 600}, "onFailure": "Rollback"}})
    deployment.wait_until_ready(600.0)
    first = deployment.read()["status"]["currentRevision"]
    load = Load(deployment, argparse.Namespace(clients=6, tokens=16, pause=0.2))
    cluster.wait_for(lambda: len(load.requests()) >= 8, "an answer for each client", 300.0)

    deployment.patch({"model": {"servedName": "another"}})
    cluster.wait_for(lambda: deployment.condition("Degraded").get("reason") == "RolledBack", "the way back", 400.0)
    status = deployment.read()["status"]
    assert (status["currentRevision"], status["rollback"]["reason"]) == (first, "CanaryFailed")
    assert "too many errors" in status["canary"]["message"]
    cluster.wait_for(lambda: len(deployment.pods()) == 2, "the canary to be gone", 200.0)
    failed_until = time.time()

    deployment.patch({"model": {"servedName": None}, "rollout": {"canary": {"seconds": 20}}})
    deployment.patch({"podTemplate": {"annotations": {"example.com/round": "1"}}})
    cluster.wait_for(
        lambda: deployment.read()["status"].get("canary", {}).get("phase") == "Passed", "the good canary", 400.0
    )
    deployment.wait_until_ready(600.0)
    status = deployment.read()["status"]
    assert status["currentRevision"] != first
    assert "first token after" in status["canary"]["message"]
    requests = [line for line in load.stop() if "began" in line]
    failed = [each for each in requests if "error" in each]
    assert failed
    assert [each for each in failed if each["began"] > failed_until or "404" not in each["error"]] == []
    print(f"{len(failed)} of {len(requests)} requests failed at the bad canary; {status['canary']['message']}")
