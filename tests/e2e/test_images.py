"""A build of images leaves nothing behind that it should not."""

from __future__ import annotations

from tests.cluster.harness.images import build_image, buildah
from tests.cluster.harness.trees import run_checked


def test_a_build_leaves_no_container_mounted() -> None:
    build_image("engine")
    assert run_checked(buildah("containers", "--quiet")) == ""
