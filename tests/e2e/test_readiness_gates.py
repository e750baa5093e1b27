"""Readiness gates, as load balancers' controllers use them, with a real kubelet that waits for what they report."""

from __future__ import annotations

import json

import pytest

from tests.cluster.harness.handle import Object
from tests.e2e.installation import Deployment, Installation
from tests.e2e.test_faults import wait_for_failure

pytestmark = pytest.mark.timeout(900)
GATE = "example.com/balanced"


def open_gate(deployment: Deployment, pod: Object) -> None:
    """Report a pod's gate as true, as a load balancer's controller does that has tried the pod."""
    status = {"status": {"conditions": [{"type": GATE, "status": "True"}]}}
    name = pod["metadata"]["name"]
    patch = ["patch", "pod", name, "--subresource=status", "--type=strategic", "-p", json.dumps(status)]
    deployment.cluster.kubectl(*patch, "--namespace", deployment.namespace)


@pytest.mark.slow
def test_a_pod_behind_a_readiness_gate_serves_once_that_is_reported(installation: Installation, namespace: str) -> None:
    gated = installation.deploy(
        namespace,
        podTemplate={"readinessGates": [{"conditionType": GATE}]},
        engine={"extraArgs": ["num_threads=1"]},
    )
    failure = wait_for_failure(gated, "ReadinessGateClosed", timeout_s=300)
    assert GATE in failure["message"]
    (pod,) = gated.pods()
    open_gate(gated, pod)
    gated.wait_until_ready()
    gated.cluster.wait_for(lambda: gated.condition("Degraded")["status"] == "False", "nothing to be wrong any more")
    assert [each["metadata"]["uid"] for each in gated.pods()] == [pod["metadata"]["uid"]]
    assert gated.ask()
