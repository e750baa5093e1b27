"""An upgrade from the first version to this one, and back, restarts nothing: no pod's uid changes.

`former/version-0.1.0.tar.xz` has the chart and the operator of commit 8bba58a, which was the first with a chart, as
`git archive` writes them: a clone without history can run this, too.
"""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed
from tests.cluster.harness.paths import REPOSITORY
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.operating import ACCOUNT, CHART, SYSTEM, USER, WRITING_VERBS, deployment, start_operator

FORMER = Path(__file__).parent / "former" / "version-0.1.0.tar.xz"
SETTLED_S = 6.0
"""Long enough for many passes: an operator that takes pods for others replaces them in its first one."""
CPU: dict[str, Any] = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}}
QUICK = {"rollout": {"minReadySeconds": 0}}
OBJECTS: dict[str, dict[str, Any]] = {
    "plain": {"model": {"source": "builtin://smollm2"}},
    "cpu": {**CPU, "replicas": 3, **QUICK},
    "hub": {
        "model": {"source": "hf://org/name", "revision": "main", "servedName": "m", "aliases": ["a", "b"]},
        "auth": {"hfTokenSecretRef": {"name": "hf"}, "apiKeySecretRef": {"name": "keys"}},
        "resources": {"device": "gpu", "memory": "16Gi", "cpu": 4},
        "engine": {"extraArgs": ["seed=1"], "env": [{"name": "A", "value": "b"}], "pageSize": 32},
        "replicas": 2,
        **QUICK,
    },
    "additions": {
        **CPU,
        "podTemplate": {
            "labels": {"team": "x"},
            "annotations": {"note": "y"},
            "volumes": [{"name": "more", "emptyDir": {}}],
            "volumeMounts": [{"name": "more", "mountPath": "/more"}],
            "sidecars": [{"name": "log", "image": "log:1", "args": ["-v"]}],
        },
        "scheduling": {"topologySpread": [{"topologyKey": "kubernetes.io/hostname"}], "tolerations": [{"key": "k"}]},
        "service": {"port": 8080, "annotations": {"a": "b"}},
        **QUICK,
    },
    "suspended": {**CPU, "suspend": True},
}


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    """An API server of its own, whose CRD changes."""
    own = ApiServer.start(f"upgrade-{os.getpid()}")
    own.create_namespace(SYSTEM, pod_security="restricted")
    own.create_namespace("apps", pod_security="restricted")
    own.simulate_nodes(2, gpus_each=32)
    yield own
    own.stop()


@pytest.fixture
def former(tmp_path: Path) -> Path:
    """The folder of the first version."""
    with tarfile.open(FORMER) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run_version(server: ApiServer, name: str, folder: Path, *values: str) -> ProcessHandle:
    """Installs the chart of a version, with what was set before, and runs its operator."""
    chart = folder / "charts" / "toka"
    keep = ("--reset-then-reuse-values", "--set", "replicas=0")
    server.helm("upgrade", "--install", "toka", str(chart), "--namespace", SYSTEM, *keep, *values)
    server.kubectl("wait", "--for=condition=Established", "crd/tokadeployments.toka.dev")
    kubeconfig = server.service_account_kubeconfig(SYSTEM, ACCOUNT)
    process = start_operator(server, kubeconfig, name, PYTHONPATH=str(folder / "operator"))
    server.wait_for(lambda: "held=True" in process.log(), f"{name} to lead")
    return process


def num_workers(server: ApiServer) -> str:
    """The value `workers`, as the installed operator gets it."""
    found = server.get("deployment", ACCOUNT, SYSTEM) or {}
    env = found["spec"]["template"]["spec"]["containers"][0]["env"]
    return next(str(each["value"]) for each in env if each["name"] == "TOKA_WORKERS")


def copy_objects(copies: int) -> dict[str, dict[str, Any]]:
    """Return so many of each kind of object, by name."""
    return {f"{name}{number or ''}": spec for name, spec in OBJECTS.items() for number in range(copies)}


