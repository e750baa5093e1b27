"""The README's promises hold on real nodes and images, from `helm install` and `kubectl apply` to answers."""

from __future__ import annotations

import json
import time

import pytest

from tests.cluster.harness.errors import CommandFailed
from tests.cluster.harness.handle import Object
from tests.e2e.installation import Deployment, Installation, deletion_time, read_time

pytestmark = pytest.mark.timeout(900)
LEAVES_A_LOST_NODE_SOON = {
    "tolerations": [
        {"key": f"node.kubernetes.io/{taint}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
        for taint in ("not-ready", "unreachable")
    ]
}
"""Scheduling whose pods leave a node after 5 s that does not answer; the operator's default is 30 s."""


def test_the_example_streams_an_answer_through_its_services_name(
    installation: Installation, smollm2: Deployment
) -> None:
    assert smollm2.read()["status"]["url"] == smollm2.url
    lines = installation.run_client("stream.py", smollm2.url, "What is the capital of France?", "40").splitlines()
    *chunks, end = [json.loads(line) for line in lines]
    assert len(chunks) > 1
    assert "".join(chunk["text"] for chunk in chunks) == end["whole"]
    assert "Paris" in end["whole"]
    assert end["finish_reason"] == "stop"


def test_helm_test_asks_the_endpoint(installation: Installation, smollm2: Deployment) -> None:
    installation.helm_upgrade(f"test.namespace={smollm2.namespace}")
    installation.cluster.helm("test", "toka", "--namespace", "toka-system", "--timeout", "3m")


def test_after_scaling_to_two_both_replicas_answer(smollm2: Deployment) -> None:
    smollm2.scale_to(2)
    wait_until_each_answers(smollm2)


def wait_until_each_answers(deployment: Deployment) -> None:
    """Ask through the Service, each time on a new connection, until every pod has answered."""

    def each_has_answered() -> bool:
        deployment.keep_asking(2)
        return all(deployment.requests_served(pod) > 0 for pod in deployment.pods())

    deployment.cluster.wait_for(each_has_answered, "every replica to have answered", timeout_s=120)


def test_a_stream_that_runs_while_the_spec_changes_is_whole_and_unchanged(
    installation: Installation, smollm2: Deployment
) -> None:
    cluster = installation.cluster
    smollm2.patch({"rollout": {"drainTimeoutSeconds": 600}, "scheduling": {"tolerations": None}})
    smollm2.scale_to(1)
    (old,) = smollm2.pods()
    old_name = old["metadata"]["name"]
    # The stream slows the next pod's start down: it takes three times as long as this one.
    num_tokens = _tokens_that_take(3 * _start_time_of(old), installation, smollm2.url)
    request = ("stream.py", smollm2.url, "Tell me a long story.", str(num_tokens), "ignore_eos")
    stream = installation.start_client(f"stream-{smollm2.namespace}", *request)
    cluster.wait_for(lambda: "text" in stream.log(), "the stream's first words")

    smollm2.patch({"scheduling": LEAVES_A_LOST_NODE_SOON})

    def is_going() -> float | None:
        pod = cluster.get("pod", old_name, smollm2.namespace)
        assert pod is not None, "the old pod was gone before its deletion was seen"
        return deletion_time(pod) if "deletionTimestamp" in pod["metadata"] else None

    deleted_at = cluster.wait_for(is_going, "the old pod's deletion", timeout_s=240)
    assert deleted_at is not None
    cluster.wait_for(lambda: time.time() > deleted_at + 10, "the old pod to take no more requests")
    other = installation.start_client(f"undisturbed-{smollm2.namespace}", *request)
    cluster.wait_for(lambda: not stream.is_running(), "the stream's end", timeout_s=240)
    assert stream.popen.returncode == 0, stream.log()
    chunks = [json.loads(line) for line in stream.log().splitlines()]
    assert chunks[0]["at"] < deleted_at < chunks[-1]["at"]
    smollm2.wait_until_ready()
    cluster.wait_for(lambda: not other.is_running(), "the end of the same stream on the new pod", timeout_s=240)
    undisturbed = json.loads(other.log().splitlines()[-1])
    for key in ("whole", "finish_reason", "num_tokens"):
        assert chunks[-1][key] == undisturbed[key]
    assert undisturbed["num_tokens"] == num_tokens


def _start_time_of(pod: Object) -> float:
    """Seconds from a pod's creation until it was ready."""
    ready = next(each for each in pod["status"]["conditions"] if each["type"] == "Ready")
    return read_time(ready["lastTransitionTime"]) - read_time(pod["metadata"]["creationTimestamp"])


def _tokens_that_take(seconds: float, installation: Installation, url: str) -> int:
    """The number of tokens that keep one stream busy so long; machines differ."""
    lines = installation.run_client("stream.py", url, "Tell me a long story.", "32", "ignore_eos").splitlines()
    first, end = json.loads(lines[0]), json.loads(lines[-1])
    return min(2000, max(100, int(31 / (end["at"] - first["at"]) * seconds)))


def test_an_object_that_cannot_work_is_refused_with_a_sentence(installation: Installation, namespace: str) -> None:
    with pytest.raises(CommandFailed) as refusal:
        installation.deploy(namespace, rollout={"maxSurge": 0, "maxUnavailable": 0})
    assert "rollout.maxSurge and rollout.maxUnavailable may not both be 0" in refusal.value.stderr
    with pytest.raises(CommandFailed) as refusal:
        installation.deploy(namespace, model={"source": "builtin://smollm2", "revision": "main"})
    assert "model.revision is only for hf:// sources" in refusal.value.stderr


def test_the_namespace_enforces_restricted_and_the_engine_passes(
    installation: Installation, smollm2: Deployment
) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "careless"},
        "spec": {"containers": [{"name": "c", "image": installation.images["client"]}]},
    }
    with pytest.raises(CommandFailed) as refusal:
        installation.cluster.apply(pod, namespace=smollm2.namespace)
    assert 'violates PodSecurity "restricted' in refusal.value.stderr
    engine = smollm2.pods()[-1]
    assert smollm2.exec_in(engine, "python", "-c", "import os; print(os.getuid())").strip() == "65532"
    with pytest.raises(CommandFailed) as refusal:
        smollm2.exec_in(engine, "python", "-c", "open('/opt/toka/written', 'w')")
    assert "Read-only file system" in refusal.value.stderr


