"""The chart allows the operator the rights that it uses, and no more, cluster-wide and in single namespaces."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.harness.errors import WaitTimeout
from tests.cluster.operating import CHART, EVERY_CHILD, SYSTEM, Json, Operator, probe, revision_of, unrelated_objects


@pytest.fixture
def operator(without_operator: Operator, pod_monitors: None, gateway_kinds: None) -> Iterator[Operator]:
    """The test reads what its operator did when that has ended, so it has its own."""
    without_operator.start(TOKA_POD_MONITORS="true", TOKA_ROUTES="true", TOKA_WATCH_NODES="true")
    yield without_operator
    without_operator.stop()


ROUTING: Json = {
    "inferencePool": {"endpointPickerRef": {"name": "picker"}},
    "httpRoute": {"parentRefs": [{"name": "web"}]},
}
NEVER_REQUESTED = {("update", "tokadeployments/finalizers")}
"""Rights that an admission plugin of the API server asks for (test_chart); no request is made with them."""


def granted(operator: Operator, kind: str, *values: str) -> set[tuple[str, str]]:
    """(verb, resource) of the chart's role for the operator's work, and of the one for nodes."""
    manifests = yaml.safe_load_all(operator.server.helm("template", "toka", str(CHART), *values))
    roles = [m for m in manifests if m and m["kind"] == kind]
    ours = [
        role
        for role in roles
        if role["metadata"]["labels"]["app.kubernetes.io/component"] in ("operator", "nodes")
        and not role["metadata"]["name"].endswith("-lease")
    ]
    assert len([role for role in ours if not role["metadata"]["name"].endswith("-nodes")]) == 1
    rules = [rule for role in ours for rule in role["rules"]]
    return {(verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


def used(operator: Operator) -> set[tuple[str, str]]:
    about_nodes = [
        e for e in operator.server.audit_events(operator.user) if e.get("objectRef", {}).get("resource") == "nodes"
    ]
    events = [e["objectRef"] | {"verb": e["verb"]} for e in [*operator.audit_events(), *about_nodes]]
    found = {(e["verb"], "/".join(filter(None, (e["resource"], e.get("subresource"))))) for e in events}
    return {(verb, resource) for verb, resource in found if resource != "leases"}


def lose_node_of_a_pod(operator: Operator) -> None:
    """A pod is told to go, and its kubelet no longer answers: the operator deletes it for good."""
    operator.wait_until_ready("chat")
    pod = operator.pods("chat")[0]["metadata"]
    operator.keep_pod(pod["name"])
    operator.lose_pod(pod["name"])
    operator.wait_for(lambda: ("delete", "pods") in operator.requests(), "the pod to be deleted for good")
    operator.release_pod(pod["name"])
    operator.wait_until_ready("chat")


def exceed_quota_twice(operator: Operator) -> None:
    """A pod may not be made: the operator lists the events that say why, and counts its own event up."""
    operator.kubectl("create", "quota", "few", "--hard=pods=2")
    for replicas in (3, 2, 3, 2):
        operator.scale("chat", replicas)
        operator.wait_for_condition("chat", "Degraded", "True" if replicas == 3 else "False")
    operator.kubectl("delete", "quota", "few")


def use_every_right(operator: Operator) -> None:
    """Does to one TokaDeployment all that an operator does in its life."""
    spec = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}}
    name = f"chat-{revision_of(spec)}"
    metadata = {"name": "chat"}
    pool = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": metadata}
    picked = {"targetPorts": [{"number": 1}], "endpointPickerRef": {"name": "x", "port": {"number": 1}}}
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": metadata}
    taken = unrelated_objects("chat", revision_of(spec)) | {
        ("podmonitor", "chat"): {**monitor, "spec": {"selector": {}}},
        ("inferencepool", "chat"): {**pool, "spec": {"selector": {"matchLabels": {"app": "x"}}, **picked}},
        ("httproute", "chat"): {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": metadata,
            "spec": {},
        },
    }
    operator.server.apply(*taken.values(), namespace=operator.namespace)
    operator.expected.append("event=name_taken")
    operator.apply("chat", replicas=2, rollout={"revisionHistoryLimit": 0}, routing=ROUTING, **EVERY_CHILD)
    operator.wait_for_condition("chat", "Degraded", "True", "NameTaken")
    for kind, child in taken:
        operator.delete_and_wait(kind, child)
    operator.wait_until_ready("chat")
    for kind, child in taken:
        operator.edit(kind, child, {"metadata": {"labels": {"app.kubernetes.io/managed-by": "other"}}})
        operator.wait_for(
            lambda kind=kind, child=child: (
                operator.require(kind, child)["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "toka-operator"
            ),
            f"{kind} {child} to be found and put back",
        )
    operator.delete_and_wait("service", "chat")
    lose_node_of_a_pod(operator)
    exceed_quota_twice(operator)
    off = {"podDisruptionBudget": "Off"}
    gone = {**dict.fromkeys(EVERY_CHILD), "routing": None, "monitoring": {"podMonitor": "Off"}, "disruption": off}
    operator.patch("chat", replicas=1, engine={"pageSize": 32}, **gone)
    for kind in ("pdb", "networkpolicy", "podmonitor", "inferencepool", "httproute", "hpa"):
        operator.wait_for(lambda kind=kind: operator.get(kind, "chat") is None, f"the {kind} to go")
    operator.wait_for(lambda: operator.get("controllerrevision", name) is None, "the old revision to go")
    operator.wait_until_ready("chat")
    keep_data_in_a_claim(operator)


def keep_data_in_a_claim(operator: Operator) -> None:
    """The claim's name is taken (it is read), then free (it is made), and the claim gets an owner (it is patched)."""
    size = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": "chat-data"}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": size}
    operator.server.apply(claim, namespace=operator.namespace)
    operator.patch("chat", data={"size": "1Gi"})
    operator.wait_for_condition("chat", "Degraded", "True", "NameTaken")
    operator.delete_and_wait("persistentvolumeclaim", "chat-data")
    operator.wait_for(lambda: operator.get("persistentvolumeclaim", "chat-data"), "the claim to be made")
    operator.patch("chat", data={"retention": "Delete"})
    operator.wait_for(
        lambda: operator.require("persistentvolumeclaim", "chat-data")["metadata"].get("ownerReferences"),
        "the claim to have its owner",
    )


