"""A real API server without nodes: etcd, kube-apiserver and controller-manager on free loopback ports.

It needs no namespaces, so Python's kubernetes client in the test process can talk to it directly. Nothing
runs pods unless `simulate_nodes` is called: then the scheduler and kwok bind pods and report them Ready.
Pods can also be given any status by hand (`request`, or a client). A kubectl costs a tenth of a second of CPU, so
what tests do often is asked for by `request`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import urllib3

from tests.cluster.harness.control import FEATURE_GATES, SERVICE_NAMES, ControlPlane
from tests.cluster.harness.errors import CommandFailed
from tests.cluster.harness.handle import KubernetesHandle, Object
from tests.cluster.harness.kwok import write_kwok_configuration
from tests.cluster.harness.paths import tool
from tests.cluster.harness.pki import Pki
from tests.cluster.harness.processes import RunFolder
from tests.cluster.harness.tools import require_tools


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on at this moment, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


class ApiServer(KubernetesHandle):
    """etcd, kube-apiserver and controller-manager; optionally simulated nodes."""

    @classmethod
    def start(
        cls, name: str | None = None, admission: tuple[str, ...] = (), feature_gates: str = FEATURE_GATES
    ) -> ApiServer:
        """Boot one, with these admission plugins besides the usual; ready for requests when this returns."""
        require_tools("etcd", "kubernetes")
        run = RunFolder(name or f"api-{os.getpid()}")
        run.create()
        api_port, etcd_port, etcd_peer_port, manager_port = free_ports(4)
        pki = Pki(run.path / "pki", f"https://127.0.0.1:{api_port}")
        pki.create([*SERVICE_NAMES, "DNS:localhost", "IP:127.0.0.1"])
        ports = (api_port, etcd_port, etcd_peer_port)
        control = ControlPlane(run.path, pki, "127.0.0.1", None, *ports, admission, feature_gates)
        control.issue_component_keys()
        server = cls(run, control)
        try:
            server.spawn_control("etcd", control.etcd())
            server.start_api_server()
            server.spawn_control("kube-controller-manager", control.controller_manager(manager_port))
            server.wait_for(
                lambda: server.get("serviceaccount", "default"),
                "the controller-manager to make service accounts",
            )
        except BaseException:
            server.stop()
            raise
        return server

    # ---- requests of the administrator's

    @cached_property
    def _pool(self) -> urllib3.PoolManager:
        pki = self.control.pki
        certificate, key, authority = (pki.file(name) for name in ("admin.crt", "admin.key", "ca.crt"))
        return urllib3.PoolManager(cert_file=certificate, key_file=key, ca_certs=authority, maxsize=8, retries=False)

    def request(self, method: str, path: str, body: Object | None = None, content: str = "json") -> Object:
        """Return the answer to one request; `content` says what the body is ("merge-patch+json"). Raises CommandFailed
        with the API server's sentence."""
        url = f"https://127.0.0.1:{self.control.api_port}{path}"
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": f"application/{content}", "Accept": "application/json"}
        try:
            answer: Any = self._pool.request(method, url, body=data, headers=headers, timeout=60.0)
        except urllib3.exceptions.HTTPError as error:
            raise CommandFailed([method, path], 1, "", str(error)) from error
        if answer.status >= 400:
            raise CommandFailed([method, path], answer.status, "", answer.data.decode(errors="replace"))
        found: Object = json.loads(answer.data)
        return found

    def find(self, path: str) -> Object | None:
        """Return the object at a path; None if there is none."""
        try:
            return self.request("GET", path)
        except CommandFailed as error:
            if error.returncode == 404:
                return None
            raise

    @contextmanager
    def watch(self, path: str, note: Callable[[Object], None]) -> Iterator[list[Exception]]:
        """Hands each event of a watch to `note`, in order, from a thread, until the block ends.

        Yields the errors that have ended it before, at most one.
        """
        url = f"https://127.0.0.1:{self.control.api_port}{path}"
        timeout = urllib3.Timeout(connect=60.0, read=None)
        answer: Any = self._pool.request("GET", url, preload_content=False, timeout=timeout)
        if answer.status >= 400:
            raise CommandFailed(["GET", path], answer.status, "", answer.data.decode(errors="replace"))
        is_over, errors = threading.Event(), []

        def follow() -> None:
            try:
                for event in _events(answer):
                    note(event)
            except Exception as error:
                if not is_over.is_set():
                    errors.append(error)

        thread = threading.Thread(target=follow, name=f"watch {path}", daemon=True)
        thread.start()
        try:
            yield errors
        finally:
            is_over.set()
            answer.shutdown()
            thread.join(10.0)
            answer.close()

    def create_namespace(self, name: str, pod_security: str | None = None) -> str:
        labels = {"pod-security.kubernetes.io/enforce": pod_security} if pod_security else {}
        self.request("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
        self.wait_for(lambda: self.find(account), f"namespace {name} to be usable")
        return name

    def delete_namespace(self, name: str) -> None:
        self.request("DELETE", f"/api/v1/namespaces/{name}")

    # ---- nodes

    def simulate_nodes(
        self, count: int = 1, gpus_each: int = 0, pods_each: int = 1000, simulator: str = "fake"
    ) -> None:
        """Add nodes without a machine, whose pods become Ready at once, and the scheduler for them.

        May be called again to add more; nodes are named `simulated-0` and so on. The nodes of one `simulator` die
        together: `kill_control(f"kwok-{simulator}")`.
        """
        if "kube-scheduler" not in self.run.processes:
            require_tools("addons")
            (port,) = free_ports(1)
            self.spawn_control("kube-scheduler", self.control.scheduler(port))
        if f"kwok-{simulator}" not in self.run.processes:
            (port,) = free_ports(1)
            configuration = write_kwok_configuration(self.run.path)
            self.spawn_control(f"kwok-{simulator}", self._kwok(configuration, port, simulator))
        existing = len(self.list_objects("nodes", selector="type=simulated"))
        names = [f"simulated-{existing + i}" for i in range(count)]
        self.apply(*(_node(name, gpus_each, pods_each, simulator) for name in names))
        self.wait_for(lambda: all(self._is_node_ready(name) for name in names), "simulated nodes to be ready")

    def give_node(self, resource: str, amount: int, node: str = "simulated-0") -> None:
        """Let a simulated node have so much of a resource, as a device plugin reports it."""
        amounts = {resource: str(amount)}
        status = {"status": {"capacity": amounts, "allocatable": amounts}}
        self.request("PATCH", f"/api/v1/nodes/{node}/status", status, "merge-patch+json")

    def _is_node_ready(self, name: str) -> bool:
        node = self.get("node", name) or {}
        conditions = node.get("status", {}).get("conditions", [])
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def _kwok(self, configuration: Path, port: int, simulator: str) -> list[str]:
        return [
            tool("kwok"),
            f"--kubeconfig={self.kubeconfig}",
            f"--config={configuration}",
            "--manage-all-nodes=false",
            f"--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node={simulator}",
            f"--server-address=127.0.0.1:{port}",
            "--node-lease-duration-seconds=40",
            "--cidr=10.200.0.1/16",
            "--node-ip=10.201.0.1",
        ]


def _events(answer: Any) -> Iterator[Object]:
    """The events of a watch, a line each; none any more once its connection is shut down."""
    buffer = b""
    for chunk in answer.stream(amt=None):
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from (json.loads(line) for line in lines)


def _node(name: str, gpus: int, pods: int, simulator: str) -> dict[str, object]:
    capacity = {"cpu": "1000", "memory": "4Ti", "ephemeral-storage": "4Ti", "pods": str(pods)}
    if gpus:
        capacity["nvidia.com/gpu"] = str(gpus)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": simulator, "node.alpha.kubernetes.io/ttl": "0"},
            "labels": {"type": "simulated", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"},
        },
        "status": {"capacity": capacity, "allocatable": capacity},
    }
