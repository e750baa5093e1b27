"""A batch through the Service of a deployment with a claim, whatever becomes of the pods meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness.paths import REPOSITORY
from tests.e2e.installation import OPERATOR_NAMESPACE, Deployment, Installation

pytestmark = pytest.mark.timeout(1800)
LINES = 200


@pytest.fixture
def batches(installation: Installation, namespace: str, tmp_path: Path) -> Iterator[Deployment]:
    """Apply examples/batches.yaml as it is, on a volume of the nodes' file system; then with engines of one thread."""
    cluster, volume = installation.cluster, f"{namespace}-data"
    folder = tmp_path / "volume"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    spec: dict[str, Any] = {"capacity": {"storage": "10Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    spec |= {"claimRef": {"namespace": namespace, "name": "batches-data"}, "hostPath": {"path": str(folder)}}
    spec["persistentVolumeReclaimPolicy"] = "Retain"
    manifest = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume}, "spec": spec}
    cluster.apply(manifest)
    cluster.kubectl("apply", "--namespace", namespace, "-f", str(REPOSITORY / "examples" / "batches.yaml"))
    deployment = Deployment(installation, namespace, "batches")
    deployment.patch({"model": {"servedName": "smollm2"}, "engine": {"extraArgs": ["num_threads=1"]}})
    yield deployment
    cluster.kubectl("delete", "persistentvolume", volume, "--wait=false")


@pytest.mark.slow
def test_a_batch_lives_through_a_rollout_an_operators_restart_and_a_killed_pod(
    installation: Installation, batches: Deployment
) -> None:
    cluster = installation.cluster
    batches.wait_until_ready(900)
    (claim,) = cluster.list_objects("persistentvolumeclaims", batches.namespace)
    assert claim["metadata"].get("ownerReferences") is None
    client = installation.start_client("batch", "batch_lives.py", batches.url, str(LINES))

    def told() -> list[dict[str, Any]]:
        return [json.loads(line) for line in client.log().splitlines() if line.startswith("{")]

    def completed() -> int:
        return max((line["completed"] for line in told() if "completed" in line), default=-1)

    def wait_for_progress(number: int) -> None:
        cluster.wait_for(
            lambda: completed() >= number or not client.is_running(), f"{number} lines: {client.log(2000)}", 600
        )

    wait_for_progress(20)
    owner = told()[0]["batch"].split("_")[1].split("-")[0]
    before = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in batches.pods()}
    pod = next(name for name in before if name.endswith(f"-{owner}"))
    cluster.kubectl("delete", "pod", pod, "--namespace", batches.namespace, "--grace-period=0", "--force")
    wait_for_progress(completed() + 20)
    batches.patch({"engine": {"pageSize": 8}})
    cluster.kubectl("rollout", "restart", "deployment", "--namespace", OPERATOR_NAMESPACE)
    cluster.wait_for(
        lambda: not set(before.values()) & {pod["metadata"]["uid"] for pod in batches.pods()},
        f"other pods: {batches.explain}",
        900,
    )
    cluster.wait_for(lambda: not client.is_running(), f"the batch: {client.log(2000)}", 900)
    end = told()[-1]
    print(end)
    assert (end["status"], end["lost"], end["repeated"], end["errors"]) == ("completed", 0, 0, None), client.log(4000)
    assert end["is_listed"]
    batches.wait_until_ready(900)

    def ordinals() -> list[str]:
        return sorted(pod["metadata"]["name"].rsplit("-", 1)[1] for pod in batches.pods())

    # The last pod of the old revision may still drain.
    cluster.wait_for(lambda: ordinals() == ["0", "1"], f"pods of two ordinals: {batches.explain}", 300)
