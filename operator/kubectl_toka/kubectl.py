"""kubectl as a subprocess: the one way to the cluster.

Owns: the user's global flags, which go to every call, and what a failure of kubectl looks like. The command is that of
the PATH, or what the variable KUBECTL says.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from typing import Any

from kubectl_toka.names import RESOURCE

Json = dict[str, Any]


class KubectlError(Exception):
    """kubectl refused, or could not ask; the message is its own."""


class Kubectl:
    """Calls kubectl with `flags` (--namespace, --context, --kubeconfig and the like)."""

    def __init__(self, flags: list[str]) -> None:
        self._command = shlex.split(os.environ.get("KUBECTL") or "kubectl")
        self._flags = flags

    def argv(self, *arguments: str) -> list[str]:
        return [*self._command, *self._flags, *arguments]

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        """Return what a call prints. Raises KubectlError."""
        try:
            done = subprocess.run(self.argv(*arguments), input=stdin, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise KubectlError(f"there is no command {self._command[0]}: set KUBECTL") from error
        if done.returncode != 0:
            raise KubectlError(done.stderr.strip() or f"kubectl ended with {done.returncode}")
        return done.stdout

    def start(self, *arguments: str, merges_errors: bool = False) -> subprocess.Popen[str]:
        """Start a call whose lines are read as they come. The caller ends it."""
        errors = subprocess.STDOUT if merges_errors else subprocess.PIPE
        return subprocess.Popen(
            self.argv(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
        )

    def get(self, *arguments: str) -> Json:
        """Return an object, or a list of objects."""
        found: Json = json.loads(self.run("get", *arguments, "--output=json"))
        return found

    def list(self, kind: str, selector: str = "") -> list[Json]:
        """Return the objects of a kind with these labels."""
        items: list[Json] = self.get(kind, f"--selector={selector}")["items"]
        return items

    def deployment(self, name: str) -> Json:
        """Return a TokaDeployment."""
        return self.get(RESOURCE, name)

    def replace_spec(self, name: str, version: str, spec: Json) -> None:
        """Give a TokaDeployment another spec, if it is still the one of this resourceVersion."""
        patch = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": version},
            {"op": "replace", "path": "/spec", "value": spec},
        ]
        self.run("patch", RESOURCE, name, "--type=json", f"--patch={json.dumps(patch)}")