def test_deleting_it_leaves_nothing(installation: Installation, namespace: str) -> None:
    cluster = installation.cluster
    smollm2 = installation.deploy(namespace, replicas=2, rollout={"drainTimeoutSeconds": 5})

    def engines_run() -> bool:
        return [pod["status"].get("phase") for pod in smollm2.pods()] == ["Running"] * 2

    cluster.wait_for(engines_run, f"two engines to have begun: {smollm2.explain}")
    kinds = "pods,statefulsets,services,serviceaccounts,poddisruptionbudgets,controllerrevisions,endpointslices"
    kinds += ",configmaps,secrets,persistentvolumeclaims,leases,roles,rolebindings,networkpolicies"
    ours_at_work = {each["kind"] for each in cluster.list_objects(kinds, namespace)}
    assert {"Pod", "StatefulSet", "Service", "ControllerRevision", "PodDisruptionBudget"} <= ours_at_work
    cluster.kubectl("delete", "tokadeployment", "smollm2", "--namespace", namespace)
    given = {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")}

    def only_what_a_namespace_has() -> bool:
        left = {(each["kind"], each["metadata"]["name"]) for each in cluster.list_objects(kinds, namespace)}
        return left == given

    cluster.wait_for(only_what_a_namespace_has, "everything of it to be gone", timeout_s=120)


@pytest.mark.slow
def test_while_a_node_is_dead_the_other_serves_and_takes_its_pod_over(
    installation: Installation, smollm2: Deployment
) -> None:
    """The last test of the last file: nothing that follows needs the node."""
    cluster = installation.cluster
    smollm2.patch({"scheduling": LEAVES_A_LOST_NODE_SOON})
    smollm2.scale_to(2)
    by_node = {pod["spec"]["nodeName"]: pod["metadata"]["uid"] for pod in smollm2.pods()}
    assert by_node.keys() == {"node1", "node2"}
    cluster.kill_node(2)
    cluster.wait_for_node(2, is_ready=False)
    cluster.wait_for(lambda: smollm2.read()["status"].get("readyReplicas") == 1, "the status to say that one is left")
    cluster.wait_for(smollm2.ask, "the Service to leave the dead pod out", timeout_s=120)
    smollm2.keep_asking(5)
    smollm2.wait_until_ready()
    after = {pod["metadata"]["uid"] for pod in smollm2.pods() if pod["spec"]["nodeName"] == "node1"}
    assert len(after) == 2
    assert by_node["node1"] in after
