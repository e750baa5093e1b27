"""A build of images leaves nothing behind that it should not, and the images hold what their processes need."""

from __future__ import annotations

from tests.cluster.harness.images import build_image, buildah
from tests.cluster.harness.trees import run_checked
from tests.e2e.installation import OPERATOR_NAMESPACE, Deployment, Installation


def test_a_build_leaves_no_container_mounted() -> None:
    build_image("engine")
    assert run_checked(buildah("containers", "--quiet")) == ""


UNCOMPILED = """
import importlib.util, pathlib
for source in pathlib.Path("/opt/toka/src").rglob("*.py"):
    kept = pathlib.Path(importlib.util.cache_from_source(source))
    head = kept.read_bytes()[:16] if kept.exists() else b""
    if (head[:4], head[8:]) != (importlib.util.MAGIC_NUMBER, importlib.util.source_hash(source.read_bytes())):
        print(source)
print("looked")
"""
"""Names the modules that a process would compile at its start: their bytecode is missing, or of another source."""


def test_no_process_in_a_pod_has_to_compile_a_module_of_ours(installation: Installation, smollm2: Deployment) -> None:
    assert smollm2.exec_in(smollm2.pods()[0], "python", "-c", UNCOMPILED).split() == ["looked"]
    operator = ["exec", "--namespace", OPERATOR_NAMESPACE, "deployment/toka-operator", "--"]
    assert installation.cluster.kubectl(*operator, "python", "-c", UNCOMPILED).split() == ["looked"]
