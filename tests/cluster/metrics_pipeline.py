"""The way of a metric from engine pods to the autoscaler: Prometheus and prometheus-adapter, both real.

Simulated nodes run no engine. In its place this process answers for each pod, with what an engine's own `Metrics` make
of the figures that a test sets. It also tells Prometheus of the pods, with the labels that a PodMonitor gives them, for
Debian's Prometheus knows no Kubernetes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import yaml
from toka_engine.messages import Stats
from toka_engine.server.metrics import CONTENT_TYPE, Metrics
from toka_engine.server.replicas import Replicas

from tests.cluster.harness.api_only import ApiServer, free_ports
from tests.cluster.harness.handle import Object
from tests.cluster.harness.paths import REPOSITORY, tool
from tests.cluster.harness.processes import ProcessHandle
from tests.cluster.harness.tools import require_tools

GROUP = "custom.metrics.k8s.io"
ADAPTER = "prometheus-adapter"


class Load:
    """The output sequences in the queues of all pods together, spread evenly, as a Service spreads requests."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self._namespace = namespace
        self._pods_path = f"/api/v1/namespaces/{namespace}/pods"
        self._server = server
        self.num_waiting = 0

    def _list_pods(self) -> list[Object]:
        labels = quote("app.kubernetes.io/name=toka-engine")
        found: list[Object] = self._server.request("GET", f"{self._pods_path}?labelSelector={labels}")["items"]
        return found

    def find_targets(self, port: int) -> bytes:
        """Every pod, as a target of Prometheus."""
        names = [name_of(pod) for pod in self._list_pods()]
        labels = [{"namespace": self._namespace, "pod": name, "__metrics_path__": f"/metrics/{name}"} for name in names]
        return json.dumps([{"targets": [f"127.0.0.1:{port}"], "labels": each} for each in labels]).encode()

    def show(self, pod: str) -> bytes | None:
        """The metrics of one pod; None if it is not ready: an engine that loads has none yet."""
        ready = [name_of(each) for each in self._list_pods() if is_ready(each)]
        return render_metrics(self.num_waiting // len(ready)) if pod in ready else None


def name_of(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)


def render_metrics(num_waiting: int) -> bytes:
    """The text at /metrics of an engine with so many sequences in its queue, and half of its KV cache in use."""
    replicas = Replicas([lambda message: None], block_tokens=16)
    totals = {name: 0 for name in Stats.__struct_fields__ if name != "durations"}
    totals |= {"waiting": num_waiting, "running": 2, "kv_pages_total": 100, "kv_pages_used": 50}
    replicas.all[0].stats = Stats(**totals)
    return Metrics(lambda: True, lambda: 0, replicas).render()


@contextmanager
def serve(load: Load) -> Iterator[int]:
    """Serve each pod's metrics at /metrics/POD, and the list of them at /targets, on the port that this yields."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            found = load.find_targets(self.server.server_address[1]) if name == "targets" else load.show(name)
            self.send_response(200 if found is not None else 404)
            self.send_header("content-type", "application/json" if name == "targets" else CONTENT_TYPE)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def documented_rules() -> list[Object]:
    """The rules for prometheus-adapter that docs/operations.md gives."""
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    block = page.split("<!-- begin: adapter rules -->\n```yaml\n")[1].split("```\n<!-- end: adapter rules -->")[0]
    rules: list[Object] = yaml.safe_load(block)
    return rules


@contextmanager
def run_pipeline(server: ApiServer, namespace: str) -> Iterator[Load]:
    """Prometheus, prometheus-adapter and custom.metrics.k8s.io on the server, for the pods of a namespace."""
    require_tools("adapter", "prometheus")
    load = Load(server, namespace)
    prometheus_port, adapter_port = free_ports(2)
    with serve(load) as port:
        processes = [
            _start_prometheus(server, port, prometheus_port),
            _start_adapter(server, prometheus_port, adapter_port),
        ]
        _register(server, adapter_port)
        try:
            yield load
        finally:
            server.kubectl("delete", "apiservice", f"v1beta2.{GROUP}", f"v1beta1.{GROUP}", "--ignore-not-found")
            server.kubectl("delete", "service", ADAPTER, "--namespace", "kube-system")
            for process in processes:
                process.kill()


def _start_prometheus(server: ApiServer, port: int, own_port: int) -> ProcessHandle:
    discovery = {"url": f"http://127.0.0.1:{port}/targets", "refresh_interval": "1s"}
    job = {"job_name": "engines", "http_sd_configs": [discovery]}
    configuration = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    file = server.run.path / "prometheus.yaml"
    file.write_text(json.dumps(configuration))
    flags = [f"--config.file={file}", f"--storage.tsdb.path={server.run.path}/prometheus"]
    argv = [tool("prometheus"), *flags, f"--web.listen-address=127.0.0.1:{own_port}"]
    return server.spawn("prometheus", argv)


def _start_adapter(server: ApiServer, prometheus_port: int, own_port: int) -> ProcessHandle:
    file = server.run.path / "adapter.yaml"
    file.write_text(json.dumps({"rules": documented_rules()}))
    purposes = ("lister", "authentication", "authorization")
    argv = [
        tool("adapter"),
        *(f"--{purpose}-kubeconfig={server.kubeconfig}" for purpose in purposes),
        f"--config={file}",
        f"--prometheus-url=http://127.0.0.1:{prometheus_port}/",
        "--metrics-relist-interval=2s",
        "--bind-address=127.0.0.1",
        f"--secure-port={own_port}",
        f"--cert-dir={server.run.path}/adapter",
    ]
    return server.spawn(ADAPTER, argv)


def _register(server: ApiServer, port: int) -> None:
    """The adapter's Service and its place in the API. The Service leads out of the cluster, to this machine."""
    spec = {"type": "ExternalName", "externalName": "127.0.0.1", "ports": [{"port": port}]}
    metadata = {"name": ADAPTER, "namespace": "kube-system"}
    manifests: list[Object] = [{"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}]
    for version in ("v1beta1", "v1beta2"):
        place = {
            "group": GROUP,
            "version": version,
            "service": {"name": ADAPTER, "namespace": "kube-system", "port": port},
            "insecureSkipTLSVerify": True,
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
        }
        kind = {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService"}
        manifests.append({**kind, "metadata": {"name": f"{version}.{GROUP}"}, "spec": place})
    server.apply(*manifests)

    def is_there() -> bool:
        found = server.get("apiservice", f"v1beta2.{GROUP}") or {}
        conditions = found.get("status", {}).get("conditions", [])
        return any((each["type"], each["status"]) == ("Available", "True") for each in conditions)

    server.wait_for(is_there, "the adapter to be asked")
