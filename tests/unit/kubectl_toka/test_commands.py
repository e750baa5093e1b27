"""`kubectl toka`: trees, tables, rollbacks and completions, with a stand-in for kubectl."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from kubectl_toka import logs, names, top
from kubectl_toka.completion import suggest
from kubectl_toka.kubectl import Kubectl, KubectlError
from kubectl_toka.main import run
from kubectl_toka.rollouts import restore
from kubectl_toka.tree import make_tree
from toka_engine.server import metrics
from toka_operator import caches, fingerprint, podspec, resources, settings

from tests.unit.kubectl_toka.conftest import World

Json = dict[str, Any]


def deployment(**status: Any) -> Json:
    return {
        "metadata": {"name": "chat", "namespace": "apps", "generation": 2, "resourceVersion": "7"},
        "spec": {"model": {"source": "hf://org/name"}, "replicas": 2},
        "status": {"observedGeneration": 2, "phase": "Degraded", "ready": "1/2", "currentRevision": "new1", **status},
    }


def pod(revision: str, number: int, is_ready: bool, restarts: int = 0) -> Json:
    ready = {"type": "Ready", "status": "True" if is_ready else "False"}
    return {
        "metadata": {
            "name": f"chat-{revision}-{number}",
            "namespace": "apps",
            "labels": {names.REVISION_LABEL: revision},
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "engine", "image": f"engine:{revision}"}]},
        "status": {
            "phase": "Running",
            "conditions": [ready],
            "containerStatuses": [{"name": "engine", "restartCount": restarts}],
        },
    }


def condition(kind: str, status: str, reason: str, message: str = "") -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message}


FAILURE = {"pod": "chat-new1-0", "reason": "ModelNotFound", "exitCode": 3, "message": "the hub has no model org/name"}


def test_the_status_is_a_tree_with_the_causes() -> None:
    conditions = [
        condition("Ready", "False", "ModelNotFound", "pod chat-new1-0 (exit code 3): the hub has no model org/name"),
        condition("Available", "True", "MinimumAvailable", "1 pods are available, 1 are needed"),
        condition("ModelCached", "False", "Downloading", "pod chat-new1-0: 3.10 of 14.20 GB, 210 MB/s"),
    ]
    cache = {"claim": "chat-cache", "claimPhase": "Bound", "progress": "3.10 of 14.20 GB, 210 MB/s"}
    shown = deployment(conditions=conditions, failures=[FAILURE], cache=cache, url="http://chat.apps.svc/v1")
    pods = [pod("old1", 0, is_ready=True), pod("new1", 0, is_ready=False, restarts=4)]
    assert "\n".join(make_tree(shown, pods).lines()) == (
        "apps/chat  Degraded  1/2 ready  hf://org/name\n"
        "├── not Ready: ModelNotFound: pod chat-new1-0 (exit code 3): the hub has no model org/name\n"
        "├── not ModelCached: Downloading: pod chat-new1-0: 3.10 of 14.20 GB, 210 MB/s\n"
        "├── url http://chat.apps.svc/v1\n"
        "├── cache claim chat-cache Bound  3.10 of 14.20 GB, 210 MB/s\n"
        "├── revision new1 (current)  0/1 ready  engine:new1\n"
        "│   └── pod chat-new1-0  not ready  node-1  4 restarts\n"
        "│       └── ModelNotFound (exit code 3): the hub has no model org/name\n"
        "└── revision old1  1/1 ready  engine:old1\n"
        "    └── pod chat-old1-0  ready  node-1"
    )


def test_a_spec_that_the_operator_has_not_seen_is_marked() -> None:
    first = next(iter(make_tree(deployment(observedGeneration=1), []).lines()))
    assert "the operator has not seen this spec yet" in first


def test_a_rollback_restores_what_alters_the_pod_and_nothing_else() -> None:
    now = {
        "model": {"source": "hf://org/new"},
        "engine": {"image": "new:1"},
        "replicas": 5,
        "service": {"port": 81},
        "rollout": {"maxSurge": 2, "drainTimeoutSeconds": 60},
    }
    kept = {"model": {"source": "hf://org/old"}, "rollout": {"drainTimeoutSeconds": 120}}
    assert restore(now, kept) == {
        "model": {"source": "hf://org/old"},
        "replicas": 5,
        "service": {"port": 81},
        "rollout": {"maxSurge": 2, "drainTimeoutSeconds": 120},
    }


def test_a_rollback_shrinks_no_claim_and_leaves_what_alters_no_pod() -> None:
    shared = {"type": "SharedPVC", "accessMode": "ReadWriteMany"}
    now = {
        "model": {"source": "hf://org/new"},
        "cache": {**shared, "size": "200Gi"},
        "scheduling": {"patienceSeconds": 60, "nodeSelector": {"a": "b"}},
    }
    kept = {"model": {"source": "hf://org/old"}, "cache": {**shared, "size": "100Gi", "retention": "Delete"}}
    restored = restore(now, {**kept, "scheduling": {"patienceSeconds": 300}})
    assert restored["cache"] == {**shared, "size": "200Gi"}
    assert restored["scheduling"] == {"patienceSeconds": 60}
    assert restore(now, kept)["scheduling"] == {"patienceSeconds": 60}
    assert (
        restore({"cache": {"type": "Ephemeral", "size": "2Gi"}}, {"cache": {"size": "1Gi"}})["cache"]["size"] == "1Gi"
    )


def test_the_plugin_and_the_operator_use_the_same_names() -> None:
    assert f"{settings.PLURAL}.{settings.GROUP}" == names.RESOURCE
    ours = (names.REVISION_LABEL, names.SPEC_ANNOTATION, names.SERVED_ANNOTATION)
    assert ours == (settings.REVISION_LABEL, settings.SPEC_ANNOTATION, settings.SERVED_ANNOTATION)
    assert names.ENGINE_CONTAINER == podspec.ENGINE_CONTAINER
    assert names.POD_FIELDS == fingerprint.POD_FIELDS
    assert names.POD_ROLLOUT_FIELDS == fingerprint.POD_ROLLOUT_FIELDS
    assert names.NOT_POD_SCHEDULING_FIELDS == fingerprint.NOT_POD_SCHEDULING_FIELDS
    assert (names.SHARED_PVC, names.CLAIM_FIELDS) == (caches.SHARED_PVC, fingerprint.CLAIM_FIELDS)
    labels = resources.selector_labels("chat")
    assert dict(pair.split("=") for pair in names.pod_selector("chat").split(",")) == labels


def test_the_columns_of_top_are_metrics_of_the_engine() -> None:
    assert {metric.removeprefix("toka_") for metric in top.COLUMNS.values()} <= metrics.GAUGES.keys()


METRICS = """\
# TYPE toka_running gauge
toka_running 3.0
toka_waiting 12.0
toka_kv_pages_total 1000.0
toka_kv_pages_used 250.0
"""


def test_top_has_a_line_for_each_pod_also_for_one_that_does_not_answer(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.answers["get tokadeployments.toka.dev chat"] = deployment()
    world.answers["get pods --selector"] = {"items": [pod("new1", 0, True), pod("new1", 1, False)]}
    world.answers["pods/http:chat-new1-0:10210/proxy/metrics"] = METRICS
    set_environment(world, monkeypatch)
    assert run(["top", "chat"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["POD", "RUNNING", "WAITING", "KV-USED", "KV-TOTAL"],
        ["chat-new1-0", "3", "12", "250", "1000"],
        ["chat-new1-1", "-", "-", "-", "-"],
    ]


def test_logs_of_all_pods_have_their_names(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.answers["get tokadeployments.toka.dev chat"] = deployment()
    world.answers["get pods --selector"] = {
        "items": [pod("new1", 0, True), pod("new1", 1, False), pod("new1", 2, True)]
    }
    world.answers["logs chat-new1-0"] = "one\ntwo"
    world.answers["logs chat-new1-2"] = "three"
    set_environment(world, monkeypatch)
    assert run(["-n", "apps", "logs", "chat", "--tail", "5"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "chat-new1-0 one\nchat-new1-0 two\nchat-new1-2 three\n"
    assert "chat-new1-1: Error from server" in printed.err
    assert all(call.startswith("--namespace=apps ") for call in world.calls())
    assert "--namespace=apps logs chat-new1-0 --container=engine --tail=5" in world.calls()


class EndingWatches(Kubectl):
    """A cluster that ends each watch of pods in order, and refuses the third."""

    def __init__(self) -> None:
        super().__init__([])
        self.asked: list[str] = []

    def argv(self, *arguments: str) -> list[str]:
        self.asked.append(" ".join(arguments[:2]))
        number = self.asked.count("get pods")
        if arguments[0] == "logs":
            return ["true"]
        return ["sh", "-c", f"echo chat-{number}" if number < 3 else "echo gone >&2; exit 1"]


def test_followed_logs_go_on_when_the_api_server_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_AGAIN_S", 0.0)
    kubectl = EndingWatches()
    with pytest.raises(KubectlError, match="gone"):
        logs.Follower(kubectl, "chat", 10, io.StringIO()).run()
    assert kubectl.asked == ["get pods", "logs chat-1", "get pods", "logs chat-2", "get pods"]


def test_an_object_that_is_not_there_is_an_error_in_kubectls_words(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_environment(world, monkeypatch)
    assert run(["status", "absent"]) == 1
    assert capsys.readouterr().err.startswith("error: Error from server (NotFound)")


@pytest.mark.parametrize(
    "arguments",
    [["status", "--", "--all-namespaces"], ["history", "a,b"], ["top", "Chat"], ["logs", "chat", "-f", "-p"]],
)
def test_what_kubectl_would_take_for_something_else_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    set_environment(world, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 2
    assert not (world.folder / "calls").exists(), "nothing is asked"


def test_without_kubectl_the_error_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECTL", str(tmp_path / "absent"))
    assert run(["status"]) == 1
    assert "set KUBECTL" in capsys.readouterr().err


def test_the_tab_key_knows_commands_objects_and_revisions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = {"metadata": {"labels": {names.REVISION_LABEL: "old1"}}, "revision": 3}
    world.answers["-n apps get tokadeployments.toka.dev"] = {"items": [deployment(), {"metadata": {"name": "other"}}]}
    world.answers["get controllerrevisions"] = {"items": [revision]}
    world.answers["get namespaces"] = {"items": [{"metadata": {"name": "apps"}}, {"metadata": {"name": "b"}}]}
    set_environment(world, monkeypatch)
    assert [one.split("\t")[0] for one in suggest(["ro"])] == ["rollback"]
    assert len(suggest([""])) == 7
    assert suggest(["-n", "apps", "status", ""]) == ["chat", "other"]
    assert suggest(["status", "-n", "apps", "c"]) == ["chat"]
    assert suggest(["status", "-n", "a"]) == ["apps"]
    assert suggest(["--context", "far", "-n", "a"]) == ["apps"]
    assert world.calls()[-1].startswith("--context far get namespaces")
    assert suggest(["rollback", "chat", "--to", ""]) == ["old1\tnumber 3"]
    assert suggest(["logs", "chat", "--tail", ""]) == []
    assert suggest(["status", "chat", ""]) == []
    assert suggest([]) == suggest([""])


def test_the_tab_key_is_silent_where_the_cluster_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(world, monkeypatch)
    assert suggest(["status", ""]) == []


def set_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
