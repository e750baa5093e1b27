"""etcd is restored from a backup while the operator runs: everything has an older version than it has seen."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.operating import Operator, end_operator, install, start_operator

TOLD_WITHIN_S = 120.0
"""The promise is 30 s; four times as wide on shared processors."""


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """One of the test's own: what else watches it is deaf after a restore, too."""
    started = ApiServer.start("restored")
    yield started
    started.stop()


def take_down(server: ApiServer) -> Path:
    """Stop the API server and etcd, and return the folder of etcd's data."""
    server.stop_api_server()
    server.kill_control("etcd")
    return server.run.path / "etcd"


def bring_up(server: ApiServer) -> None:
    server.spawn_control("etcd", server.control.etcd())
    server.start_api_server()


def port_of(operator: Operator, name: str) -> int | None:
    found = operator.get("service", name)
    return None if found is None else int(found["spec"]["ports"][0]["port"])


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_after_etcd_was_restored_changes_are_seen_without_a_restart(server: ApiServer, tmp_path: Path) -> None:
    """The API server answers a watch from a version that is yet to come, and says nothing until that is reached."""
    kubeconfig = install(server)
    operator = Operator(server, kubeconfig, server.create_namespace("restored"))
    process = start_operator(server, kubeconfig, "restored-0")
    operator.apply("chat", suspend=True, service={"port": 81})
    operator.wait_for(lambda: port_of(operator, "chat") == 81, "the Service")
    shutil.copytree(take_down(server), tmp_path / "backup")
    bring_up(server)
    operator.apply("lost", suspend=True)
    for port in range(100, 140):
        operator.patch("chat", service={"port": port})
    operator.wait_for(lambda: port_of(operator, "chat") == 139 and port_of(operator, "lost"), "the newer versions")
    data = take_down(server)
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "backup", data)
    bring_up(server)
    began = time.monotonic()
    assert port_of(operator, "chat") == 81
    operator.apply("new", suspend=True)
    operator.patch("chat", service={"port": 82})

    def is_seen() -> bool:
        return port_of(operator, "chat") == 82 and port_of(operator, "new") is not None

    operator.wait_for(is_seen, "a change and a new object after the restore", timeout_s=TOLD_WITHIN_S)
    print(f"seen {time.monotonic() - began:.1f} s after the restore")
    assert "event=went_back" in process.log()
    assert end_operator(server, process) == 0
