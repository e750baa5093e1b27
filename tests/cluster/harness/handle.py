"""A running Kubernetes as tests use it, whichever kind it is: the base of `ApiServer` and `Cluster`.

Everything goes through real clients (kubectl, or any client with `kubeconfig`). Failures carry what the
server said and the end of the components' logs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.harness.control import ControlPlane
from tests.cluster.harness.errors import CommandFailed, HarnessError, WaitTimeout
from tests.cluster.harness.paths import REPOSITORY, tool
from tests.cluster.harness.processes import ProcessHandle, RunFolder
from tests.cluster.harness.trees import run_checked

Result = TypeVar("Result")
Object = dict[str, Any]
_POLL_S = 0.05


class KubernetesHandle:
    """A running control plane. `spawn` and `kubectl` run where the API server can be reached."""

    def __init__(self, run: RunFolder, control: ControlPlane) -> None:
        self.run = run
        self.control = control

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return Path(self.control.pki.file("admin.kubeconfig"))

    def enter_network(self) -> list[str]:
        """A prefix for commands, which puts them where the API server can be reached."""
        return []

    # ---- processes

    def spawn(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, *, is_bare: bool = False
    ) -> ProcessHandle:
        """Start a process that can reach the API server and sees our files; its log is `run.logs/NAME.log`.

        `env` is added to ours (or, if `is_bare`, is all it gets). The process ends with the cluster.
        """
        environment = dict(env or {}) if is_bare else {**os.environ, **(env or {})}
        return self.run.spawn(name, [*self.enter_network(), *argv], environment)

    def spawn_python(self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> ProcessHandle:
        """Start our Python (say with `-m toka_operator`), our sources on its path and KUBECONFIG set."""
        sources = os.pathsep.join(str(REPOSITORY / folder) for folder in ("operator", "engine", "."))
        defaults = {"PYTHONPATH": sources, "KUBECONFIG": str(self.kubeconfig), "PYTHONUNBUFFERED": "1"}
        return self.spawn(name, [sys.executable, *arguments], {**defaults, **(env or {})})

    def python_in_control(
        self, arguments: Sequence[str], env: Mapping[str, str] | None = None, name: str = "python"
    ) -> ProcessHandle:
        """`spawn_python` with a default name."""
        return self.spawn_python(name, arguments, env)

    # ---- clients

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        kubeconfig: Path | None = None,
        timeout_s: float = 60.0,
    ) -> str:
        """Run kubectl, return its stdout; a refusal raises `CommandFailed`, the sentence in its `stderr`."""
        argv = self.kubectl_argv(*arguments, kubeconfig=kubeconfig)
        cache = {**os.environ, "KUBECACHEDIR": str(self.run.path / "kubectl-cache")}
        return run_checked([*self.enter_network(), *argv], stdin, timeout_s, cache)

    def kubectl_argv(self, *arguments: str, kubeconfig: Path | None = None) -> list[str]:
        """The command line of kubectl, for `spawn`."""
        return [tool("kubectl"), f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments]

    def helm(self, *arguments: str, timeout_s: float = 300.0) -> str:
        """Run helm and return its stdout."""
        argv = [tool("helm"), f"--kubeconfig={self.kubeconfig}", *arguments]
        environment = {
            **os.environ,
            "HELM_CACHE_HOME": f"{self.run.path}/helm",
            "HELM_CONFIG_HOME": f"{self.run.path}/helm",
        }
        return run_checked([*self.enter_network(), *argv], None, timeout_s, environment)

    def apply(self, *manifests: Object | str, namespace: str | None = None) -> None:
        """`kubectl apply` of dictionaries or YAML texts, all in one call."""
        documents = [text if isinstance(text, str) else json.dumps(text) for text in manifests]
        scope = [] if namespace is None else ["--namespace", namespace]
        self.kubectl("apply", *scope, "-f", "-", stdin="\n---\n".join(documents))

    def get(self, kind: str, name: str, namespace: str = "default") -> Object | None:
        """One object, or None if there is none of that name."""
        text = self.kubectl("get", kind, name, "--namespace", namespace, "--ignore-not-found", "-o", "json")
        found: Object | None = json.loads(text) if text.strip() else None
        return found

    def list_objects(self, kind: str, namespace: str = "default", selector: str = "") -> list[Object]:
        """The objects of a kind (or kinds, comma-separated) that a label selector picks."""
        scope = ["--namespace", namespace, "--selector", selector]
        items: list[Object] = json.loads(self.kubectl("get", kind, *scope, "-o", "json"))["items"]
        return items

    def create_namespace(self, name: str, pod_security: str | None = None) -> str:
        """Make a namespace, with a Pod Security level enforced if one is given; returns its name."""
        labels = {"pod-security.kubernetes.io/enforce": pod_security} if pod_security else {}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        self.wait_for(lambda: self.get("serviceaccount", "default", name), f"namespace {name} to be usable")
        return name

    def delete_namespace(self, name: str) -> None:
        """Begin to delete a namespace and all that is in it."""
        self.kubectl("delete", "namespace", name, "--wait=false")

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig that acts as a service account: how RBAC is tested with the operator outside a pod."""
        token = self.kubectl("create", "token", name, "--namespace", namespace, "--duration=24h").strip()
        return self.control.pki.write_kubeconfig(f"{namespace}-{name}", f"{{token: {token}}}")

    # ---- waiting and looking

    def wait_for(
        self, predicate: Callable[[], Result], what: str, timeout_s: float = 60.0, *, poll_s: float = _POLL_S
    ) -> Result:
        """Call `predicate` until it returns something true, and return that.

        A command that fails meanwhile counts as not yet. Raises `WaitTimeout` with the last answer, the last
        refusal and the end of the logs.
        """
        deadline = time.monotonic() + timeout_s
        answer: object = None
        refusal: CommandFailed | None = None
        while True:
            asked = time.monotonic()
            try:
                result = predicate()
                if result:
                    return result
                answer = result
            except CommandFailed as error:
                refusal = error
            if time.monotonic() > deadline:
                break
            # A kubectl costs a tenth of a second of CPU, which what is waited for may need more.
            time.sleep(max(poll_s, 3 * (time.monotonic() - asked)))
        raise WaitTimeout(
            f"waited {timeout_s:.0f} s for {what}; last answer {answer!r}, last refusal {refusal}\n{self.logs_tail()}"
        )

    def logs_tail(self, lines_each: int = 15) -> str:
        """The last lines of every component's and spawned process's log."""
        return self.run.logs_tail(lines_each)

    def audit_events(self, user: str | None = None) -> list[Object]:
        """Requests answered so far, oldest first, in the audit log's form (verb, requestURI, user ...).

        The components' own requests are not recorded. `user` selects by user name, for a service account
        `system:serviceaccount:NAMESPACE:NAME`. Watches appear when they end.
        """
        log = self.run.path / "audit.log"
        complete_lines = log.read_text().split("\n")[:-1] if log.exists() else []
        events: list[Object] = [json.loads(line) for line in complete_lines]
        return [event for event in events if user is None or event["user"]["username"] == user]

    # ---- the control plane's own life

    def start_api_server(self, timeout_s: float = 60.0) -> None:
        """Start kube-apiserver and wait until it is ready; there is no event for this: it is asked."""
        process = self.spawn_control("kube-apiserver", self.control.api_server())

        def is_ready() -> bool:
            if not process.is_running():
                raise HarnessError(f"kube-apiserver ended with {process.popen.returncode}:\n{process.log(8000)}")
            return self.kubectl("get", "--raw", "/readyz", timeout_s=10) == "ok"

        self.wait_for(is_ready, "the API server to be ready", timeout_s, poll_s=0.1)

    def stop_api_server(self) -> None:
        """Kill kube-apiserver: every watch and request breaks."""
        self.kill_control("kube-apiserver")

    def restart_api_server(self) -> None:
        """Kill kube-apiserver and start it again on the same address and data."""
        self.stop_api_server()
        self.start_api_server()

    def spawn_control(self, name: str, argv: list[str]) -> ProcessHandle:
        """Start a component of the control plane."""
        return self.spawn(name, argv)

    def kill_control(self, name: str) -> None:
        """SIGKILL a component of the control plane and wait for its end."""
        self.run.processes[name].kill()

    def stop(self) -> None:
        """End everything that belongs to it. Its logs stay until a run of the same name begins."""
        self.run.stop()
