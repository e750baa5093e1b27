"""`kubectl drain` of a real node under load: a single replica's clients lose nothing, and the drain ends."""

from __future__ import annotations

import argparse

import pytest

from tests.e2e.installation import Installation
from tests.e2e.rollouts import Load, deploy

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_a_drain_under_load_loses_no_request_of_a_single_replica_and_ends(installation: Installation) -> None:
    cluster = installation.cluster
    deployment = deploy(installation, "tiny", drain_delay_s=5, replicas=1)
    (before,) = deployment.pods()
    node = before["spec"]["nodeName"]
    load = Load(deployment, argparse.Namespace(clients=8, tokens=64, pause=0.2))
    cluster.wait_for(lambda: len(load.requests()) >= 8, "an answer for each client", 300.0)
    only_ours = f"--pod-selector=app.kubernetes.io/instance={deployment.name}"
    try:
        cluster.kubectl("drain", node, only_ours, "--delete-emptydir-data", "--timeout=400s", timeout_s=420.0)
        answered = len(load.requests())
        cluster.wait_for(lambda: len(load.requests()) >= answered + 8, "answers of the successor", 300.0)
    finally:
        cluster.kubectl("uncordon", node)
    requests = [line for line in load.stop() if "began" in line]
    assert [each for each in requests if "error" in each] == []
    (after,) = deployment.pods()
    assert after["spec"]["nodeName"] != node
    print(f"{len(requests)} requests, none failed")
