"""`kubectl toka` as kubectl finds and runs it, against a real API server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cluster.harness.paths import REPOSITORY, tool
from tests.cluster.harness.trees import run_checked
from tests.cluster.operating import Operator


class Plugin:
    """kubectl with the plugin on its PATH, as `pip install` puts it there."""

    def __init__(self, operator: Operator, folder: Path) -> None:
        self._operator, self._folder = operator, folder
        for name, module in (("kubectl-toka", "main"), ("kubectl_complete-toka", "completion")):
            script = folder / name
            program = f"import sys; from kubectl_toka.{module} import main; sys.exit(main())"
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
            script.chmod(0o755)

    def __call__(self, *arguments: str, command: str = "kubectl") -> str:
        server = self._operator.server
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(self._folder), str(Path(tool("kubectl")).parent), os.environ["PATH"]]),
            "KUBECONFIG": str(server.kubeconfig),
            "PYTHONPATH": str(REPOSITORY / "operator"),
            "KUBECACHEDIR": str(self._folder / "cache"),
        }
        argv = [tool("kubectl"), "toka"] if command == "kubectl" else [str(self._folder / command)]
        return run_checked([*server.enter_network(), *argv, *arguments], None, 120.0, environment)


@pytest.fixture
def toka(operator: Operator, tmp_path: Path) -> Plugin:
    return Plugin(operator, tmp_path)


def test_the_plugin_shows_restarts_and_rolls_back_an_object(operator: Operator, toka: Plugin) -> None:
    where = ("-n", operator.namespace)
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    (first,) = operator.sets("chat")
    shown = toka("status", *where)
    head, condition, *_ = shown.splitlines()
    assert head == f"{operator.namespace}/chat  Running  2/2 ready  builtin://smollm2"
    assert condition.startswith("├── Ready: AllAvailable")
    assert f"revision {first} (current)  2/2 ready  engine:1" in shown
    assert f"pod chat-{first}-0  ready  " in shown

    assert toka("restart", "chat", *where) == "chat restarts\n"
    second = operator.wait_until_ready("chat")["status"]["currentRevision"]
    assert second != first
    lines = [line.split() for line in toka("history", "chat", *where).splitlines()]
    assert [(line[1], line[2]) for line in lines[1:]] == [(second, "now"), (first, "yes")]

    assert toka("rollback", "chat", *where) == f"chat goes back to revision {first} (number 1)\n"
    found = operator.wait_until_ready("chat")
    assert found["status"]["currentRevision"] == first
    assert "annotations" not in found["spec"].get("podTemplate", {})
    assert found["spec"]["replicas"] == 2

    names = toka(*where, "status", "", command="kubectl_complete-toka")
    assert names == "chat\n:4\n"


def test_a_rollback_in_the_middle_of_a_rollout_uses_the_pods_that_still_serve(operator: Operator, toka: Plugin) -> None:
    operator.apply("chat", replicas=2)
    operator.wait_until_ready("chat")
    (first,) = operator.sets("chat")
    before = {pod["metadata"]["uid"] for pod in operator.pods("chat")}
    operator.patch("chat", podTemplate={"annotations": {"simulated.toka.dev/hold": "true"}})
    operator.wait_for(lambda: len(operator.sets("chat")) == 2, "the revision that never gets ready")
    toka("rollback", "chat", "--to", first, "-n", operator.namespace)
    operator.wait_until_ready("chat")
    staying = [pod["metadata"] for pod in operator.pods("chat") if not pod["metadata"].get("deletionTimestamp")]
    assert {metadata["uid"] for metadata in staying} == before
