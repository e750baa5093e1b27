"""A child as it should be against the child as it is: what is put back, what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_operator.differences import find_corrections, find_stale_annotations, find_uncorrected, is_satisfied
from toka_operator.quantities import are_equal, spell

from tests.unit.operator.examples import child, live, plan_for, valid


@pytest.mark.parametrize(
    ("desired", "live"),
    [
        ({"spec": {"a": 1}}, {"spec": {"a": 1, "added": 2}, "status": {}}),
        ({"spec": {"env": [{"name": "A", "value": ""}]}}, {"spec": {"env": [{"name": "A"}]}}),
        ({"spec": {"limits": {"memory": "1024Mi"}}}, {"spec": {"limits": {"memory": "1Gi"}}}),
        ({"spec": {"emptyDir": {"sizeLimit": "1.5Gi"}}}, {"spec": {"emptyDir": {"sizeLimit": "1536Mi"}}}),
        ({"spec": {"requests": {"cpu": "0.5"}}}, {"spec": {"requests": {"cpu": "500m"}}}),
    ],
)
def test_what_the_api_server_adds_or_rewrites_is_no_difference(desired: Any, live: Any) -> None:
    assert is_satisfied(desired, live)


@pytest.mark.parametrize(
    ("desired", "live", "patch"),
    [
        ({"spec": {"a": 1}}, {"spec": {"a": 2}}, {"spec": {"a": 1}}),
        ({"spec": {"a": True}}, {"spec": {"a": 1}}, {"spec": {"a": True}}),
        ({"spec": {"l": [1]}}, {"spec": {"l": [1, 2]}}, {"spec": {"l": [1]}}),
        (
            {"spec": {"ports": [{"name": "http", "port": 80}]}},
            {"spec": {"ports": [{"name": "http", "port": 81, "nodePort": 30000}]}},
            {"spec": {"ports": [{"name": "http", "port": 80, "nodePort": 30000}]}},
        ),
        (
            {"metadata": {"name": "x", "labels": {"a": "b"}}},
            {"metadata": {"name": "x"}},
            {"metadata": {"labels": {"a": "b"}}},
        ),
        ({"spec": {"limits": {"memory": "2Gi"}}}, {"spec": {"limits": {"memory": "1Gi"}}},
         {"spec": {"limits": {"memory": "2Gi"}}}),
    ],
)  # fmt: skip
def test_a_difference_becomes_a_patch_of_just_that(desired: Any, live: Any, patch: Any) -> None:
    assert find_corrections(desired, live) == patch


def test_only_annotations_of_ours_are_taken_away() -> None:
    live = {"metadata": {"annotations": {"keys": "a,b", "a": "1", "b": "2", "theirs": "3"}}}
    desired = {"metadata": {"annotations": {"keys": "a", "a": "1"}}}
    assert find_stale_annotations(desired, live, "keys") == {"metadata": {"annotations": {"b": None}}}
    assert find_stale_annotations({"metadata": {}}, {"metadata": {"annotations": {"x": "1"}}}, "keys") == {}


TEMPLATE_EDITS: dict[str, Any] = {
    "nodeSelector": {"a": "b"},
    "hostNetwork": True,
    "hostPID": True,
    "shareProcessNamespace": True,
    "dnsPolicy": "Default",
    "priorityClassName": "system-node-critical",
    "schedulingGates": [{"name": "x"}],
    "activeDeadlineSeconds": 5,
    "nodeName": "node-1",
    "initContainers": [{"name": "x", "image": "x"}],
    "hostAliases": [{"ip": "1.2.3.4"}],
    "serviceAccount": "other",
    "restartPolicy": "Never",
}
"""Fields that a hand may add to a pod template; the operator writes none of them."""


@pytest.mark.parametrize("name", TEMPLATE_EDITS)
def test_a_field_added_to_the_pod_template_is_taken_away(name: str) -> None:
    desired = child(plan_for(valid()), "StatefulSet")
    edited = copy.deepcopy(live(desired))
    edited["spec"]["template"]["spec"][name] = TEMPLATE_EDITS[name]
    assert find_corrections(desired, edited) == {"spec": {"template": {"spec": {name: None}}}}


def test_what_a_hand_adds_within_the_pod_template_is_taken_away() -> None:
    desired = child(plan_for(valid()), "StatefulSet")
    for path, value in {
        ("metadata", "annotations"): {"kubectl.kubernetes.io/restartedAt": "now"},
        ("metadata", "labels", "x"): "y",
        ("spec", "securityContext", "sysctls"): [{"name": "a", "value": "b"}],
        ("spec", "containers", 0, "lifecycle"): {"preStop": {"sleep": {"seconds": 1}}},
        ("spec", "containers", 0, "securityContext", "privileged"): True,
        ("spec", "containers", 0, "livenessProbe", "initialDelaySeconds"): 9,
        ("spec", "containers", 0, "env", 0, "value"): "other",
    }.items():
        edited = copy.deepcopy(live(desired))
        place: Any = edited["spec"]["template"]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        patch = find_corrections(desired, edited)["spec"]["template"]
        assert is_satisfied(desired, merge(edited, {"spec": {"template": patch}})), path


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def test_a_key_added_to_a_selector_is_taken_away_and_other_fields_of_the_service_may_stay() -> None:
    desired = child(plan_for(valid()), "Service")
    edited = copy.deepcopy(live(desired))
    edited["spec"]["selector"]["app"] = "evil"
    edited["spec"] |= {"sessionAffinity": "ClientIP", "publishNotReadyAddresses": True, "clusterIP": "10.0.0.1"}
    edited["metadata"]["labels"]["theirs"] = "kept"
    spec = {"selector": {"app": None}, "sessionAffinity": "None", "publishNotReadyAddresses": False}
    assert find_corrections(desired, edited) == {"spec": spec}


def test_another_version_of_the_operator_writes_no_child_for_its_own_sake() -> None:
    desired = child(plan_for(valid()), "Service")
    older = copy.deepcopy(live(desired))
    older["metadata"]["labels"]["app.kubernetes.io/version"] = "0.0.1"
    del older["spec"]["publishNotReadyAddresses"], older["spec"]["externalIPs"]
    assert find_corrections(desired, older) == {}


def test_only_what_a_patch_was_to_mend_counts_as_not_mended() -> None:
    patch = {"spec": {"replicas": 1, "template": {"a": 1}}}
    assert find_uncorrected(patch, {"spec": {"replicas": 1}}) == {"spec": {"replicas": 1}}
    assert find_uncorrected(patch, {"spec": {"paused": True}, "metadata": {"labels": {"a": "b"}}}) == {}
    assert find_uncorrected(patch, {"spec": {"template": {"a": 1, "b": 2}}}) == {"spec": {"template": {"a": 1}}}


@pytest.mark.parametrize(
    ("a", "b"), [("1Gi", "1024Mi"), ("0.5", "500m"), (1, "1"), ("1e3", "1k"), ("1.5Gi", "1536Mi"), ("2E", "2000P")]
)
def test_equal_quantities_have_one_spelling(a: Any, b: Any) -> None:
    assert are_equal(a, b)
    assert spell(a) == spell(b)


@given(st.text(max_size=8) | st.integers() | st.floats() | st.booleans() | st.none())
def test_no_value_makes_the_comparison_of_quantities_fail(value: Any) -> None:
    assert are_equal(value, value) or value != value
    spell(value)
