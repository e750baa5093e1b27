"""Replicas with one cache, and a hub in the cluster: one download, seen while it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import tiny_model
from tests.e2e.installation import Installation, container_security, pod_security
from tests.e2e.model_hub import offer_shared_volume, start_hub

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_replicas_that_share_a_cache_download_once_and_the_status_tells_how_far_it_is(
    installation: Installation, namespace: str, tmp_path: Path
) -> None:
    cluster = installation.cluster
    model = tiny_model.make_config_map(tmp_path, "tiny")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    image = installation.images["client"]
    hub = start_hub(cluster, namespace, image, model, container_security(), pod_security())
    offer_shared_volume(cluster, f"shared-{namespace}")
    # A hub that holds is none that hangs: the engine is not to give up and ask again.
    patience = {"name": "HF_HUB_DOWNLOAD_TIMEOUT", "value": "600"}
    variables = [{"name": "HF_ENDPOINT", "value": hub.url}, patience]
    tiny = installation.deploy(
        namespace,
        "tiny",
        model={"source": "hf://org/tiny"},
        replicas=2,
        cache={"type": "SharedPVC", "size": "1Gi", "storageClassName": f"shared-{namespace}"},
        engine={"env": variables, "extraArgs": ["num_threads=1"]},
    )

    def progress() -> str | None:
        found = tiny.read()["status"].get("cache", {}).get("progress", "")
        return found if " of " in found else None

    told = cluster.wait_for(progress, f"the download in the status: {tiny.explain}", timeout_s=400)
    assert told is not None
    assert told.split(",")[0].endswith(f"of {size / 1e6:.2f} MB")
    assert told in cluster.kubectl("get", "td", "tiny", "--namespace", namespace)
    assert tiny.condition("ModelCached")["reason"] == "Downloading"
    hub.let_go()
    tiny.wait_until_ready()
    assert tiny.read()["status"]["cache"]["progress"] == "done"
    assert len(tiny.pods()) == 2
    assert hub.num_bytes_sent() <= 1.1 * size
    assert tiny.ask()
