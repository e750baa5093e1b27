"""The answers of /livez and /readyz: liveness fails when a restart would help, readiness names what is missing."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import certifi
import kopf
import pytest
from toka_operator import handlers, runtime
from toka_operator.cluster import Page
from toka_operator.handlers import Logins
from toka_operator.runtime import Runtime
from toka_operator.settings import Settings
from toka_operator.watches import Watch

from tests.unit.operator.fakes import FakeCluster

KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1", certificate-authority: CA}}]
users: [{name: u, user: {token: t}}]
"""


@pytest.fixture
def ca_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The certificate authority's file of the kubeconfig in use."""
    path = tmp_path / "ca.crt"
    path.write_text(certifi.contents())
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG.replace("CA}", f"{path}}}"))
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    return path


def make_runtime(*namespaces: str) -> Runtime:
    return Runtime(Settings(engine_image="e", watch_namespaces=namespaces, health_port=0))


def sync(watches: list[Watch]) -> None:
    for watch in watches:
        watch.is_synced.set()


def refuse(watches: list[Watch]) -> None:
    for watch in watches:
        watch.is_refused, watch.trouble = True, "403 Forbidden: no Role"


def test_a_replica_is_ready_once_its_caches_are_filled_and_somebody_leads(ca_file: Path) -> None:
    running = make_runtime()
    assert running.describe_readiness()[0] is False
    running._election._alive_at = time.monotonic()
    is_ready, text = running.describe_readiness()
    assert (is_ready, "watch-Pod-all is filling its cache" in text) == (False, True)
    sync(running._watches[None])
    assert running.describe_readiness() == (True, "ok")


def test_no_thread_hides_an_attribute_by_which_python_knows_whether_it_lives(ca_file: Path) -> None:
    threads = Runtime(Settings(engine_image="e", health_port=0, reads_downloads=True))._threads()
    plain = {name: type(value) for name, value in vars(threading.Thread()).items() if name != "_target"}
    assert "loading-engines" in {thread.name for thread in threads}
    for thread in threads:
        found = {name: type(vars(thread)[name]) for name in plain}
        assert found == plain, thread.name


def test_a_namespace_that_is_gone_is_named_and_the_others_are_served(ca_file: Path) -> None:
    running = make_runtime("a", "b")
    running._election._alive_at = time.monotonic()
    refuse(running._watches["a"])
    assert running.describe_readiness()[0] is False, "b is not seen yet"
    sync(running._watches["b"])
    assert running.describe_readiness() == (True, "not watched: a: 403 Forbidden: no Role")
    assert running._is_seen("b")
    assert not running._is_seen("a")
    refuse(running._watches["b"])
    assert running.describe_readiness()[0] is False, "nothing is seen"


def test_a_restart_is_asked_for_only_if_it_would_help(ca_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = make_runtime()
    refuse(running._watches[None])
    assert running.describe_trouble() == "", "neither the CRD nor a right comes back by a restart"
    running._cluster.last_answer -= runtime.CA_SILENCE_S + 1
    assert running.describe_trouble() == "", "the API server is away"
    ca_file.write_text(ca_file.read_text() + "\n")
    assert "certificate authority's file changed" in running.describe_trouble()
    running._cluster.last_answer = time.monotonic()
    assert running.describe_trouble() == "", "both authorities are right for a while"
    running._watches[None][0].last_contact -= runtime.WATCH_STUCK_S + 1
    assert "watch-TokaDeployment-all hangs" in running.describe_trouble()


def test_kopf_gets_new_credentials_each_time_so_that_a_refused_token_ends_nothing(
    ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "LOGIN_PAUSE_S", 0.0)
    logins = Logins()

    async def log_in_twice() -> tuple[object, object]:
        given = {"logger": handlers.logger, "settings": kopf.OperatorSettings()}
        return await logins.log_in(**given), await logins.log_in(**given)

    first, second = asyncio.run(log_in_twice())
    assert first is not None
    assert first != second


def test_nothing_is_done_on_a_view_that_may_be_outdated_and_all_of_it_once_it_is_not(
    ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right to see pods is gone for a while: pods that were available then may have died since."""
    running = make_runtime()
    monkeypatch.setattr(running._election, "is_held", lambda: True)
    passes: list[tuple[str, str]] = []
    monkeypatch.setattr(running._reconciler, "reconcile", passes.append)
    monkeypatch.setattr(running._cluster, "list_all", lambda *_: Page([], "5"))
    metadata = {"namespace": "n", "name": "chat", "uid": "u", "resourceVersion": "7"}
    running._deployments.put({"metadata": metadata})
    sync(running._watches[None])
    (pods,) = [watch for watch in running._watches[None] if "Pod-" in watch.name]
    refuse([pods])
    running._work_on(("n", "chat"))
    assert passes == []
    pods._begin(False)
    assert running._queue.measure()[0] == 1, "asked for again"
    running._work_on(("n", "chat"))
    assert passes == [("n", "chat")]


class Leases(FakeCluster):
    def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
        return self.store(manifest)


def test_a_stop_gives_the_lease_back_though_passes_hang(ca_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API server stalls: the pod has its grace period for all workers together, and the next leader need not wait
    for the Lease to lapse."""
    monkeypatch.setattr(runtime, "STOP_LIMIT_S", 0.5)
    cluster, running, has_begun, may_end = Leases(), make_runtime(), threading.Semaphore(0), threading.Event()
    running._election.connect(cluster)  # type: ignore[arg-type]
    sync(running._watches[None])

    def hang(key: tuple[str, str]) -> None:
        has_begun.release()
        may_end.wait(60)

    monkeypatch.setattr(running._reconciler, "reconcile", hang)
    for number in range(len(running._workers)):
        running._deployments.put({"metadata": {"namespace": "n", "name": f"c{number}", "resourceVersion": "1"}})
        running._queue.add(("n", f"c{number}"))
    elected = threading.Event()
    monkeypatch.setattr(running._election, "_on_elected", elected.set)
    running._election.start()
    assert elected.wait(60)
    for worker in running._workers:
        worker.start()
    for _ in running._workers:
        assert has_begun.acquire(timeout=60)
    running.stop()
    assert all(worker.is_alive() for worker in running._workers)
    (lease,) = cluster.objects.values()
    assert lease["spec"]["holderIdentity"] == ""
    may_end.set()
