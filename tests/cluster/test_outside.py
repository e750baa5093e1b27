"""TOKA_TEST_KUBECONFIG: tests on a cluster that is there already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.outside import OutsideServer
from tests.engine_process import ROOT


def run_tests(server: ApiServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests of this tier in a process of their own, against `server` as if it were somebody's own."""
    environment = {**os.environ, "TOKA_TEST_KUBECONFIG": str(server.kubeconfig)}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_validation_runs_there_and_what_would_rebuild_the_cluster_fails_by_name(
    api_server: ApiServer, crd: None
) -> None:
    chosen = "tests/cluster/test_validation.py"
    done = run_tests(api_server, chosen, "-k", "every_field or immutable or tpu")
    assert done.returncode == 0, done.stdout
    done = run_tests(api_server, "tests/cluster/test_spreading.py", "-x")
    assert done.returncode == 1
    assert (
        "simulating nodes needs a cluster of the tests' own: run this test without TOKA_TEST_KUBECONFIG" in done.stdout
    )


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"TOKA_TEST_KUBECONFIG=.*none: there is no such file"):
        OutsideServer.connect(str(tmp_path / "none"))
