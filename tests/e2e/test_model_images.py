"""A model in an image of the cluster's registry, mounted by a real kubelet and container runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.harness.errors import CommandFailed
from tests.cluster.harness.images import image_name, run_build
from tests.e2e.installation import Installation
from tests.e2e.test_faults import wait_for_failure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
IMAGE = "localhost/smollm2-files:test"


def build_model_image(folder: Path) -> None:
    """Make an image of nothing but SmolLM2's files, which the engine's image has."""
    files = f"--from={image_name('engine')} /opt/toka/models/smollm2"
    (folder / "Dockerfile").write_text(f"FROM scratch\nCOPY --chmod=755 {files} /models/smollm2/\n")
    run_build([str(folder)], IMAGE)


def test_a_model_in_an_image_is_served_and_what_is_wrong_with_one_is_told(
    installation: Installation, namespace: str, tmp_path: Path
) -> None:
    build_model_image(tmp_path)
    reference = installation.cluster.push_image(IMAGE)
    engine = {"extraArgs": ["num_threads=1"]}
    sources = {
        "smollm2": f"oci://{reference}?path=/models/smollm2",
        "missing": f"oci://{reference.rpartition(':')[0]}:never-built",
        "elsewhere": f"oci://{reference}?path=/models",
    }
    smollm2, missing, elsewhere = (
        installation.deploy(namespace, name, model={"source": source}, engine=engine)
        for name, source in sources.items()
    )
    failure = wait_for_failure(missing, "ImagePullFailed")
    assert sources["missing"].removeprefix("oci://") in failure["message"]
    failure = wait_for_failure(elsewhere, "ModelInvalid")
    assert "/mnt/model/models/tokenizer.json is missing" in failure["message"]
    smollm2.wait_until_ready()
    lines = installation.run_client("stream.py", smollm2.url, "What is the capital of France?", "40").splitlines()
    *chunks, end = [json.loads(line) for line in lines]
    assert len(chunks) > 1
    assert "".join(chunk["text"] for chunk in chunks) == end["whole"]
    assert "Paris" in end["whole"]
    (pod,) = smollm2.pods()
    assert "config.json" in smollm2.exec_in(pod, "ls", "/mnt/model/models/smollm2").split()
    with pytest.raises(CommandFailed, match="Read-only file system"):
        smollm2.exec_in(pod, "touch", "/mnt/model/models/more")