def conditions_of(found: dict[str, Any]) -> dict[str, str]:
    return {each["type"]: each["status"] for each in found.get("status", {}).get("conditions", [])}


def are_ready(server: ApiServer, namespace: str = "apps", copies: int = 1) -> bool:
    found = server.list_objects("tokadeployments", namespace)
    well = {"ConfigValid": "True", "Degraded": "False"}
    wanted = {
        name: {**well, "Ready": "False" if spec.get("suspend") else "True"}
        for name, spec in copy_objects(copies).items()
    }
    seen = all(each.get("status", {}).get("observedGeneration") == each["metadata"]["generation"] for each in found)
    told = {each["metadata"]["name"]: conditions_of(each) for each in found}
    return seen and told.keys() == wanted.keys() and all(wanted[name].items() <= told[name].items() for name in wanted)


def look(server: ApiServer, namespace: str = "apps") -> dict[str, set[str]]:
    """The uids of what may not be made anew."""
    return {
        kind: {each["metadata"]["uid"] for each in server.list_objects(kind, namespace)}
        for kind in ("pods", "statefulsets", "services")
    }


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_no_pod_changes_from_the_first_version_to_this_one_and_back(
    server: ApiServer, former: Path, copies: int
) -> None:
    """Five kinds of objects, one of each or ten."""
    namespace = "apps" if copies == 1 else server.create_namespace(f"apps-{copies}", pod_security="restricted")
    process = run_version(server, f"first-{copies}", former, "--set", "workers=5")
    manifests = [deployment(name, **spec) for name, spec in copy_objects(copies).items()]
    server.apply(*manifests, namespace=namespace)
    server.wait_for(lambda: are_ready(server, namespace, copies), "all objects to be ready", timeout_s=120)
    before = look(server, namespace)
    assert len(before["pods"]) == 7 * copies
    assert process.terminate() == 0

    with pytest.raises(CommandFailed) as refusal:  # the older chart's values lack some of this one's
        server.helm("upgrade", "toka", str(CHART), "--namespace", SYSTEM, "--reuse-values")
    assert "missing properties" in refusal.value.stderr
    assert "monitoring" in refusal.value.stderr
    for name, folder in (("this", REPOSITORY), ("first-again", former), ("this-again", REPOSITORY)):
        process = run_version(server, f"{name}-{copies}", folder)
        time.sleep(SETTLED_S)
        is_well = partial(are_ready, server, namespace, copies)
        server.wait_for(is_well, f"all objects to be ready under {name}", timeout_s=60)
        assert look(server, namespace) == before, name
        assert num_workers(server) == "5", name
        assert "level=ERROR" not in process.log(), process.log(4000)
        assert "rejected=" not in process.log(), process.log(4000)
        assert process.terminate() == 0


def count_writes(server: ApiServer) -> int:
    """Writes of all operators so far, but those to the Lease."""
    events = server.audit_events(USER)
    return sum(e["verb"] in WRITING_VERBS and e["objectRef"]["resource"] != "leases" for e in events)


@pytest.mark.slow
def test_operators_of_two_versions_do_not_write_at_the_same_time(server: ApiServer, former: Path) -> None:
    """One leads and the other one waits for the Lease: a rollout of the operator's own Deployment has both."""
    process = run_version(server, "leads", REPOSITORY)
    server.apply(*[deployment(name, **spec) for name, spec in OBJECTS.items()], namespace="apps")
    server.wait_for(lambda: are_ready(server), "all objects to be ready", timeout_s=120)
    before = look(server)
    kubeconfig = server.service_account_kubeconfig(SYSTEM, ACCOUNT)
    other = start_operator(server, kubeconfig, "waits", PYTHONPATH=str(former / "operator"))
    time.sleep(SETTLED_S)
    num_writes = count_writes(server)
    time.sleep(SETTLED_S)
    assert count_writes(server) == num_writes
    assert "held=True" not in other.log()
    assert look(server) == before
    assert other.terminate() == 0
    assert process.terminate() == 0
