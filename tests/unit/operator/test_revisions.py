"""Edits without meaning and other versions of the operator make no revision; whatever alters the pod does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toka_operator.differences import is_satisfied
from toka_operator.observed import Observed
from toka_operator.podspec import render_pod_template
from toka_operator.revisions import with_stored_revision
from toka_operator.spec import TokaDeploymentSpec, parse

from tests.unit.operator.examples import OWNER, body, live, plan_for, seen, valid

Json = dict[str, Any]
STORED = json.loads((Path(__file__).parent / "stored" / "version-0.1.json").read_text())
"""Objects, and the children that the operator of commit f81e17d made for them."""

SIDECAR: Json = {"name": "log", "image": "log:1", "resources": {"limits": {"memory": "1Gi"}}}
BASE: Json = {
    "model": {"source": "hf://org/name", "aliases": ["a", "b"]},
    "engine": {
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": ""}],
        "extraArgs": ["seed=1", "other=2"],
        "pullSecrets": [{"name": "s"}, {"name": "t"}],
        "envFrom": [{"secretRef": {"name": "s"}}],
    },
    "resources": {"cpu": "1", "memory": "1Gi", "sharedMemory": "2Gi"},
    "cache": {"type": "Ephemeral", "size": "10Gi"},
    "scheduling": {
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "k", "operator": "Equal", "value": "v"}, {"key": "l", "operator": "Exists"}],
        "topologySpread": [{"topologyKey": "x"}, {"topologyKey": "y", "maxSkew": 2}],
        "affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "z"}]}},
    },
    "auth": {"hfTokenSecretRef": {"name": "hf"}, "apiKeySecretRef": {"name": "api"}},
    "podTemplate": {
        "labels": {"team": "x"},
        "volumes": [{"name": "data", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "conf", "configMap": {"name": "c"}}],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "conf", "mountPath": "/conf"}],
        "sidecars": [SIDECAR],
    },
}

AFFINITY = BASE["scheduling"]["affinity"]
VOLUMES = BASE["podTemplate"]["volumes"]
MEANINGLESS: list[tuple[str, Any]] = [
    ("model.servedName", "name"),
    ("model.aliases", ["b", "a"]),
    ("model.dtype", "auto"),
    ("model.revision", None),
    ("model.tokenizer", None),
    ("engine.port", 10210),
    ("engine.pullPolicy", "IfNotPresent"),
    ("engine.hydragen", True),
    ("engine.cudaGraphs", True),
    ("engine.logLevel", "INFO"),
    ("engine.image", None),
    ("engine.extraArgs", ["other=2", "seed=1"]),
    ("engine.pullSecrets", [{"name": "t"}, {"name": "s"}]),
    ("engine.env", [{"name": "B", "value": ""}, {"name": "A", "value": "1"}]),
    ("engine.env", [{"name": "A", "value": "1"}, {"name": "B"}]),
    ("engine.env", [{"name": "A", "value": "1", "valueFrom": None}, {"name": "B", "value": ""}]),
    ("engine.envFrom", [{"secretRef": {"name": "s", "optional": False}}]),
    ("engine.envFrom", [{"prefix": "", "secretRef": {"name": "s"}}]),
    ("resources.device", "gpu"),
    ("resources.gpuResource", "nvidia.com/gpu"),
    ("resources.cpu", 1),
    ("resources.cpu", "1000m"),
    ("resources.cpu", "1.0"),
    ("resources.memory", "1024Mi"),
    ("resources.memory", 1073741824),
    ("resources.memory", "1048576Ki"),
    ("resources.sharedMemory", "2048Mi"),
    ("cache.type", "Ephemeral"),
    ("cache.size", "10240Mi"),
    ("cache.claimName", None),
    ("scheduling.patienceSeconds", 10),
    ("scheduling.priorityClassName", None),
    ("scheduling.tolerations", [{"key": "k", "value": "v"}, {"key": "l", "operator": "Exists"}]),
    ("scheduling.tolerations", [{"key": "l", "operator": "Exists"}, {"key": "k", "value": "v"}]),
    ("scheduling.tolerations", [{"key": "k", "value": "v", "effect": ""}, {"key": "l", "operator": "Exists"}]),
    ("scheduling.topologySpread", [{"topologyKey": "x", "maxSkew": 1}, {"topologyKey": "y", "maxSkew": 2}]),
    ("scheduling.topologySpread", [{"topologyKey": "y", "maxSkew": 2}, {"topologyKey": "x"}]),
    ("scheduling.topologySpread", [{"topologyKey": "x", "whenUnsatisfiable": "ScheduleAnyway"},
                                   {"topologyKey": "y", "maxSkew": 2}]),
    ("scheduling.affinity", {**AFFINITY, "nodeAffinity": {}}),
    ("scheduling.affinity", {**AFFINITY, "podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}),
    ("scheduling.affinity", {**AFFINITY, "podAntiAffinity": None}),
    ("auth.hfTokenSecretRef", {"name": "hf", "key": "token"}),
    ("auth.apiKeySecretRef", {"name": "api", "key": "key"}),
    ("startup.timeoutSeconds", 1800),
    ("startup", {}),
    ("rollout.maxSurge", 2),
    ("rollout.drainTimeoutSeconds", 120),
    ("rollout.drainDelaySeconds", 5),
    ("rollout.stuckSeconds", 60),
    ("rollout.maxUnavailable", 1),
    ("rollout.minReadySeconds", 6),
    ("rollout.progressDeadlineSeconds", 4000),
    ("rollout.revisionHistoryLimit", 5),
    ("service.type", "NodePort"),
    ("service.annotations", {"a": "b"}),
    ("replicas", 3),
    ("suspend", True),
    ("service.port", 8080),
    ("disruption.podDisruptionBudget", "Off"),
    ("podTemplate.annotations", {}),
    ("podTemplate.volumes", VOLUMES[::-1]),
    ("podTemplate.volumes", [{"name": "data", "emptyDir": {"sizeLimit": "1024Mi"}}, VOLUMES[1]]),
    ("podTemplate.volumes", [VOLUMES[0], {"name": "conf", "configMap": {"name": "c", "defaultMode": 420}}]),
    ("podTemplate.volumes", [VOLUMES[0], {"name": "conf", "configMap": {"name": "c", "items": []}}]),
    ("podTemplate.volumeMounts", BASE["podTemplate"]["volumeMounts"][::-1]),
    ("podTemplate.readinessGates", []),
    ("podTemplate.volumeMounts", [{"name": "data", "mountPath": "/data", "readOnly": False},
                                  {"name": "conf", "mountPath": "/conf", "subPath": ""}]),
    ("podTemplate.sidecars", [{**SIDECAR, "env": [], "ports": [], "securityContext": {}}]),
    ("podTemplate.sidecars", [{**SIDECAR, "resources": {"limits": {"memory": "1024Mi"}, "requests": {}}}]),
    ("podTemplate.sidecars", [{**SIDECAR, "terminationMessagePath": "/dev/termination-log", "tty": False}]),
]  # fmt: skip
"""Edits of BASE (None takes a field away) that mean the same pod."""

MEANINGFUL: list[tuple[str, Any]] = [
    ("model.source", "hf://org/other"),
    ("model.servedName", "other"),
    ("model.aliases", ["a"]),
    ("engine.image", "engine:2"),
    ("engine.env", [{"name": "A", "value": "2"}, {"name": "B", "value": ""}]),
    ("engine.envFrom", [{"secretRef": {"name": "s", "optional": True}}]),
    ("engine.extraArgs", ["seed=1"]),
    ("resources.cpu", "1001m"),
    ("resources.memory", "1G"),
    ("resources.sharedMemory", None),
    ("cache.size", None),
    ("scheduling.nodeSelector", {"a": ""}),
    ("scheduling.nodeSelector", {}),
    ("scheduling.topologySpread", []),
    ("scheduling.topologySpread", None),
    ("scheduling.tolerations", [{"key": "k", "operator": "Exists"}, {"key": "l", "operator": "Exists"}]),
    ("scheduling.affinity", {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "z", "labelSelector": {}}]}}),
    ("scheduling.affinity", {}),
    ("auth.hfTokenSecretRef", {"name": "hf", "key": "key"}),
    ("startup.timeoutSeconds", 60),
    ("rollout.drainTimeoutSeconds", 60),
    ("rollout.drainDelaySeconds", 6),
    ("podTemplate.labels", {"team": ""}),
    ("podTemplate.annotations", {"a": ""}),
    ("podTemplate.volumes", [{"name": "data", "emptyDir": {}}, VOLUMES[1]]),
    ("podTemplate.sidecars", [{**SIDECAR, "securityContext": {"readOnlyRootFilesystem": False}, "args": [""]}]),
    ("podTemplate.sidecars", [SIDECAR, {**SIDECAR, "name": "other"}]),
]  # fmt: skip


def edit(spec: Json, path: str, value: Any) -> Json:
    edited = copy.deepcopy(spec)
    *groups, name = path.split(".")
    place = edited
    for group in groups:
        place = place.setdefault(group, {})
    place[name] = value
    return edited


def checked(spec: Json) -> TokaDeploymentSpec:
    parsed = parse({**body(), "spec": spec})
    assert isinstance(parsed, TokaDeploymentSpec), parsed
    return parsed


def name_of(edit_: tuple[str, Any]) -> str:
    return f"{edit_[0]}={json.dumps(edit_[1])[:40]}"


def test_there_are_sixty_kinds_of_edits_without_meaning() -> None:
    assert len(MEANINGLESS) >= 60


@pytest.mark.parametrize(("path", "value"), MEANINGLESS, ids=map(name_of, MEANINGLESS))
def test_an_edit_without_meaning_makes_no_revision(path: str, value: Any) -> None:
    assert checked(edit(BASE, path, value)).revision == checked(BASE).revision


@pytest.mark.parametrize(("path", "value"), MEANINGFUL, ids=map(name_of, MEANINGFUL))
def test_an_edit_that_alters_the_pod_makes_a_revision(path: str, value: Any) -> None:
    assert checked(edit(BASE, path, value)).revision != checked(BASE).revision


@pytest.mark.parametrize("field", ["env", "envFrom", "extraArgs", "pullSecrets"])
def test_an_empty_list_is_as_good_as_none(field: str) -> None:
    assert valid(engine={field: []}).revision == valid().revision


def test_an_empty_object_is_as_good_as_none() -> None:
    empty = {"scheduling": {"nodeSelector": {}, "tolerations": [], "affinity": {}}, "engine": {}, "auth": {}}
    empty["podTemplate"] = {
        "labels": {},
        "annotations": {},
        "volumes": [],
        "volumeMounts": [],
        "sidecars": [],
        "readinessGates": [],
    }
    assert valid(**empty).revision == valid().revision


def test_on_cpus_what_only_gpus_need_makes_no_difference() -> None:
    on_cpus = valid(resources={"device": "cpu"}).revision
    assert valid(resources={"device": "cpu", "gpuResource": "amd.com/gpu"}).revision == on_cpus


def test_the_order_of_variables_matters_where_one_names_another() -> None:
    first, second = {"name": "A", "value": "1"}, {"name": "B", "value": "$(A)"}
    assert valid(engine={"env": [first, second]}).revision != valid(engine={"env": [second, first]}).revision


def alike(template: Any) -> Any:
    """A template in which order does not show, but that of containers and of variables that name others."""
    if isinstance(template, dict):
        items = {key: alike_list(key, value) for key, value in template.items()}
        return {key: value for key, value in items.items() if value not in (None, "", [], {}, False)}
    return template


def alike_list(key: str, value: Any) -> Any:
    if not isinstance(value, list):
        return alike(value)
    items = [alike(item) for item in value]
    keeps_order = key == "containers" or (key == "env" and any("$(" in str(v.get("value")) for v in value))
    if key == "args":
        items = ["".join(sorted(item)) if item.startswith("model_aliases") else item for item in items]
    return items if keeps_order else sorted(items, key=lambda item: json.dumps(item, sort_keys=True))


ANY_EDITS = st.lists(st.sampled_from([*MEANINGLESS, *MEANINGFUL]), min_size=1, max_size=4)


@given(ANY_EDITS, ANY_EDITS)
def test_the_revision_follows_the_pod(first: list[tuple[str, Any]], second: list[tuple[str, Any]]) -> None:
    """Specs of one revision have the same pod, and specs of the very same pod one revision."""
    specs = []
    for edits in (first, second):
        spec = BASE
        for path, value in edits:
            spec = edit(spec, path, value)
        specs.append(checked(spec))
    one, other = (render_pod_template(spec, "image", {}, "chat") for spec in specs)
    if one == other:
        assert specs[0].revision == specs[1].revision
    if specs[0].revision == specs[1].revision:
        assert alike(spelled(one)) == alike(spelled(other))


def spelled(template: Json) -> Json:
    """The spec with one spelling for the quantities, defaults and empty parts that the edits above write."""
    text = json.dumps(template)
    for many, one in {
        '"1024Mi"': '"1Gi"', '"1073741824"': '"1Gi"', '"1048576Ki"': '"1Gi"', '"2048Mi"': '"2Gi"',
        '"10240Mi"': '"10Gi"',
        '"cpu": "1000m"': '"cpu": "1"', '"cpu": "1.0"': '"cpu": "1"', ', "operator": "Equal"': "",
        ', "defaultMode": 420': "", ', "items": []': "", ', "nodeAffinity": {}': "", ', "requests": {}': "",
        ', "terminationMessagePath": "/dev/termination-log", "tty": false': "", ', "podAntiAffinity": null': "",
    }.items():  # fmt: skip
        text = text.replace(many, one)
    loaded: Json = json.loads(text)
    return loaded


def stored_as(case: Json) -> Observed:
    children = {(c["kind"], c["metadata"]["name"]): live(c) for c in copy.deepcopy(case["children"])}
    return Observed(children, (), frozenset())


@pytest.mark.parametrize("case", STORED, ids=lambda case: case["name"])
@pytest.mark.parametrize("image", ["engine:1", "engine:2"])
def test_an_upgrade_from_version_0_1_rolls_nothing(case: Json, image: str) -> None:
    observed = stored_as(case)
    spec = with_stored_revision(OWNER, checked(case["spec"]), observed)
    assert spec.revision == case["revision"]
    plan = plan_for(spec, observed, image)
    assert set(plan.targets) == {case["revision"]}
    (wanted,) = [c for c in plan.desired if c["kind"] == "StatefulSet"]
    assert is_satisfied(wanted, observed.children[("StatefulSet", wanted["metadata"]["name"])])


@pytest.mark.parametrize("case", STORED, ids=lambda case: case["name"])
def test_an_edit_without_meaning_after_the_upgrade_rolls_nothing_either(case: Json) -> None:
    observed = stored_as(case)
    upgraded = with_stored_revision(OWNER, checked(case["spec"]), observed)
    after = seen(plan_for(upgraded, observed))
    edited = checked(edit(edit(case["spec"], "scheduling.patienceSeconds", 7), "rollout.stuckSeconds", 7))
    assert with_stored_revision(OWNER, edited, after).revision == case["revision"]
    other = checked(edit(case["spec"], "engine.pageSize", 8))
    assert with_stored_revision(OWNER, other, after).revision == other.revision != case["revision"]
    assert with_stored_revision(OWNER, checked(case["spec"]), after).revision == case["revision"], "and back"


def test_a_revision_without_a_fingerprint_is_known_by_its_template() -> None:
    spec = checked(edit(BASE, "engine.env", []))
    observed = seen(plan_for(spec))
    for child in observed.children.values():
        child["metadata"].pop("annotations", None)
        child["metadata"]["name"] = child["metadata"]["name"].replace(spec.revision, "0123abcd")
    renamed = {(kind, child["metadata"]["name"]): child for (kind, _), child in observed.children.items()}
    again = json.loads(json.dumps(renamed_labels(renamed, spec.revision)))
    children = {(c["kind"], c["metadata"]["name"]): c for c in again}
    found = with_stored_revision(OWNER, checked(edit(BASE, "engine.env", None)), Observed(children, (), frozenset()))
    assert found.revision == "0123abcd"


def renamed_labels(children: dict[tuple[str, str], Json], revision: str) -> list[Json]:
    return [json.loads(json.dumps(child).replace(revision, "0123abcd")) for child in children.values()]


FINGERPRINTS = {
    "minimal": "c53f1b44cd1be6d0",
    "everything": "8b15369e00fc6422",
    "gpu with empty fields": "76f6761e9d3578db",
    "cpu with a key": "23a96eb6ebabfb52",
}
"""Whoever changes one of these rolls every engine of every user."""


def test_the_fingerprints_of_earlier_versions_stay() -> None:
    found = {case["name"]: checked(case["spec"]).fingerprint[:16] for case in STORED if case["name"] in FINGERPRINTS}
    assert found == FINGERPRINTS
    base = checked(BASE).fingerprint[:16]
    assert base == "f4702b47464206c9"
