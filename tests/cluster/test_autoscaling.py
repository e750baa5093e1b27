"""spec.autoscaling: Kubernetes' own autoscaler sets the replicas, by an engine's metrics, and nobody fights it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from tests.cluster.harness.kwok import HOLD_ANNOTATION
from tests.cluster.metrics_pipeline import GROUP, Load, run_pipeline
from tests.cluster.operating import WRITING_VERBS, Operator, pod_uids
from tests.cluster.recording import Recording, record

STABILIZATION_S = 12
SCALED = {"enabled": True, "minReplicas": 2, "maxReplicas": 6, "target": 10}
SCALED |= {"scaleDownStabilizationSeconds": STABILIZATION_S}


@pytest.fixture
def load(own_operator: Operator) -> Iterator[Load]:
    """The queues of the pods, which the autoscaler sees."""
    with run_pipeline(own_operator.server, own_operator.namespace) as load:
        yield load


def replicas_in(recording: Recording) -> list[int]:
    """The different values that spec.replicas of `chat` had, in order."""
    return [replicas for replicas, _ in itertools.groupby(state[0]["spec"]["replicas"] for state in recording.states)]


def count_reversals(values: list[int]) -> int:
    """The number of times that a series of different values turns round."""
    rises = [after > before for before, after in itertools.pairwise(values)]
    return sum(one != other for one, other in itertools.pairwise(rises))


def replicas_of(operator: Operator) -> int:
    return int(operator.require("td", "chat")["spec"]["replicas"])


def check_that_only_statuses_were_written(operator: Operator) -> None:
    events = [e for e in operator.audit_events() if e["objectRef"]["resource"] == "tokadeployments"]
    written = [e["objectRef"].get("subresource") for e in events if e["verb"] in WRITING_VERBS]
    assert written
    assert set(written) == {"status"}


def test_without_anybody_who_serves_the_metric_the_condition_says_so(own_operator: Operator) -> None:
    own_operator.apply("chat", autoscaling=SCALED)
    refused = own_operator.wait_for_condition("chat", "Autoscaled", "False", "FailedGetPodsMetric")
    assert "toka_waiting" in refused["message"]
    assert "docs/operations.md" in refused["message"]
    own_operator.wait_for(lambda: replicas_of(own_operator) == 2, "the least number, which needs no metric")
    own_operator.wait_until_ready("chat")
    pods = pod_uids(own_operator)
    target = own_operator.require("hpa", "chat")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "toka.dev/v1alpha1", "kind": "TokaDeployment", "name": "chat"}
    own_operator.patch("chat", autoscaling={"metric": "KVCacheUtilization", "target": 80})

    def metric() -> dict[str, object]:
        found: dict[str, object] = own_operator.require("hpa", "chat")["spec"]["metrics"][0]["pods"]
        return found

    expected = {
        "metric": {"name": "toka_kv_cache_utilization"},
        "target": {"type": "AverageValue", "averageValue": "800m"},
    }
    own_operator.wait_for(lambda: metric() == expected, "the other metric")
    own_operator.patch("chat", autoscaling=None)
    own_operator.wait_for(lambda: own_operator.get("hpa", "chat") is None, "the autoscaler to go")
    own_operator.wait_until_ready("chat")
    assert (replicas_of(own_operator), pod_uids(own_operator)) == (2, pods)
    check_that_only_statuses_were_written(own_operator)


@pytest.mark.slow
def test_a_square_wave_moves_the_replicas_up_once_and_down_once(own_operator: Operator, load: Load) -> None:
    own_operator.apply("chat", autoscaling=SCALED)
    own_operator.wait_for_condition("chat", "Autoscaled", "True")
    path = f"/apis/{GROUP}/v1beta2/namespaces/{own_operator.namespace}/pods/*/toka_kv_cache_utilization"
    used = own_operator.server.request("GET", path)["items"]
    assert {each["value"] for each in used} == {"500m"}
    with record(own_operator, "td") as recording:
        for _ in range(5):
            load.num_waiting = 50
            time.sleep(4)
            load.num_waiting = 0
            time.sleep(4)
        own_operator.wait_for(lambda: replicas_of(own_operator) == 2, "the quiet to be followed", timeout_s=90)
        own_operator.wait_until_ready("chat")
    seen = replicas_in(recording)
    assert max(seen) == 5
    assert count_reversals(seen) <= 2, seen
    check_that_only_statuses_were_written(own_operator)


def test_pods_that_load_count(own_operator: Operator, load: Load) -> None:
    """One pod serves with a long queue; the pods that the autoscaler asks for stay in their start."""
    held = {"annotations": {HOLD_ANNOTATION: "true"}}
    own_operator.apply("chat", autoscaling={**SCALED, "minReplicas": 1}, podTemplate=held)
    first = own_operator.wait_for(lambda: own_operator.pods("chat"), "the pod")[0]["metadata"]["name"]
    conditions = [{"type": kind, "status": "True"} for kind in ("Ready", "ContainersReady")]
    own_operator.set_pod_status(first, phase="Running", conditions=conditions)
    own_operator.wait_for_condition("chat", "Autoscaled", "True")
    load.num_waiting = 40
    with record(own_operator, "td") as recording:
        own_operator.wait_for(lambda: replicas_of(own_operator) == 4, "the queue to be followed")
        own_operator.apply("chat", autoscaling={**SCALED, "minReplicas": 1}, podTemplate=held)  # as a pipeline does
        time.sleep(8)
    seen = replicas_in(recording)
    assert seen[-1] == 4, seen
    assert count_reversals(seen) == 0, seen