def check_rights(operator: Operator, allowed: set[tuple[str, str]]) -> None:
    operator.processes[0].terminate()
    allowed = allowed - NEVER_REQUESTED
    with contextlib.suppress(WaitTimeout):  # watches are recorded when they end, a moment after the operator did
        operator.wait_for(lambda: used(operator) >= allowed, "all that is granted to be in the audit log", timeout_s=20)
    assert used(operator) == allowed


def test_every_verb_that_the_chart_grants_is_used_and_none_is_missing(operator: Operator) -> None:
    use_every_right(operator)
    check_rights(operator, granted(operator, "ClusterRole"))


def only_namespace(operator: Operator) -> tuple[str, str]:
    return ("--set", f"watchNamespaces={{{operator.namespace}}}")


def install_for_namespace(operator: Operator) -> str:
    """Install one more release of the chart that serves the test's namespace alone, whose account the test's operators
    then have. Return the release's name."""
    release = f"tenant-{operator.namespace[-6:]}"
    switches = ("--set", "replicas=0,crds.install=false,rbac.allowOverlap=true")
    only = only_namespace(operator)
    operator.server.helm("install", release, str(CHART), "--namespace", SYSTEM, *switches, *only)
    operator.user = f"system:serviceaccount:{SYSTEM}:{release}-operator"
    operator.kubeconfig = operator.server.service_account_kubeconfig(SYSTEM, f"{release}-operator")
    return release


def test_in_single_namespaces_too_every_verb_is_used_and_none_is_missing(
    without_operator: Operator, pod_monitors: None, gateway_kinds: None
) -> None:
    operator = without_operator
    release, only = install_for_namespace(operator), only_namespace(operator)
    operator.start(TOKA_LEASE_NAME=f"{release}-operator", TOKA_POD_MONITORS="true", TOKA_ROUTES="true")
    use_every_right(operator)
    check_rights(operator, granted(operator, "Role", *only))
    operator.check_log()
    operator.server.helm("uninstall", release, "--namespace", SYSTEM)
    assert operator.server.get("lease", f"{release}-operator", SYSTEM) is None


def test_an_operator_that_may_not_see_nodes_works_as_if_none_was_cordoned(without_operator: Operator) -> None:
    operator = without_operator
    release = install_for_namespace(operator)
    operator.expected.append("watch=watch-Node-all event=broken .*403")
    process = operator.start(TOKA_LEASE_NAME=f"{release}-operator", TOKA_WATCH_NODES="true")
    operator.apply("chat")
    operator.wait_until_ready("chat")
    assert operator.get("pdb", "chat") is None
    assert operator.require("td", "chat")["status"]["reason"] == "Complete"
    port = int(re.search(r"health_port=(\d+)", process.log())[1])  # type: ignore[index]
    status, text = probe(port, "/readyz")
    assert (status, "cordoned nodes are not seen: 403" in text) == (200, True), text
    assert process.terminate() == 0
    operator.check_log()
    operator.server.helm("uninstall", release, "--namespace", SYSTEM)
