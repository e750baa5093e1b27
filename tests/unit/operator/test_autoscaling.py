"""spec.autoscaling: the autoscaler's manifest, what is refused, and what its own status means for ours."""

from __future__ import annotations

from typing import Any

import pytest
from toka_operator.autoscaling import explain_autoscaled
from toka_operator.spec import parse
from toka_operator.watches import make_stores

from tests.unit.operator.examples import body, child, live, plan_for, seen, valid

Json = dict[str, Any]
SCALED = {"enabled": True, "maxReplicas": 4, "target": 8}


def metric_of(**fields: Any) -> Json:
    plan = plan_for(valid(autoscaling={**SCALED, **fields}))
    (metric,) = child(plan, "HorizontalPodAutoscaler")["spec"]["metrics"]
    pods: Json = metric["pods"]
    return {pods["metric"]["name"]: pods["target"]["averageValue"]}


def test_each_metric_has_its_name_and_its_unit() -> None:
    assert metric_of() == {"toka_waiting": "8"}
    assert metric_of(target=1500) == {"toka_waiting": "1500"}
    assert metric_of(target=100000) == {"toka_waiting": "100k"}, "as the API server spells it"
    assert metric_of(metric="RunningRequests") == {"toka_running": "8"}
    assert metric_of(metric="KVCacheUtilization", target=85) == {"toka_kv_cache_utilization": "850m"}
    assert metric_of(metric="KVCacheUtilization", target=100) == {"toka_kv_cache_utilization": "1"}


def test_the_autoscaler_goes_when_it_is_switched_off_and_while_suspended() -> None:
    scaled = plan_for(valid(autoscaling=SCALED))
    for spec in (valid(), valid(autoscaling={**SCALED, "enabled": False}), valid(autoscaling=SCALED, suspend=True)):
        deletions = plan_for(spec, seen(scaled)).deletions
        assert [(kind, name) for kind, name, _ in deletions] == [("HorizontalPodAutoscaler", "chat")]
    assert valid(autoscaling=SCALED).revision == valid().revision


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"enabled": True}, {"maxReplicas", "target"}),
        ({"minReplicas": 0}, {"minReplicas"}),
        ({**SCALED, "minReplicas": 5}, {"minReplicas"}),
        ({**SCALED, "metric": "CPU"}, {"metric"}),
        ({**SCALED, "metric": "KVCacheUtilization", "target": 101}, {"target"}),
        ({**SCALED, "enabled": "yes"}, {"enabled"}),
    ],
)
def test_what_has_no_meaning_is_refused_by_its_field(fields: Json, paths: set[str]) -> None:
    errors = parse(body(autoscaling=fields))
    assert isinstance(errors, list)
    assert {error.path.removeprefix("spec.autoscaling.") for error in errors} == paths


def autoscaler(**conditions: tuple[str, str, str]) -> Json:
    told = [{"type": k, "status": s, "reason": r, "message": m} for k, (s, r, m) in conditions.items()]
    return {"status": {"conditions": told}}


def test_the_first_thing_that_keeps_it_from_scaling_is_told() -> None:
    assert explain_autoscaled(None)[:2] == (False, "AutoscalerStarting")
    able = ("True", "ReadyForNewScale", "ready")
    failed = ("False", "FailedGetPodsMetric", "no metric toka_waiting")
    status, reason, message = explain_autoscaled(autoscaler(AbleToScale=able, ScalingActive=failed))
    assert (status, reason) == (False, "FailedGetPodsMetric")
    assert message.startswith("no metric toka_waiting. Let custom.metrics.k8s.io serve")
    unable = ("False", "FailedGetScale", "not found")
    assert explain_autoscaled(autoscaler(AbleToScale=unable))[1] == "FailedGetScale"
    active = ("True", "ValidMetricFound", "well")
    assert explain_autoscaled(autoscaler(AbleToScale=able, ScalingActive=active))[0]


def test_what_an_autoscaler_measures_calls_for_no_pass_and_what_it_says_does() -> None:
    manifest = live(child(plan_for(valid(autoscaling=SCALED)), "HorizontalPodAutoscaler"))
    store = make_stores()["HorizontalPodAutoscaler"]

    def put(version: int, **status: Any) -> set[tuple[str, str]]:
        metadata = {**manifest["metadata"], "resourceVersion": str(version)}
        return store.put({**manifest, "metadata": metadata, "status": status})

    active = {"type": "ScalingActive", "status": "True"}
    assert put(1, conditions=[active], currentReplicas=1) == {("apps", "chat")}
    assert put(2, conditions=[active], currentReplicas=2) == set()
    assert put(3, conditions=[{**active, "status": "False"}], currentReplicas=2) == {("apps", "chat")}
    found = store.get(("apps", "chat"))
    assert found is not None
    assert found["metadata"]["resourceVersion"] == "3"
