"""The operator as a real process against a real API server, for the tests of this folder.

It runs with the chart's own service account, so that every test here is also a test of the chart's RBAC. A
test takes the fixture `operator`, whose process serves the whole cluster and all tests of a module, because to
start one costs two seconds of CPU; or `own_operator`, if it ends, starts or upgrades operators itself. When a
test ends, the operator's log is searched for whatever the test did not expect.
"""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from toka_operator.fingerprint import compute_fingerprint
from toka_operator.spec import DEFAULTS

from tests.cluster.harness.api_only import ApiServer
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
    "persistentvolumeclaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "pdb": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "networkpolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "hpa": "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers",
    "inferencepool": "/apis/inference.networking.k8s.io/v1/namespaces/{}/inferencepools",
    "httproute": "/apis/gateway.networking.k8s.io/v1/namespaces/{}/httproutes",
    "podmonitor": "/apis/monitoring.coreos.com/v1/namespaces/{}/podmonitors",
    "endpointslice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
}
WRITING_VERBS = ("create", "update", "patch", "delete")
PASSES_BURST, PASSES_A_SECOND = 50, 2
"""One test may call for so many, and so may what goes on in the namespaces of the tests before it."""
HOLD = {"podTemplate": {"annotations": {"simulated.toka.dev/hold": "true"}}}
"""A spec whose pods stay Pending, so that a test can give them a status."""


@dataclass
class Operator:
    """One or more operator processes, and what a test asks of them."""

    server: ApiServer
    kubeconfig: Path
    namespace: str
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
    passes_begin: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Process -> when the test began (monotonic), and its passes so far, if it ran then."""
    num_edits: int = 0
    """Writes of objects and pods that the test makes in a row, where they are many: each calls for a pass or two."""

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
        """Fails if an operator wrote of something that the test did not expect, was refused something, or looped."""
        surprises = [line for process in self.processes for line in self._surprises(process)]
        assert not surprises, "\n".join(surprises)
        forbidden = [] if self.may_be_forbidden else self._forbidden()
        assert not forbidden, f"the chart grants too little: {forbidden}"
        for process in filter(ProcessHandle.is_running, self.processes):
            since, passes_then = self.passes_begin.get(process.name, (process.started, 0.0))
            check_passes(process, since, passes_then + 2 * self.num_edits)

    def _forbidden(self) -> list[str]:
        """Requests that RBAC refused (an admission's refusal is also a 403, but was authorised before)."""
        events = self.audit_events()
        decision = "authorization.k8s.io/decision"
        return [e["requestURI"] for e in events if e.get("annotations", {}).get(decision) == "forbid"]

    def _surprises(self, process: ProcessHandle) -> list[str]:
        known = [re.compile(pattern) for pattern in self.expected]
        known.append(re.compile(r"level=(INFO|DEBUG) "))
        known.append(re.compile(r"logger=toka.lease .* event=failed .*Read timed out"))  # on busy processors
        known.append(re.compile(r"watch=.* event=broken .*storage is \(re\)initializing"))  # a kind that just came
        known.append(re.compile(rf"object=(?!{self.namespace}/)"))
        written = process.log_file.read_bytes()[self.log_begins.get(process.name, 0) :]
        lines = written.decode(errors="replace").splitlines()
        return [line for line in lines if not any(pattern.search(line) for pattern in known)]

    # ---- objects

    def apply(self, name: str, **spec: Any) -> None:
        """Apply a TokaDeployment on CPUs whose pods count as available at once (`kubectl apply --server-side`)."""
        full = {"model": {"source": "builtin://smollm2"}, "resources": {"device": "cpu"}, **spec}
        full["rollout"] = {"minReadySeconds": 0, **spec.get("rollout", {})}
        query = "fieldManager=kubectl&force=true&fieldValidation=Strict"
        self.server.request("PATCH", f"{self._path('td', name)}?{query}", deployment(name, **full), "apply-patch+yaml")

    def patch(self, name: str, **spec: Any) -> None:
        """Merges into a TokaDeployment's spec; None removes a field."""
        self.edit("td", name, {"spec": spec})

    def edit(self, kind: str, name: str, patch: Json) -> None:
        """Merges into any object, as a user may by hand; None removes a field."""
        self.server.request("PATCH", self._path(kind, name), patch, "merge-patch+json")

    def scale(self, name: str, replicas: int) -> None:
        """Sets a TokaDeployment's replicas through its scale subresource, as `kubectl scale` does."""
        scale = {"spec": {"replicas": replicas}}
        self.server.request("PATCH", f"{self._path('td', name)}/scale", scale, "merge-patch+json")

    def delete(self, kind: str, name: str, propagation: str = "Background") -> None:
        """Deletes an object, and waits for nothing."""
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        self.server.request("DELETE", self._path(kind, name), options)

    def delete_and_wait(self, kind: str, name: str, propagation: str = "Background") -> None:
        """Deletes an object, and waits until it is gone, as kubectl does."""
        found = self.require(kind, name)["metadata"]["uid"]
        self.delete(kind, name, propagation)
        self.wait_for(lambda: (self.get(kind, name) or {}).get("metadata", {}).get("uid") != found, f"{name} to go")

    def get(self, kind: str, name: str) -> Json | None:
        """One object, or None."""
        return self.server.find(self._path(kind, name))

    def _path(self, kind: str, name: str) -> str:
        return f"{PATHS[kind].format(self.namespace)}/{name}"

    def require(self, kind: str, name: str) -> Json:
        found = self.get(kind, name)
        assert found is not None, f"no {kind} {name}"
        return found

    def list(self, kind: str, selector: str = "") -> list[Json]:
        """Objects of a kind, or of kinds separated by commas."""
        found: list[Json] = []
        for each in kind.split(","):
            answer = self.server.request("GET", f"{PATHS[each].format(self.namespace)}?labelSelector={quote(selector)}")
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
        self.edit("pod", f"{pod}/status", {"status": status})

    def keep_pod(self, pod: str) -> None:
        """Deletes a pod, which then stays as a pod does that nobody ends."""
        self.hold_pod(pod)
        self.delete("pod", pod)

    def hold_pod(self, pod: str) -> None:
        """Lets a pod stay once it was deleted, until `release_pod`."""
        self.edit("pod", pod, {"metadata": {"finalizers": ["example.com/hold"]}})

    def lose_pod(self, pod: str) -> None:
        """Write what the node controller does when it has lost the node."""
        since = "2026-01-01T00:00:00Z"
        ready = {"type": "Ready", "status": "False", "lastTransitionTime": since}
        containers = {"type": "ContainersReady", "status": "True", "lastTransitionTime": since}
        self.set_pod_status(pod, conditions=[ready, containers])

    def release_pod(self, pod: str) -> None:
        """Lets a pod that was kept be gone."""
        self.edit("pod", pod, {"metadata": {"finalizers": None}})

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


EVERY_CHILD: Json = {
    "networkPolicy": {"mode": "Ingress"},
    "autoscaling": {"enabled": True, "maxReplicas": 4, "target": 1},
}
"""Parts of a spec that ask for children which not every object has."""


def unrelated_objects(name: str, revision: str) -> dict[tuple[str, str], Json]:
    """(kind, name) of each child of a TokaDeployment with `EVERY_CHILD` -> a user's object of that name, unlabelled."""
    set_name = f"{name}-{revision}"
    set_spec = {
        "serviceName": "x",
        "replicas": 0,
        "selector": {"matchLabels": {"app": "theirs"}},
        "template": _UNRELATED_POD,
    }
    target = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "theirs"}
    bodies: list[tuple[str, str, str, str, Json]] = [
        ("serviceaccount", name, "v1", "ServiceAccount", {}),
        ("service", name, "v1", "Service", {"spec": {"ports": [{"port": 1}]}}),
        ("pdb", name, "policy/v1", "PodDisruptionBudget", {"spec": {}}),
        ("networkpolicy", name, "networking.k8s.io/v1", "NetworkPolicy", {"spec": {"podSelector": {}}}),
        (
            "hpa",
            name,
            "autoscaling/v2",
            "HorizontalPodAutoscaler",
            {"spec": {"scaleTargetRef": target, "maxReplicas": 1}},
        ),
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
        "TOKA_ABSENT_KIND_RETRY_SECONDS": "2",
        "TOKA_LOG_LEVEL": "INFO",
        "TOKA_WATCH_NODES": "false" if "TOKA_WATCH_NAMESPACES" in environment else "true",  # as the chart says
        **environment,
    }
    return server.spawn_python(name, ["-m", "toka_operator"], env)


