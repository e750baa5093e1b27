"""The harness itself: what it starts works, what it stops is gone, and what a crash leaves is cleaned up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed, WaitTimeout
from tests.cluster.harness.node import make_control_group
from tests.cluster.harness.paths import REPOSITORY, run_root
from tests.cluster.harness.processes import RunFolder, control_group_prefix, control_groups, start_time_of, sweep
from tests.cluster.harness.tools import find_pip, unmount_below
from tests.cluster.harness.trees import Network, add_bridge, run_checked


def test_objects_survive_a_restart_of_the_api_server(api_server: ApiServer, namespace: str) -> None:
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}, "data": {"a": "b"}}
    api_server.apply(config, namespace=namespace)
    api_server.restart_api_server()
    kept = api_server.get("configmap", "kept", namespace)
    assert kept is not None
    assert kept["data"] == {"a": "b"}


def test_a_refusal_carries_the_servers_sentence(api_server: ApiServer, namespace: str) -> None:
    with pytest.raises(CommandFailed) as refusal:
        api_server.kubectl("create", "namespace", namespace)
    assert "already exists" in refusal.value.stderr


def test_a_wait_that_fails_says_what_for_and_shows_logs(api_server: ApiServer) -> None:
    with pytest.raises(WaitTimeout, match="a thing that never comes") as failure:
        api_server.wait_for(lambda: None, "a thing that never comes", timeout_s=0.1)
    assert "kube-apiserver.log" in str(failure.value)


def test_the_audit_log_tells_who_asked_what(api_server: ApiServer, namespace: str) -> None:
    api_server.kubectl("create", "serviceaccount", "curious", "--namespace", namespace)
    kubeconfig = api_server.service_account_kubeconfig(namespace, "curious")
    with pytest.raises(CommandFailed) as refusal:
        api_server.kubectl("get", "pods", "--namespace", namespace, kubeconfig=kubeconfig)
    assert "forbidden" in refusal.value.stderr
    user = f"system:serviceaccount:{namespace}:curious"
    requests = [
        (event["verb"], event["objectRef"]["resource"], event["responseStatus"]["code"])
        for event in api_server.audit_events(user)
    ]
    assert ("list", "pods", 403) in requests


def test_pods_of_simulated_nodes_become_ready_or_wait_as_told(api_server: ApiServer, namespace: str) -> None:
    api_server.simulate_nodes(2, gpus_each=4)
    for name, notes in (("ready", {}), ("held", {"simulated.toka.dev/hold": "true"})):
        template = {
            "metadata": {"labels": {"app": name}, "annotations": notes},
            "spec": {
                "containers": [
                    {"name": "c", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "1"}}},
                ]
            },
        }
        spec = {
            "replicas": 2,
            "serviceName": name,
            "selector": {"matchLabels": {"app": name}},
            "podManagementPolicy": "Parallel",
            "template": template,
        }
        stateful_set = {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": name},
            "spec": spec,
        }
        api_server.apply(stateful_set, namespace=namespace)

    def ready_pods() -> bool:
        found = api_server.get("statefulset", "ready", namespace)
        return found is not None and found["status"].get("readyReplicas") == 2

    api_server.wait_for(ready_pods, "two ready pods")
    api_server.wait_for(
        lambda: len(api_server.list_objects("pods", namespace, "app=held")) == 2, "the held pods to exist"
    )
    held = api_server.list_objects("pods", namespace, "app=held")
    assert {pod["status"]["phase"] for pod in held} == {"Pending"}
    api_server.kubectl("delete", "statefulset", "--all", "--namespace", namespace)
    api_server.wait_for(lambda: not api_server.list_objects("pods", namespace), "the pods to go")


def test_a_session_that_is_killed_leaves_no_process() -> None:
    script = (
        "import os, signal\n"
        "from tests.cluster.harness.api_only import ApiServer\n"
        "server = ApiServer.start('killed-session')\n"
        "print(*(handle.pid for handle in server.run.processes.values()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    sweep()
    assert [pid for pid in pids if start_time_of(pid) is not None] == []
    assert not (run_root() / "killed-session").exists()


def test_sessions_that_begin_together_do_not_trip_over_what_the_dead_left(tmp_path: Path) -> None:
    """Each ends and removes what the dead left, and takes the name of one of them."""
    root, names = tmp_path / "cluster" / "run", [f"left-{os.getpid()}-{number}" for number in range(6)]
    script = (
        "import sys\n"
        "from tests.cluster.harness.processes import RunFolder\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "RunFolder(sys.argv[1], is_kept=True).create()\n"
    )
    sessions: list[subprocess.Popen[str]] = []
    try:
        for name in names:
            (root / name).mkdir(parents=True)
            (root / name / "owner.json").write_text("[1, -1]")
            make_control_group(f"{control_group_prefix(name)}node1")
            for pod in range(20):
                (control_groups(name)[0] / "pods" / str(pod)).mkdir(parents=True)
            session = subprocess.Popen(
                [sys.executable, "-c", script, name],
                cwd=REPOSITORY,
                env=os.environ | {"TOKA_CACHE_DIR": str(tmp_path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            sessions.append(session)
        for session in sessions:
            assert session.stdout is not None
            assert session.stdout.readline() == "ready\n"
        for session in sessions:
            assert session.stdin is not None
            session.stdin.close()
        assert [session.wait(60) for session in sessions] == [0] * len(names)
        owners = {folder.name: (folder / "owner.json").read_text() for folder in root.iterdir()}
        assert owners == dict.fromkeys(names, "null")
        assert [control_groups(name) for name in names] == [[]] * len(names)
    finally:
        for session in sessions:
            session.kill()
        for name in names:
            RunFolder(name).stop()


def test_a_pid_given_to_another_process_is_never_touched() -> None:
    run = RunFolder("reused-pid")
    run.create()
    bystander = run.spawn("bystander", ["sleep", "60"])
    try:
        started = start_time_of(bystander.pid)
        assert started is not None
        (run.path / "processes.jsonl").write_text(f'["other", {bystander.pid}, {started - 1}]\n')
        RunFolder("reused-pid").stop()
        assert bystander.is_running()
    finally:
        bystander.kill()
        run.stop()


def test_a_pod_keeps_its_gateway_while_others_come_and_go() -> None:
    run = RunFolder("bridge")
    run.create()
    try:
        node, pod = Network.create(run, "node"), Network.create(run, "pod")
        add_bridge(node, "toka0", "10.244.9.1/24")
        node.ip("link", "add", "pod", "master", "toka0", "up", "type", "veth", "peer", "eth0", "netns", str(pod.pid))
        pod.ip("addr", "add", "10.244.9.10/24", "dev", "eth0")
        pod.ip("link", "set", "eth0", "up")

        def reaches_gateway() -> bool:
            """Nothing listens there, so it is the gateway that refuses; without an answer this takes a second."""
            knock = "import socket; s = socket.socket(); s.settimeout(1); print(s.connect_ex(('10.244.9.1', 1)))"
            return int(run_checked([*pod.enter(), sys.executable, "-c", knock])) == errno.ECONNREFUSED

        assert reaches_gateway()
        lower = ["address", "02:00:00:00:00:01"]  # than any address that is drawn at random
        node.ip("link", "add", "other", *lower, "master", "toka0", "up", "type", "veth", "peer", "its-pod")
        assert reaches_gateway()
        node.ip("link", "del", "other")
        assert reaches_gateway()
    finally:
        run.stop()


def test_what_is_mounted_in_a_cache_is_unmounted_and_nothing_else(tmp_path: Path) -> None:
    cache, beside = tmp_path / "a cache", tmp_path / "a cache of others"
    inner = cache / "storage" / "merged"
    for folder in (inner, beside):
        folder.mkdir(parents=True)
    for place in (cache / "storage", inner, beside):
        subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        unmount_below(cache)
        found = [subprocess.run(["mountpoint", "-q", place]).returncode == 0 for place in (inner, inner.parent, beside)]
        assert found == [False, False, True]
    finally:
        subprocess.run(["umount", beside], check=True)


def test_a_machine_whose_python_has_no_pip_is_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's has none, and that of an environment made by uv; without Go, it has to be installed all the same."""
    monkeypatch.setenv("TOKA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pip" else find_spec(name))
    for _ in range(2):  # made, and found again
        pip = find_pip()
        assert Path(pip[0]).is_relative_to(tmp_path)
        assert subprocess.run([*pip, "--version"], check=True, capture_output=True, text=True).stdout.startswith("pip ")
