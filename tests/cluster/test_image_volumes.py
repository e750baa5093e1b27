"""A model in an image (`oci://`): the pods' volume, and an API server that does not know such volumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from toka_operator.advice import ADVICE
from toka_operator.podspec import IMAGE_VOLUMES_DROPPED

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.control import FEATURE_GATES
from tests.cluster.operating import Operator, end_operator, install, start_operator

SOURCE = {"source": "oci://registry.example:5000/org/tiny:v1?path=/models"}


def test_a_model_in_an_image_is_a_volume_of_the_pods(operator: Operator) -> None:
    operator.apply("chat", model=SOURCE, engine={"pullSecrets": [{"name": "registry"}]})
    operator.wait_until_ready("chat")
    (pod,) = operator.pods("chat")
    (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "model")
    assert volume["image"] == {"reference": "registry.example:5000/org/tiny:v1", "pullPolicy": "IfNotPresent"}
    container = pod["spec"]["containers"][0]
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == "model")
    assert (mount["mountPath"], mount["readOnly"]) == ("/mnt/model", True)
    assert {"model=/mnt/model/models", "served_model_name=tiny"} <= set(container["args"])
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """One of the test's own, without image volumes."""
    started = ApiServer.start(f"images-{os.getpid()}", feature_gates="ImageVolume=false")
    yield started
    started.stop()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_cluster_without_image_volumes_is_told_so_and_the_pods_come_once_it_has_them(server: ApiServer) -> None:
    server.simulate_nodes(1)
    kubeconfig = install(server)
    operator = Operator(server, kubeconfig, server.create_namespace("images"))
    process = start_operator(server, kubeconfig, "images-0")
    operator.apply("chat", resources={"device": "cpu"})
    operator.wait_until_ready("chat")
    (old,) = operator.pods("chat")
    operator.patch("chat", model=SOURCE)
    degraded = operator.wait_for_condition("chat", "Degraded", "True", "ImageVolumesUnsupported")
    assert f"{IMAGE_VOLUMES_DROPPED} (model)" in degraded["message"]
    assert degraded["message"].endswith(f"{ADVICE['ImageVolumesUnsupported']}.")
    operator.wait_for_condition("chat", "ConfigValid", "False", "ChildRejected")
    assert [pod["metadata"]["uid"] for pod in operator.pods("chat")] == [old["metadata"]["uid"]]
    assert len(operator.sets("chat")) == 1
    server.stop_api_server()
    server.control = replace(server.control, feature_gates=FEATURE_GATES)
    server.start_api_server()
    operator.wait_for_condition("chat", "Degraded", "False")
    operator.wait_until_ready("chat")
    (pod,) = operator.wait_for(
        lambda: [p for p in operator.pods("chat") if p["metadata"]["uid"] != old["metadata"]["uid"]],
        "the pod with the model",
    )
    assert [v["image"]["reference"] for v in pod["spec"]["volumes"] if "image" in v] == [
        "registry.example:5000/org/tiny:v1"
    ]
    end_operator(server, process)
