"""Fetches definitions of kinds that a cluster need not have, out of the Go modules of those who define them.

A module is what the Go module proxy serves of a version, and is compared with the hash below. Only its definitions
stay. Nothing is downloaded by a test: one that finds a definition missing fails with `ToolsMissing`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.harness.errors import HarnessError, ToolsMissing
from tests.cluster.harness.paths import cluster_cache, only_one


@dataclass(frozen=True, slots=True)
class Definition:
    """A CustomResourceDefinition within a Go module."""

    kind: str
    module: str
    version: str
    checksum: str
    path: str

    @property
    def file(self) -> Path:
        """The file that it is copied to; each version has its own."""
        return cluster_cache() / "definitions" / f"{self.kind}-{self.version}.yaml"


_GATEWAY = ("sigs.k8s.io/gateway-api", "v1.4.0", "h1:ZwlNM6zOHq0h3WUX2gfByPs2yAEsy/EenYJB78jpQfQ=")
_GATEWAY_FOLDER = "config/crd/standard/gateway.networking"
_EXTENSION = (
    "sigs.k8s.io/gateway-api-inference-extension",
    "v1.3.0",
    "h1:Ng2Qs1Oum4WycuWyi3rOkAC7pZ2aDqgN2ku6Lr/mryQ=",
)
_EXTENSION_FOLDER = "config/crd/bases/inference.networking"
DEFINITIONS = (
    Definition("Gateway", *_GATEWAY, f"{_GATEWAY_FOLDER}.k8s.io_gateways.yaml"),
    Definition("HTTPRoute", *_GATEWAY, f"{_GATEWAY_FOLDER}.k8s.io_httproutes.yaml"),
    Definition("InferencePool", *_EXTENSION, f"{_EXTENSION_FOLDER}.k8s.io_inferencepools.yaml"),
    Definition("InferenceObjective", *_EXTENSION, f"{_EXTENSION_FOLDER}.x-k8s.io_inferenceobjectives.yaml"),
    Definition("InferenceModelRewrite", *_EXTENSION, f"{_EXTENSION_FOLDER}.x-k8s.io_inferencemodelrewrites.yaml"),
)


def ensure_definitions(go: str) -> None:
    """Fetch every definition that is missing. Raises HarnessError if a module is another than the one that is named."""
    for definition in DEFINITIONS:
        if not definition.file.exists():
            with only_one(cluster_cache() / "definitions" / ".lock"):
                _fetch(definition, go)


def has_definitions() -> bool:
    """Whether every definition is there."""
    return all(definition.file.exists() for definition in DEFINITIONS)


def require_definition(kind: str) -> Path:
    """Return the file with the definition of a kind. Raises ToolsMissing if it was not fetched."""
    (definition,) = [each for each in DEFINITIONS if each.kind == kind]
    if not definition.file.exists():
        raise ToolsMissing(f"the definition of {kind} is missing; run `python -m tests.cluster.harness tools`")
    return definition.file


def _fetch(definition: Definition, go: str) -> None:
    print(f"fetching the definition of {definition.kind}", flush=True)
    environment = os.environ | {
        "GOFLAGS": "-modcacherw",
        "GONOSUMDB": "*",  # the hash is compared here
        "GOMODCACHE": str(cluster_cache() / "go-modules"),
    }
    argv = [go, "mod", "download", "-json", f"{definition.module}@{definition.version}"]
    found = subprocess.run(argv, capture_output=True, text=True, cwd=cluster_cache(), env=environment)
    try:
        answer = json.loads(found.stdout)
    except ValueError:
        answer = {"Error": found.stderr}
    if answer.get("Sum") != definition.checksum:
        said = answer.get("Error") or f"its hash is {answer.get('Sum')}"
        raise HarnessError(f"{definition.module} {definition.version} cannot be used: {said}")
    copy = definition.file.with_suffix(".new")
    shutil.copyfile(Path(answer["Dir"]) / definition.path, copy)
    copy.replace(definition.file)