def end_operator(server: ApiServer, process: ProcessHandle) -> int:
    """SIGTERM once it has started; returns its exit status. It gives its Lease back."""
    server.wait_for(lambda: "event=started" in process.log(), f"the start of {process.name}")
    return process.terminate()


def count_passes(process: ProcessHandle) -> float:
    """The passes of an operator so far, whatever came of them."""
    started = re.search(r"event=started .*health_port=(\d+)", process.log())
    lines = probe(int(started[1]), "/metrics")[1].splitlines() if started else []
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("toka_operator_reconciles_total{"))


def check_passes(process: ProcessHandle, since: float, passes_then: float, num_tests: int = 1) -> None:
    """Fails if an operator did many more passes than tests have causes for: whatever is stopped, nothing may loop."""
    passes, seconds = count_passes(process) - passes_then, time.monotonic() - since
    limit = PASSES_BURST * num_tests + PASSES_A_SECOND * seconds
    assert passes <= limit, f"{process.name}: {passes:.0f} passes in {seconds:.0f} s"


def pod_uids(operator: Operator) -> set[str]:
    """The pods of `chat` that nobody told to go."""
    metadata = (pod["metadata"] for pod in operator.pods("chat"))
    return {each["uid"] for each in metadata if "deletionTimestamp" not in each}


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
    """An operator of the whole cluster for the tests of a module, which may name settings of its own."""
    name = request.module.__name__.rsplit(".", 1)[-1].replace("_", "-")
    settings = getattr(request.module, "OPERATOR_SETTINGS", {})
    process = start_operator(api_server, installation, f"operator-of-{name}", **settings)
    yield process
    assert end_operator(api_server, process) == 0


@pytest.fixture
def without_operator(api_server: ApiServer, installation: Path, namespace: str) -> Operator:
    """The settings of a test's operators, before there is one. Its namespace enforces Pod Security `restricted`."""
    labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    api_server.request("PATCH", f"/api/v1/namespaces/{namespace}", labels, "merge-patch+json")
    return Operator(api_server, installation, namespace)


@pytest.fixture
def operator(without_operator: Operator, shared_process: ProcessHandle) -> Iterator[Operator]:
    """The module's running operator, and a namespace of the test's own."""
    assert shared_process.is_running(), shared_process.log(4000)
    without_operator.processes.append(shared_process)
    without_operator.log_begins[shared_process.name] = shared_process.log_file.stat().st_size
    without_operator.passes_begin[shared_process.name] = (time.monotonic(), count_passes(shared_process))
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
