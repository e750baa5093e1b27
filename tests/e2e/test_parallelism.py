"""A pod of several model workers: tensor 2 x data 2 on CPUs, served, measured and rolled on a real cluster."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.e2e.installation import Deployment, Installation, deletion_time
from tests.e2e.tiny_model import make_config_map, mount

pytestmark = pytest.mark.timeout(900)
RANKS = {(replica, rank) for replica in "01" for rank in "01"}


def count_steps(deployment: Deployment) -> dict[tuple[str, str], float]:
    """Steps by replica and rank, as the pod states them."""
    (pod,) = deployment.pods()
    address = f"http://{pod['status']['podIP']}:10210/metrics"
    text = deployment.installation.run_client("fetch.py", address)
    found = re.findall(r'^toka_rank_steps_total\{rank="(\d)",replica="(\d)",stage="0"\} (\S+)$', text, re.M)
    return {(replica, rank): float(steps) for rank, replica, steps in found}


@pytest.mark.slow
def test_two_replicas_of_two_ranks_serve_and_roll_without_a_broken_stream(
    installation: Installation, namespace: str, tmp_path: Path
) -> None:
    cluster = installation.cluster
    files = make_config_map(tmp_path, "tiny")
    cluster.apply(files, namespace=namespace)
    applied = time.monotonic()
    tiny = installation.deploy(
        namespace,
        name="tiny",
        model={"source": "file:///tiny", "dtype": "float32"},
        resources={"device": "cpu", "memory": "3Gi"},
        engine={"kvCacheNumTokens": 65536},  # by default too little memory would be left for long streams
        parallelism={"tensor": 2, "data": 2},
        podTemplate=mount(files, "/tiny"),
        rollout={"drainTimeoutSeconds": 600},
    )
    tiny.wait_until_ready()
    start_s = time.monotonic() - applied
    assert tiny.read()["status"]["gpus"] == 0
    (old,) = tiny.pods()
    assert {"tp_size=2", "dp_size=2"} <= set(old["spec"]["containers"][0]["args"])
    first = [tiny.ask(max_tokens=16) for _ in range(2)]  # one of each replica
    assert first[0] == first[1]
    cluster.wait_for(lambda: {key for key, steps in count_steps(tiny).items() if steps} == RANKS, "steps of all ranks")

    lines = installation.run_client("stream.py", tiny.url, "Go", "500", "ignore_eos").splitlines()
    begun, ended = json.loads(lines[0]), json.loads(lines[-1])
    num_tokens = min(50_000, int(500 / (ended["at"] - begun["at"]) * 2 * start_s))  # the stream slows the next start
    stream = installation.start_client(
        f"stream-{namespace}", "stream.py", tiny.url, "Go", str(num_tokens), "ignore_eos"
    )
    cluster.wait_for(lambda: "text" in stream.log(), "the stream's first words")
    tiny.patch({"engine": {"logLevel": "DEBUG"}})

    def is_going() -> float | None:
        pod = cluster.get("pod", old["metadata"]["name"], namespace)
        assert pod is not None, "the old pod was gone before its deletion was seen"
        return deletion_time(pod) if "deletionTimestamp" in pod["metadata"] else None

    deleted_at = cluster.wait_for(is_going, "the old pod's deletion", timeout_s=300)
    assert deleted_at is not None
    cluster.wait_for(lambda: not stream.is_running(), "the stream's end", timeout_s=300)
    assert stream.popen.returncode == 0, stream.log()
    chunks = [json.loads(line) for line in stream.log().splitlines()]
    assert chunks[0]["at"] < deleted_at < chunks[-1]["at"]
    assert (chunks[-1]["num_tokens"], chunks[-1]["finish_reason"]) == (num_tokens, "length")
    tiny.wait_until_ready()
    assert tiny.ask(max_tokens=16) == first[0]
