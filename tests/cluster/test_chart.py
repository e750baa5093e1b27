"""The chart: what it installs, what an upgrade changes, what an uninstallation keeps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed
from tests.cluster.monitors import with_pod_monitors
from tests.cluster.operating import CHART, SYSTEM, USER, deployment


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    """An API server of its own: uninstalling the chart would pull the rug from under the other tests."""
    own = ApiServer.start(f"chart-{os.getpid()}", admission=("OwnerReferencesPermissionEnforcement",))
    own.create_namespace(SYSTEM, pod_security="restricted")
    yield own
    own.stop()


def test_the_crd_is_upgraded_with_the_chart_and_kept_by_an_uninstallation(server: ApiServer, tmp_path: Path) -> None:
    server.simulate_nodes(1)
    server.helm("install", "toka", str(CHART), "--namespace", SYSTEM, "--wait", "--timeout=120s")
    server.kubectl("wait", "--for=condition=Established", "crd/tokadeployments.toka.dev")
    server.apply(deployment("kept", model={"source": "builtin://smollm2"}))
    newer = tmp_path / "toka"
    shutil.copytree(CHART, newer)
    crd = newer / "files" / "tokadeployments.yaml"
    crd.write_text(crd.read_text().replace("shortNames: [td, toka]", "shortNames: [td, toka, tokas]"))
    server.helm("upgrade", "toka", str(newer), "--namespace", SYSTEM)
    found = server.get("crd", "tokadeployments.toka.dev")
    assert found is not None
    assert found["spec"]["names"]["shortNames"] == ["td", "toka", "tokas"]
    server.helm("uninstall", "toka", "--namespace", SYSTEM)
    assert server.get("deployment", "toka-operator", SYSTEM) is None
    assert server.get("tokadeployment", "kept") is not None
    server.helm("install", "toka", str(CHART), "--namespace", SYSTEM)
    assert server.get("tokadeployment", "kept") is not None


def test_where_references_to_owners_are_enforced_the_operator_may_still_make_children(server: ApiServer) -> None:
    owner = server.get("tokadeployment", "kept")
    assert owner is not None
    reference = {"apiVersion": "toka.dev/v1alpha1", "kind": "TokaDeployment", "name": "kept", "controller": True}
    reference |= {"uid": owner["metadata"]["uid"], "blockOwnerDeletion": True}
    metadata = {"name": "child", "namespace": "default", "ownerReferences": [reference]}
    manifest = json.dumps({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
    create = ("create", f"--as={USER}", "--dry-run=server", "--validate=false", "-f", "-")
    # The admission plugin looks every half a minute what kinds there are: until then it knows no owner of a new one.
    server.wait_for(lambda: server.kubectl(*create, stdin=manifest), "a child of the TokaDeployment")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("unknown=1", "unknown"),
        ("replicas=many", "replicas"),
        ("lease.durationSeconds=0", "durationSeconds"),
        ("lease.durationSeconds=7", "lease.renewDeadlineSeconds, and that less than"),
        ("lease.retrySeconds=10", "lease.retrySeconds must be less"),
        ("image=", "image"),
        ("watchNodes=maybe", "watchNodes"),
        ("topologySpread[0].maxSkew=2", "topologyKey"),
        ("tolerations[0].keys=x", "keys"),
        ("affinity.podAfinity.a=b", "podAfinity"),
        ("monitoring.labels.a=b c", "labels"),
    ],
)
def test_a_bad_value_is_refused_by_name(server: ApiServer, setting: str, sentence: str) -> None:
    with pytest.raises(CommandFailed) as refusal:
        server.helm("template", "toka", str(CHART), "--set", setting)
    assert sentence in refusal.value.stderr


def test_the_chart_is_as_helm_wants_it(server: ApiServer) -> None:
    assert "0 chart(s) failed" in server.helm("lint", "--strict", str(CHART))


def test_the_api_server_takes_every_object_that_the_chart_can_make(server: ApiServer) -> None:
    """Strictly: a field that it does not know is an error. kubeconform would look in schemas that it downloads."""
    everything = (
        "grafana.dashboard=true,monitoring.operator=true,monitoring.labels.a=b,priorityClassName=system-node-critical"
    )
    with with_pod_monitors(server):
        for values in (everything, f"{everything},watchNamespaces={{{SYSTEM}}}"):
            rendered = server.helm("template", "toka", str(CHART), "--namespace", SYSTEM, "--set", values)
            server.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=rendered)
            kinds = {each["kind"] for each in yaml.safe_load_all(rendered) if each}
            assert {"PodMonitor", "PodDisruptionBudget", "ConfigMap", "Deployment", "Lease"} <= kinds


def test_the_operators_own_pods_are_spread_and_one_of_them_stays_in_a_drain(server: ApiServer) -> None:
    def render(kind: str, *values: str) -> list[dict[str, Any]]:
        text = server.helm("template", "toka", str(CHART), *(f"--set={value}" for value in values))
        return [each for each in yaml.safe_load_all(text) if each and each["kind"] == kind]

    (workload,) = render("Deployment")
    pod = workload["spec"]["template"]
    (budget,) = render("PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (spread,) = pod["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert spread["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert render("PodDisruptionBudget", "replicas=1") == []
    assert render("PodDisruptionBudget", "podDisruptionBudget.enabled=false") == []
    key = "topologySpread[0].topologyKey=zone"
    (workload,) = render("Deployment", key, "topologySpread[0].whenUnsatisfiable=DoNotSchedule")
    (spread,) = workload["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"]) == ("zone", 1)
    assert spread["whenUnsatisfiable"] == "DoNotSchedule"


def test_the_dashboard_comes_where_grafanas_sidecar_looks_and_only_if_asked_for(server: ApiServer) -> None:
    assert "dashboard" not in server.helm("template", "toka", str(CHART))
    values = ("--set", "grafana.dashboard=true,grafana.namespace=monitoring")
    rendered = server.helm("template", "toka", str(CHART), *values, "--show-only", "templates/dashboard.yaml")
    found = yaml.safe_load(rendered)
    assert found["metadata"]["namespace"] == "monitoring"
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["labels"]["app.kubernetes.io/part-of"] == "toka"
    (text,) = found["data"].values()
    assert json.loads(text) == json.loads((CHART / "files" / "dashboard.json").read_text())
    server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=rendered.replace("monitoring", SYSTEM))


def test_with_namespaces_to_watch_there_is_no_cluster_role(server: ApiServer) -> None:
    manifests = server.helm("template", "toka", str(CHART), "--set", "watchNamespaces={one,two}")
    assert "ClusterRoleBinding" not in manifests
    assert manifests.count("namespace: one") == 2
    assert 'value: "one,two"' in manifests


def test_two_releases_share_a_cluster_but_no_namespace(server: ApiServer) -> None:
    server.helm("uninstall", "toka", "--namespace", SYSTEM, "--ignore-not-found")
    for name in ("one", "two"):
        server.create_namespace(f"{name}-operators")
        server.create_namespace(f"{name}-models")
    switches = ("--set", "crds.install=false,replicas=0")

    def install(release: str, namespace: str, *values: str) -> None:
        server.helm("install", release, str(CHART), "--namespace", namespace, *switches, *values)

    install("same", "one-operators", "--set", "watchNamespaces={one-models},watchNodes=On")
    install("same", "two-operators", "--set", "watchNamespaces={two-models},watchNodes=On")
    for namespace in ("one", "two"):
        account = f"--as=system:serviceaccount:{namespace}-operators:same-operator"
        assert server.kubectl("auth", "can-i", "watch", "nodes", account).strip() == "yes"
    for release, namespace, values in (
        ("third", "one-operators", ("--set", "watchNamespaces={two-models}")),
        ("third", "one-operators", ()),
    ):
        with pytest.raises(CommandFailed) as refusal:
            install(release, namespace, *values)
        assert "another release (same in namespace " in refusal.value.stderr
    server.helm("upgrade", "same", str(CHART), "--namespace", "two-operators", "--reset-then-reuse-values")
    for namespace in ("one-operators", "two-operators"):
        assert server.get("lease", "same-operator", namespace) is not None
        server.helm("uninstall", "same", "--namespace", namespace)
        assert server.get("lease", "same-operator", namespace) is None


def test_a_lease_that_an_older_operator_made_is_no_obstacle(server: ApiServer) -> None:
    server.create_namespace("older")
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "old-operator"}}
    server.apply(lease, namespace="older")
    switches = ("--set", "crds.install=false,replicas=0,rbac.allowOverlap=true")
    server.helm("install", "old", str(CHART), "--namespace", "older", *switches)
    server.helm("upgrade", "old", str(CHART), "--namespace", "older", *switches)
    server.helm("uninstall", "old", "--namespace", "older")
