"""A model hub in a pod: the server of the engine's own tests, with a model's files from a ConfigMap.

It stops in the middle of the weights until it is let, and tells how many bytes it has sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.handle import Object
from tests.cluster.harness.paths import REPOSITORY

_PORT = 8000
_WEIGHTS = "model.safetensors"
_PROGRAM = f"""
import pathlib, sys, time
sys.path.insert(0, "/hub")
from hub_server import HubServer
files = {{path.name: path.read_bytes() for path in pathlib.Path("/model").iterdir() if path.is_file()}}
with HubServer("org/tiny", files, ("0.0.0.0", {_PORT})) as hub:
    hub.holds["{_WEIGHTS}"] = len(files["{_WEIGHTS}"]) // 2
    while True:
        if pathlib.Path("/tmp/go").exists():
            hub.let_go.set()
        pathlib.Path("/tmp/bytes.new").write_text(str(hub.num_bytes_sent))
        pathlib.Path("/tmp/bytes.new").rename("/tmp/bytes")
        time.sleep(0.1)
"""


@dataclass(frozen=True, slots=True)
class ModelHub:
    """The hub of a namespace."""

    cluster: Cluster
    namespace: str

    @property
    def url(self) -> str:
        return f"http://hub.{self.namespace}.svc:{_PORT}"

    def let_go(self) -> None:
        """Have it send the rest."""
        self._run("open('/tmp/go', 'w').close()")

    def num_bytes_sent(self) -> int:
        return int(self._run("print(open('/tmp/bytes').read())"))

    def _run(self, program: str) -> str:
        return self.cluster.kubectl("exec", "--namespace", self.namespace, "hub", "--", "python", "-c", program)


def start_hub(
    cluster: Cluster, namespace: str, image: str, model: Object, security: Object, pod_security: Object
) -> ModelHub:
    """Start a hub that has the files of the ConfigMap `model` as org/tiny, and wait until it answers."""
    source = (REPOSITORY / "tests" / "unit" / "engine" / "hub_server.py").read_text()
    code = {"hub_server.py": source, "main.py": _PROGRAM}
    config: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hub"}, "data": code}
    service = {"selector": {"app": "hub"}, "ports": [{"port": _PORT}]}
    container = {
        "name": "hub",
        "image": image,
        "args": ["/hub/main.py"],
        "securityContext": security,
        "readinessProbe": {"tcpSocket": {"port": _PORT}, "periodSeconds": 1},
        "volumeMounts": [
            {"name": "hub", "mountPath": "/hub"},
            {"name": "model", "mountPath": "/model"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": pod_security,
        "containers": [container],
        "volumes": [
            {"name": "hub", "configMap": {"name": "hub"}},
            {"name": "model", "configMap": {"name": model["metadata"]["name"]}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hub", "labels": {"app": "hub"}}, "spec": spec}
    cluster.apply(
        model,
        config,
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "hub"}, "spec": service},
        pod,
        namespace=namespace,
    )
    ready = ["wait", "--for=condition=Ready", "pod/hub", "--timeout=180s", "--namespace", namespace]
    cluster.kubectl(*ready, timeout_s=200)
    return ModelHub(cluster, namespace)


def offer_shared_volume(cluster: Cluster, name: str) -> Path:
    """Make a volume that both nodes can mount: a folder of the machine that they share."""
    folder = cluster.run.path / name
    folder.mkdir()
    folder.chmod(0o777)
    spec = {
        "storageClassName": name,
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteMany"],
        "hostPath": {"path": str(folder)},
    }
    cluster.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})
    return folder
