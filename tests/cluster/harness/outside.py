"""A cluster that is there already: what TOKA_TEST_KUBECONFIG names, for those who have one and no Debian machine.

Tests that only ask its API server run there: what `kubectl apply` takes and refuses. What would break or rebuild a
cluster (its API server killed, nodes simulated, its audit log read) is refused by name, so such a test fails and says
why. It leaves the CRD and the chart's roles behind.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import HarnessError
from tests.cluster.harness.handle import KubernetesHandle, Object
from tests.cluster.harness.paths import tool
from tests.cluster.harness.processes import RunFolder

VARIABLE = "TOKA_TEST_KUBECONFIG"


class OutsideServer(ApiServer):
    """Somebody's own cluster, with the rights of its kubeconfig, asked by kubectl, which knows every kind of login."""

    create_namespace = KubernetesHandle.create_namespace
    delete_namespace = KubernetesHandle.delete_namespace

    def __init__(self, kubeconfig: Path, run: RunFolder) -> None:
        self._kubeconfig = kubeconfig
        self.run = run

    @classmethod
    def connect(cls, kubeconfig: str) -> OutsideServer:
        """Return the cluster, once it answers. Raises HarnessError that names the variable."""
        path = Path(kubeconfig).expanduser()
        if not path.is_file():
            raise HarnessError(f"{VARIABLE}={kubeconfig}: there is no such file")
        run = RunFolder(f"outside-{os.getpid()}")
        run.create()
        server = cls(path, run)
        server.kubectl("get", "--raw", "/readyz")
        return server

    @property
    def kubeconfig(self) -> Path:
        return self._kubeconfig

    def kubectl_argv(self, *arguments: str, kubeconfig: Path | None = None) -> list[str]:
        """The command line of the kubectl that is there: the harness's own, or the one on PATH."""
        found = tool("kubectl") if Path(tool("kubectl")).exists() else shutil.which("kubectl")
        if found is None:
            raise HarnessError("there is no kubectl, neither of scripts/setup nor on PATH")
        return [found, f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments]

    def simulate_nodes(
        self, count: int = 1, gpus_each: int = 0, pods_each: int = 1000, simulator: str = "fake"
    ) -> NoReturn:
        _refuse("simulating nodes")

    def start_api_server(self, timeout_s: float = 60.0) -> NoReturn:
        _refuse("starting its API server")

    def stop_api_server(self) -> NoReturn:
        _refuse("killing its API server")

    def request(self, method: str, path: str, body: Object | None = None, content: str = "json") -> NoReturn:
        _refuse("asking it without kubectl")

    def audit_events(self, user: str | None = None) -> list[Object]:
        _refuse("reading its audit log")

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        _refuse("acting as the operator's service account")


def _refuse(what: str) -> NoReturn:
    raise HarnessError(f"{what} needs a cluster of the tests' own: run this test without {VARIABLE}")
