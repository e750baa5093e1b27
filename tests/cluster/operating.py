"""The operator as a real process against a real API server, for the tests of this folder.

It runs with the chart's own service account, so that every test here is also a test of the chart's RBAC. A
test takes the fixture `operator`, whose process serves the whole cluster and all tests of a module, because to
start one costs two seconds of CPU; or `own_operator`, if it ends, starts or upgrades operators itself. When a
test ends, the operator's log is searched for whatever the test did not expect.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import urllib3
from kubernetes import config
from toka_operator.fingerprint import compute_fingerprint
from toka_operator.spec import DEFAULTS

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed
from tests.cluster.harness.outside import OutsideServer
from tests.cluster.harness.paths import REPOSITORY
from tests.cluster.harness.processes import ProcessHandle

Json = dict[str, Any]
SYSTEM = "toka-system"
ACCOUNT = "toka-operator"
USER = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
CHART = REPOSITORY / "charts" / "toka"
PATHS = {
    "td": "/apis/toka.dev/v1alpha1/namespaces/{}/tokadeployments",
    "pod": "/api/v1/namespaces/{}/pods",
    "service": "/api/v1/namespaces/{}/services",
    "serviceaccount": "/api/v1/namespaces/{}/serviceaccounts",
    "statefulset": "/apis/apps/v1/namespaces/{}/statefulsets",
    "controllerrevision": "/apis/apps/v1/namespaces/{}/controllerrevisions",
    "pdb": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "endpointslice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
}
WRITING_VERBS = ("create", "update", "patch", "delete")
HOLD = {"podTemplate": {"annotations": {"simulated.toka.dev/hold": "true"}}}
"""A spec whose pods stay Pending, so that a test can give them a status."""


@dataclass
class Operator:
    """One or more operator processes, and what a test asks of them."""

    server: ApiServer
    kubeconfig: Path
    namespace: str
    server_client: Any
    """The administrator's API client."""
    user: str = USER
    """The account with which the operators ask the API server."""
    processes: list[ProcessHandle] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    """Patterns of warnings and errors that the test itself brings about."""
    may_be_forbidden: bool = False
    """An API server that has just been started refuses everybody, until it has read its roles."""
    num_started: int = 0
    log_begins: dict[str, int] = field(default_factory=dict)
    """Process -> the size of its log when the test began, if that was not empty."""

    def start(self, **environment: str) -> ProcessHandle:
        """Starts one more operator; `environment` overrides its TOKA_* settings."""
        number, self.num_started = self.num_started, self.num_started + 1
        settings = {"TOKA_WATCH_NAMESPACES": self.namespace, "TOKA_IDENTITY": f"operator-{number}", **environment}
        process = start_operator(self.server, self.kubeconfig, f"{self.namespace}-{number}", **settings)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Ends every process that still runs, and checks how it ended and what it wrote."""
        ended = [end_operator(self.server, process) for process in self.processes if process.is_running()]
        assert set(ended) <= {0}, ended
        self.check_log()
        self.processes.clear()

    def check_log(self) -> None:
        """Fails if an operator wrote of something that the test did not expect, or was refused something."""
        surprises = [line for process in self.processes for line in self._surprises(process)]
        assert not surprises, "\n".join(surprises)
        forbidden = [] if self.may_be_forbidden else self._forbidden()
        assert not forbidden, f"the chart grants too little: {forbidden}"

    def _forbidden(self) -> list[str]:
        """Requests that RBAC refused (an admission's refusal is also a 403, but was authorised before)."""
        events = self.audit_events()
        decision = "authorization.k8s.io/decision"
        return [e["requestURI"] for e in events if e.get("annotations", {}).get(decision) == "forbid"]

    def _surprises(self, process: ProcessHandle) -> list[str]:
        known = [re.compile(pattern) for pattern in self.expected]
        known.append(re.compile(r"level=(INFO|DEBUG) "))
        known.append(re.compile(rf"object=(?!{self.namespace}/)"))
        written = process.log_file.read_bytes()[self.log_begins.get(process.name, 0) :]
        lines = written.decode(errors="replace").splitlines()
        return [line for line in lines if not any(pattern.search(line) for pattern in known)]

    # ---- objects

    def apply(self, name: str, **spec: Any) -> None:
        """`kubectl apply` of a TokaDeployment on CPUs whose pods count as available at once."""
        full = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}, **spec}
        full["rollout"] = {"minReadySeconds": 0, **spec.get("rollout", {})}
        self.server.apply(deployment(name, **full), namespace=self.namespace)

    def patch(self, name: str, **spec: Any) -> None:
        """Merges into a TokaDeployment's spec; None removes a field."""
        body = json.dumps({"spec": spec})
        self.kubectl("patch", "td", name, "--type=merge", "-p", body)

    def get(self, kind: str, name: str) -> Json | None:
        """One object, or None. By HTTP, because waiting by kubectl costs a process for each look."""
        status, found = self._read(f"{PATHS[kind].format(self.namespace)}/{name}")
        assert status in (200, 404), found
        return found if status == 200 else None

    def _read(self, path: str) -> tuple[int, Json]:
        api = self.server_client
        verb, url, headers, *_ = api.param_serialize(method="GET", resource_path=path, auth_settings=[])
        try:
            answer = api.rest_client.pool_manager.request(verb, url, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise CommandFailed(["GET", path], 1, "", str(error)) from error
        return answer.status, json.loads(answer.data)

    def require(self, kind: str, name: str) -> Json:
        found = self.get(kind, name)
        assert found is not None, f"no {kind} {name}"
        return found

    def list(self, kind: str, selector: str = "") -> list[Json]:
        """Objects of a kind, or of kinds separated by commas."""
        found: list[Json] = []
        for each in kind.split(","):
            path = f"{PATHS[each].format(self.namespace)}?labelSelector={quote(selector)}"
            status, answer = self._read(path)
            if status != 200:
                raise CommandFailed(["GET", path], 1, "", str(answer))
            found += [{**item, "kind": answer["kind"].removesuffix("List")} for item in answer["items"]]
        return found

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.server.kubectl(*arguments, "--namespace", self.namespace, stdin=stdin)

    def sets(self, name: str) -> dict[str, Json]:
        """StatefulSets of a TokaDeployment by revision."""
        found = self.list("statefulset", f"app.kubernetes.io/instance={name}")
        return {s["metadata"]["labels"]["toka.dev/revision"]: s for s in found}

    def pods(self, name: str) -> list[Json]:
        return self.list("pod", f"app.kubernetes.io/instance={name}")

    def set_pod_status(self, pod: str, **status: Any) -> None:
        """Report as a kubelet would."""
        body = json.dumps({"status": status})
        self.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge", "-p", body)

    def keep_pod(self, pod: str) -> None:
        """Deletes a pod, which then stays as a pod does that nobody ends."""
        hold = json.dumps({"metadata": {"finalizers": ["example.com/hold"]}})
        self.kubectl("patch", "pod", pod, "--type=merge", "-p", hold)
        self.kubectl("delete", "pod", pod, "--wait=false")

    def lose_pod(self, pod: str) -> None:
        """Write what the node controller does when it has lost the node."""
        since = "2026-01-01T00:00:00Z"
        ready = {"type": "Ready", "status": "False", "lastTransitionTime": since}
        containers = {"type": "ContainersReady", "status": "True", "lastTransitionTime": since}
        self.set_pod_status(pod, conditions=[ready, containers])

    def release_pod(self, pod: str) -> None:
        """Lets a pod that was kept be gone."""
        self.kubectl("patch", "pod", pod, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')

    # ---- waiting

    def wait_for(self, predicate: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
        return self.server.wait_for(predicate, what, timeout_s)

    def wait_for_condition(self, name: str, kind: str, status: str, reason: str = "") -> Json:
        """Waits for a condition of the object's newest generation, and returns it."""

        def find() -> Json | None:
            found = self.require("td", name)
            for condition in found.get("status", {}).get("conditions", []):
                is_new = condition["observedGeneration"] == found["metadata"]["generation"]
                is_it = (condition["type"], condition["status"]) == (kind, status)
                if is_new and is_it and reason in ("", condition["reason"]):
                    return dict(condition)
            return None

        return dict(self.wait_for(find, f"{name} to have {kind}={status} {reason}"))

    def wait_until_ready(self, name: str) -> Json:
        """Waits for Ready=True and returns the object."""
        self.wait_for_condition(name, "Ready", "True")
        return self.require("td", name)

    def audit_events(self) -> list[Json]:
        """The operators' requests about the test's namespace so far, oldest first."""
        return [e for e in self.server.audit_events(self.user) if self._is_ours(e)]

    def requests(self) -> list[tuple[str, str]]:
        """(verb, resource) of each of those requests."""
        events = self.audit_events()
        return [(e["verb"], e.get("objectRef", {}).get("resource", "")) for e in events]

    def _is_ours(self, event: Json) -> bool:
        return bool(event.get("objectRef", {}).get("namespace") == self.namespace)


_UNRELATED_POD = {
    "metadata": {"labels": {"app": "theirs"}},
    "spec": {
        "containers": [
            {
                "name": "c",
                "image": "none",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "runAsNonRoot": True,
                    "capabilities": {"drop": ["ALL"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }
        ]
    },
}


def unrelated_objects(name: str, revision: str) -> dict[tuple[str, str], Json]:
    """(kind, name) of each child of a TokaDeployment -> an object of that name that a user made, without any label."""
    set_name = f"{name}-{revision}"
    set_spec = {
        "serviceName": "x",
        "replicas": 0,
        "selector": {"matchLabels": {"app": "theirs"}},
        "template": _UNRELATED_POD,
    }
    bodies: list[tuple[str, str, str, str, Json]] = [
        ("serviceaccount", name, "v1", "ServiceAccount", {}),
        ("service", name, "v1", "Service", {"spec": {"ports": [{"port": 1}]}}),
        ("pdb", name, "policy/v1", "PodDisruptionBudget", {"spec": {}}),
        ("statefulset", set_name, "apps/v1", "StatefulSet", {"spec": set_spec}),
        ("controllerrevision", set_name, "apps/v1", "ControllerRevision", {"revision": 1, "data": {"theirs": True}}),
    ]
    return {
        (short, child): {"apiVersion": version, "kind": kind, "metadata": {"name": child}, **rest}
        for short, child, version, kind, rest in bodies
    }


def revision_of(spec: Json) -> str:
    """The name of the revision of a new object with this spec."""
    return compute_fingerprint(spec, DEFAULTS)[:8]


def deployment(name: str, **spec: Any) -> Json:
    """A TokaDeployment with exactly this spec."""
    return {
        "apiVersion": "toka.dev/v1alpha1",
        "kind": "TokaDeployment",
        "metadata": {"name": name},
        "spec": spec,
    }


def install(server: ApiServer) -> Path:
    """Installs the chart without pods of the operator; returns a kubeconfig of its service account."""
    server.create_namespace(SYSTEM, pod_security="restricted")
    server.helm("install", "toka", str(CHART), "--namespace", SYSTEM, "--set", "replicas=0")
    server.kubectl("wait", "--for=condition=Established", "crd/tokadeployments.toka.dev")
    return server.service_account_kubeconfig(SYSTEM, ACCOUNT)


@pytest.fixture(scope="session")
def installation(api_server: ApiServer) -> Path:
    """The chart's kubeconfig, on a server with simulated nodes."""
    api_server.simulate_nodes(2, gpus_each=8)
    return install(api_server)


@pytest.fixture(scope="session")
def crd(api_server: ApiServer, request: pytest.FixtureRequest) -> None:
    """The CRD, as the chart installs it; on somebody's own cluster it alone."""
    if isinstance(api_server, OutsideServer):
        api_server.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds" / "tokadeployments.yaml"))
        api_server.kubectl("wait", "--for=condition=Established", "crd/tokadeployments.toka.dev")
    else:
        request.getfixturevalue("installation")


def start_operator(server: ApiServer, kubeconfig: Path, name: str, **environment: str) -> ProcessHandle:
    """Starts an operator, of the whole cluster unless `environment` says otherwise."""
    env = {
        "KUBECONFIG": str(kubeconfig),
        "TOKA_ENGINE_IMAGE": "engine:1",
        "TOKA_NAMESPACE": SYSTEM,
        "TOKA_IDENTITY": name,
        "TOKA_HEALTH_PORT": "0",
        "TOKA_LEASE_DURATION_SECONDS": "4",
        "TOKA_LEASE_RENEW_DEADLINE_SECONDS": "3",
        "TOKA_LEASE_RETRY_SECONDS": "1",
        "TOKA_TAKEN_NAME_RETRY_SECONDS": "1",
        "TOKA_LOG_LEVEL": "INFO",
        **environment,
    }
    return server.spawn_python(name, ["-m", "toka_operator"], env)


def end_operator(server: ApiServer, process: ProcessHandle) -> int:
    """SIGTERM once it has started; returns its exit status. It gives its Lease back."""
    server.wait_for(lambda: "event=started" in process.log(), f"the start of {process.name}")
    return process.terminate()


def pod_uids(operator: Operator) -> set[str]:
    return {pod["metadata"]["uid"] for pod in operator.pods("chat")}


def probe(port: int, path: str) -> tuple[int, str]:
    """Status and text of one of an operator's health paths; 0 before it listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except urllib.error.URLError:
        return 0, "nobody listens"


def has_replicas(operator: Operator, name: str, replicas: int) -> bool:
    """Whether a TokaDeployment is ready: one revision, so many pods, its newest spec seen and its Service there."""
    found = operator.require("td", name)
    status = found.get("status", {})
    conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
    sets = operator.sets(name).values()
    is_seen = status.get("observedGeneration") == found["metadata"]["generation"]
    has_pods = [s["spec"]["replicas"] for s in sets] == [replicas]
    return is_seen and has_pods and conditions.get("Ready") == "True" and operator.get("service", name) is not None


@pytest.fixture(scope="module")
def shared_process(
    api_server: ApiServer, installation: Path, request: pytest.FixtureRequest
) -> Iterator[ProcessHandle]:
    """An operator of the whole cluster for the tests of a module."""
    name = request.module.__name__.rsplit(".", 1)[-1].replace("_", "-")
    process = start_operator(api_server, installation, f"operator-of-{name}")
    yield process
    assert end_operator(api_server, process) == 0


@pytest.fixture
def without_operator(api_server: ApiServer, installation: Path, namespace: str) -> Operator:
    """The settings of a test's operators, before there is one. Its namespace enforces Pod Security `restricted`."""
    label = "pod-security.kubernetes.io/enforce=restricted"
    api_server.kubectl("label", "namespace", namespace, label)
    client = config.new_client_from_config(str(api_server.kubeconfig))
    return Operator(api_server, installation, namespace, client)


@pytest.fixture
def operator(without_operator: Operator, shared_process: ProcessHandle) -> Iterator[Operator]:
    """The module's running operator, and a namespace of the test's own."""
    assert shared_process.is_running(), shared_process.log(4000)
    without_operator.processes.append(shared_process)
    without_operator.log_begins[shared_process.name] = shared_process.log_file.stat().st_size
    yield without_operator
    without_operator.check_log()


@pytest.fixture
def own_operator(without_operator: Operator) -> Iterator[Operator]:
    """A running operator for the test's own namespace alone, that the test may end."""
    without_operator.start()
    try:
        yield without_operator
    except BaseException:
        for process in without_operator.processes:
            process.kill()
        raise
    without_operator.stop()
