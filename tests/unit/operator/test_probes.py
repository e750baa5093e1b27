"""The answers of /livez and /readyz: liveness fails when a restart would help, readiness names what is missing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import certifi
import kopf
import pytest
from toka_operator import handlers, runtime
from toka_operator.handlers import Logins
from toka_operator.runtime import Runtime
from toka_operator.settings import Settings
from toka_operator.watches import Watch

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


def test_a_namespace_that_is_gone_is_named_and_the_others_are_served(ca_file: Path) -> None:
    running = make_runtime("a", "b")
    running._election._alive_at = time.monotonic()
    refuse(running._watches["a"])
    assert running.describe_readiness()[0] is False, "b is not seen yet"
    sync(running._watches["b"])
    assert running.describe_readiness() == (True, "not watched: a: 403 Forbidden: no Role")
    assert running._is_synced("b")
    assert not running._is_synced("a")
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
