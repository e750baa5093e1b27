"""Rollouts in place, and one that fails and goes back, under load on real nodes: clients lose nothing."""

from __future__ import annotations

import argparse

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
