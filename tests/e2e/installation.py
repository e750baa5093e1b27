"""The end-to-end tests stand on this: the operator installed by helm on real nodes, a client pod, deployments.

Requests are made only from the client pod, through a Service's name, with the openai SDK, as a user would.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.cluster.harness.cluster import Cluster
from tests.cluster.harness.errors import CommandFailed, WaitTimeout
from tests.cluster.harness.handle import Object
from tests.cluster.harness.images import TARGETS, build_image
from tests.cluster.harness.paths import REPOSITORY
from tests.cluster.harness.processes import ProcessHandle

CLIENT_NAMESPACE = "client"
OPERATOR_NAMESPACE = "toka-system"
_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
_POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
_PROGRAMS = Path(__file__).resolve().parent / "client"


@dataclass(frozen=True, slots=True)
class Installation:
    """The operator on a cluster, and the client pod."""

    cluster: Cluster
    images: dict[str, str]

    @classmethod
    def install(cls, cluster: Cluster) -> Installation:
        """Build and push the images, install the chart where Pod Security is enforced, start the client."""
        images = {target: cluster.push_image(build_image(target)) for target in TARGETS}
        cluster.pull_image(images["engine"])  # 5 GB, the first time
        installation = cls(cluster, images)
        cluster.create_namespace(OPERATOR_NAMESPACE, "restricted")
        installation.helm_upgrade()
        cluster.create_namespace(CLIENT_NAMESPACE, "restricted")
        programs = {path.name: path.read_text() for path in _PROGRAMS.glob("*.py")}
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "programs"}, "data": programs}
        cluster.apply(config, _client_pod(images["client"]), namespace=CLIENT_NAMESPACE)
        ready = ["wait", "--for=condition=Ready", "pod/client", "--timeout=120s"]
        cluster.kubectl(*ready, "--namespace", CLIENT_NAMESPACE, timeout_s=150)
        return installation

    def helm_upgrade(self, *settings: str) -> None:
        """`helm upgrade --install` of the chart with our images, waiting until the operator is ready."""
        images = [f"image={self.images['operator']}", f"engineImage={self.images['engine']}"]
        values = [word for setting in [*images, *settings] for word in ("--set", setting)]
        chart = str(REPOSITORY / "charts" / "toka")
        where = ["--namespace", OPERATOR_NAMESPACE, "--wait", "--timeout", "4m"]
        self.cluster.helm("upgrade", "--install", "toka", chart, *where, *values)

    def new_namespace(self, test_name: str) -> str:
        """A namespace that enforces Pod Security `restricted`, named after a test."""
        words = re.sub(r"[^a-z0-9]+", "-", test_name.lower().removeprefix("test_")).strip("-")[:40].rstrip("-")
        return self.cluster.create_namespace(f"{words}-{uuid.uuid4().hex[:5]}", "restricted")

    def example(self, namespace: str, **spec: Any) -> Deployment:
        """Apply examples/smollm2.yaml, with the spec's fields replaced by those given."""
        self.cluster.kubectl("apply", "--namespace", namespace, "-f", str(REPOSITORY / "examples" / "smollm2.yaml"))
        deployment = Deployment(self, namespace, "smollm2")
        if spec:
            deployment.patch(spec)
        return deployment

    def deploy(self, namespace: str, name: str = "smollm2", **spec: Any) -> Deployment:
        """Create a TokaDeployment of the built-in model on CPUs; `spec` overrides or adds fields."""
        defaults = {
            "model": {"source": "builtin://smollm2"},
            "resources": {"device": "cpu", "memory": "2Gi"},
        }
        manifest = {
            "apiVersion": "toka.dev/v1alpha1",
            "kind": "TokaDeployment",
            "metadata": {"name": name},
            "spec": {**defaults, **spec},
        }
        self.cluster.apply(manifest, namespace=namespace)
        return Deployment(self, namespace, name)

    # ---- requests from the client pod

    def run_client(self, program: str, *arguments: str, timeout_s: float = 180.0) -> str:
        """Run one of the client programs in the client pod and return what it prints."""
        return self.cluster.kubectl(*_exec(program, arguments), timeout_s=timeout_s)

    def start_client(self, name: str, program: str, *arguments: str) -> ProcessHandle:
        """Start a client program that goes on while the test does something else."""
        kubectl = self.cluster.kubectl_argv(*_exec(program, arguments))
        return self.cluster.spawn(name, kubectl)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One TokaDeployment."""

    installation: Installation
    namespace: str
    name: str

    @property
    def cluster(self) -> Cluster:
        return self.installation.cluster

    @property
    def url(self) -> str:
        """The endpoint that the README promises."""
        return f"http://{self.name}.{self.namespace}.svc/v1"

    def read(self) -> Object:
        """The object as it is now, with at least an empty status."""
        found = self.cluster.get("tokadeployment", self.name, self.namespace)
        assert found is not None, f"{self.namespace}/{self.name} is gone"
        found.setdefault("status", {})
        return found

    def condition(self, kind: str) -> Object:
        """One condition, empty until the operator has written it for the newest generation."""
        found = self.read()
        if found["status"].get("observedGeneration") != found["metadata"]["generation"]:
            return {}
        conditions: list[Object] = found["status"].get("conditions", [])
        return next((each for each in conditions if each["type"] == kind), {})

    def wait_until_ready(self, timeout_s: float = 400.0) -> None:
        """Wait for the condition Ready of the newest spec."""
        what = ["--namespace", self.namespace, f"tokadeployment/{self.name}"]
        wait = ["wait", "--for=condition=Ready", f"--timeout={timeout_s:.0f}s"]
        try:
            self.cluster.kubectl(*wait, *what, timeout_s=timeout_s + 30)
        except CommandFailed as error:
            shown = self.cluster.kubectl("get", *what, "-o", "yaml")
            raise WaitTimeout(f"{error}\n{shown}\n{self.cluster.logs_tail()}") from error

    @property
    def explain(self) -> str:
        """The command with which to look, for a failure's text."""
        return f"kubectl get td {self.name} --namespace {self.namespace} -o yaml"

    def patch(self, spec: dict[str, Any]) -> None:
        """Merge fields into the spec."""
        patch = json.dumps({"spec": spec})
        kind = ["patch", "tokadeployment", self.name, "--namespace", self.namespace]
        self.cluster.kubectl(*kind, "--type=merge", "-p", patch)

    def scale_to(self, replicas: int) -> None:
        """Scale, as a user does, and wait until there are as many pods as that, ready, and no other."""
        target = [f"tokadeployment/{self.name}", f"--replicas={replicas}", "--namespace", self.namespace]
        self.cluster.kubectl("scale", *target)
        self.wait_until_ready()
        self.cluster.wait_for(lambda: len(self.pods()) == replicas, f"{replicas} pods: {self.explain}", timeout_s=180)

    def pods(self) -> list[Object]:
        """Its engine pods, those that are going included, oldest first."""
        pods = self.cluster.list_objects("pods", self.namespace, f"app.kubernetes.io/instance={self.name}")
        return sorted(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def ask(self, prompt: str = "The capital of France is", max_tokens: int = 8) -> str:
        """One completion through the Service."""
        return self.installation.run_client("complete.py", self.url, prompt, str(max_tokens)).strip()

    def keep_asking(self, seconds: int) -> None:
        """One completion after another through the Service, each on a new connection; all must be answered."""
        lines = self.installation.run_client("keep_asking.py", self.url, str(seconds)).splitlines()
        answers = [json.loads(line) for line in lines]
        assert answers
        assert [answer for answer in answers if "text" not in answer] == []

    def requests_served(self, pod: Object) -> float:
        """The number of requests that a pod has answered, by its own metrics."""
        address = f"http://{pod['status']['podIP']}:10210/metrics"
        text = self.installation.run_client("fetch.py", address)
        counts = re.findall(r'^toka_requests_total\{.*status="200".*\} ([0-9.e+]+)$', text, re.M)
        return sum(float(count) for count in counts)

    def exec_in(self, pod: Object, *argv: str) -> str:
        """Run a command in a pod's engine container."""
        name = pod["metadata"]["name"]
        return self.cluster.kubectl("exec", "--namespace", self.namespace, name, "-c", "engine", "--", *argv)

    def kill_process(self, pod: Object, module: str) -> None:
        """SIGKILL the engine process that runs `module`, from inside its container."""
        program = _KILL.replace("MODULE", module)
        try:
            self.exec_in(pod, "python", "-c", program)
        except CommandFailed as error:  # the container may end before the answer is through
            if "137" not in str(error) and "container not found" not in str(error):
                raise


_KILL = """
import os, pathlib, signal
for folder in pathlib.Path('/proc').glob('[0-9]*'):
    words = (folder / 'cmdline').read_bytes().split(b'\\0')
    if b'MODULE' in words:
        os.kill(int(folder.name), signal.SIGKILL)
        break
else:
    raise SystemExit('no process runs MODULE')
"""


def deletion_time(pod: Object) -> float:
    """The time at which a pod's deletion was asked for; its deletionTimestamp is that plus the grace period."""
    metadata = pod["metadata"]
    return read_time(metadata["deletionTimestamp"]) - float(metadata["deletionGracePeriodSeconds"])


def read_time(stamp: str) -> float:
    """A time of Kubernetes' as Unix seconds."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def _exec(program: str, arguments: tuple[str, ...]) -> list[str]:
    argv = ["exec", "--namespace", CLIENT_NAMESPACE, "client", "--", "python", f"/programs/{program}"]
    return [*argv, *arguments]


def container_security() -> Object:
    """The securityContext of a container that Pod Security `restricted` lets pass."""
    return dict(_SECURITY)


def pod_security() -> Object:
    """The same, of a pod."""
    return dict(_POD_SECURITY)


def _client_pod(image: str) -> Object:
    container = {
        "name": "client",
        "image": image,
        "args": ["-c", "import signal; signal.pause()"],
        "resources": {"requests": {"cpu": "250m"}},  # without, it gets no processor beside busy engines
        "securityContext": _SECURITY,
        "volumeMounts": [{"name": "programs", "mountPath": "/programs"}],
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "nodeName": "node1",  # the tests kill node2
        "securityContext": _POD_SECURITY,
        "containers": [container],
        "volumes": [{"name": "programs", "configMap": {"name": "programs"}}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "client"}, "spec": spec}
